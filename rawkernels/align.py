"""
Pairs sorted by expert with each expert's share padded to whole blocks, and counts of tokens.

A block is a tile of the sorted pairs, so that slot i of block b is row i of tile b: the pairs are sorted with
tiles of `block_size` rows, and _layout_kernels.py writes every slot.
"""

import numpy as np

from cumoe.rawkernels import _numba, permute


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
    import cupy as cp

    num_pairs, nothing = topk_ids.size, expert_map[:0]
    offsets, dense, schedule = permute.sorted_scratch(num_pairs, num_experts, block_size)
    inv_permuted_idx = cp.empty(num_pairs, np.int32)
    used_map, labels = (expert_map, nothing) if ignore_invalid_experts else (nothing, expert_map)
    permute.sort_shifted(topk_ids, 0, used_map, offsets, dense, inv_permuted_idx, schedule, block_size)
    _numba.kernel("_layout_kernels.py", "pad_blocks")(
        *permute.grid_of(max(sorted_token_ids.size, num_pairs)),
        schedule,
        dense,
        inv_permuted_idx,
        labels,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        scatter_idx,
        sorted_token_ids.size,
        expert_ids.size,
        scatter_idx.size,
        labels.size,
        num_pairs,
        block_size,
        overlap=True,
    )


def batched_align_block_size(
    expert_num_tokens, sorted_token_ids, expert_ids, num_tokens_post_padded, max_num_tokens, block_size
):
    """Fill the outputs, int32, with the used slots e * max_num_tokens + i; counts are held to 0..max_num_tokens."""
    import cupy as cp

    num_local = expert_num_tokens.size
    schedule = cp.empty(4 * (expert_ids.size + 1), np.int32)
    permute.list_tiles_of(expert_num_tokens, False, num_local, schedule, block_size, max_num_tokens)
    _numba.kernel("_layout_kernels.py", "pad_shelves")(
        *permute.grid_of(sorted_token_ids.size),
        schedule,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        sorted_token_ids.size,
        expert_ids.size,
        num_local * max_num_tokens,
        block_size,
        overlap=True,
    )


def naive_block_assignment(topk_ids, expert_ids, num_experts):
    """``expert_ids[pair]`` int32 (T*k,) = the pair's expert, -1 if its id is outside 0..num_experts-1."""
    if topk_ids.size > 0:
        kernel = _numba.kernel("_layout_kernels.py", "name_experts", ID=topk_ids.dtype.name)
        kernel(*permute.grid_of(topk_ids.size), topk_ids, None, expert_ids, topk_ids.size, num_experts, overlap=True)


def count_expert_num_tokens(topk_ids, expert_map, expert_num_tokens):
    """How many pairs each local expert gets; `expert_map` (E,) int32, or (0,) for the identity."""
    expert_num_tokens.fill(0)  # no kernel: what adds to it must start after it
    if topk_ids.size > 0:
        _numba.kernel("_layout_kernels.py", "count_tokens", ID=topk_ids.dtype.name)(
            *permute.grid_of(topk_ids.size),
            topk_ids,
            expert_map,
            expert_map.size,
            expert_num_tokens,
            topk_ids.size,
            expert_num_tokens.size,
        )
