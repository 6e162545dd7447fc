"""
Pairs sorted by expert with each expert's share padded to whole blocks, and counts of tokens.

    sorted_token_ids   | pairs of expert 0, T*k, T*k | pairs of expert 1, T*k | ... | T*k ...
    expert_ids         |      0      |      0       |           1            | ... |  -1 ...
                         one block     one block

A block belongs to one expert; the slots after a expert's last pair hold T*k, one past the last pair.
"""

import numpy as np

from cumoe.cpu import permute
from cumoe.cpu._jit import jit
from cumoe.cpu.permute import local_expert


def align_block_size(
    topk_ids,
    expert_map,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    scatter_idx,
    num_experts,
    block_size,
    ignore_invalid_experts,
):
    """
    Fill the four outputs, all int32, from `topk_ids` (T, k).

    `expert_map` (E,) int32, or (0,) for none, is applied to the ids before they are sorted if
    `ignore_invalid_experts`, else to `expert_ids` only. `scatter_idx` is (T*k, 1), or (0, 1) if unwanted.
    """
    nothing = expert_map[:0]
    offsets = np.empty(num_experts + 1, np.int64)
    permuted_idx = np.empty(topk_ids.size, np.int32)
    inv_permuted_idx = np.empty(topk_ids.shape, np.int32)
    permute.sort_by_expert(
        topk_ids, expert_map if ignore_invalid_experts else nothing, offsets, permuted_idx, inv_permuted_idx
    )
    labels = nothing if ignore_invalid_experts else expert_map
    _pad(offsets, permuted_idx, labels, sorted_token_ids, expert_ids, num_tokens_post_padded, block_size)
    if scatter_idx.size > 0:
        _mark_dropped(inv_permuted_idx.reshape(-1), scatter_idx)


@jit()
def _pad(offsets, permuted_idx, labels, sorted_token_ids, expert_ids, num_tokens_post_padded, block_size):
    slot = np.int64(0)
    for e in range(offsets.size - 1):
        count = offsets[e + 1] - offsets[e]
        end = slot + -(-count // block_size) * block_size
        for block in range(slot // block_size, end // block_size):
            expert_ids[block] = labels[e] if labels.size > 0 else e
        sorted_token_ids[slot : slot + count] = permuted_idx[offsets[e] : offsets[e + 1]]
        sorted_token_ids[slot + count : end] = permuted_idx.size
        slot = end
    sorted_token_ids[slot:] = permuted_idx.size
    expert_ids[slot // block_size :] = -1
    num_tokens_post_padded[0] = slot


@jit()
def _mark_dropped(inv_permuted_idx, scatter_idx):
    for pair in range(inv_permuted_idx.size):
        scatter_idx[pair, 0] = pair if inv_permuted_idx[pair] >= 0 else -1


@jit()
def batched_align_block_size(
    expert_num_tokens, sorted_token_ids, expert_ids, num_tokens_post_padded, max_num_tokens, block_size
):
    """Fill the outputs, int32, with the used slots e * max_num_tokens + i; counts are held to 0..max_num_tokens."""
    sentinel = expert_num_tokens.size * max_num_tokens
    slot = np.int64(0)
    for e in range(expert_num_tokens.size):
        count = min(max(np.int64(expert_num_tokens[e]), 0), max_num_tokens)
        end = slot + -(-count // block_size) * block_size
        expert_ids[slot // block_size : end // block_size] = e
        for i in range(count):
            sorted_token_ids[slot + i] = e * max_num_tokens + i
        sorted_token_ids[slot + count : end] = sentinel
        slot = end
    sorted_token_ids[slot:] = sentinel
    expert_ids[slot // block_size :] = -1
    num_tokens_post_padded[0] = slot


@jit()
def naive_block_assignment(topk_ids, expert_ids, num_experts):
    """``expert_ids[pair]`` int32 (T*k,) = the pair's expert, -1 if its id is outside 0..num_experts-1."""
    top_k = topk_ids.shape[1]
    for t in range(topk_ids.shape[0]):
        for j in range(top_k):
            expert = np.int64(topk_ids[t, j])
            expert_ids[t * top_k + j] = expert if 0 <= expert < num_experts else -1


@jit()
def count_expert_num_tokens(topk_ids, expert_map, expert_num_tokens):
    """How many pairs each local expert gets; `expert_map` (E,) int32, or (0,) for the identity."""
    expert_num_tokens[:] = 0
    for t in range(topk_ids.shape[0]):
        for j in range(topk_ids.shape[1]):
            e = local_expert(np.int64(topk_ids[t, j]), expert_map, expert_num_tokens.size)
            if e >= 0:
                expert_num_tokens[e] += 1
