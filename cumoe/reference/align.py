"""Pairs sorted by expert, each expert's share padded to whole blocks; and counts of tokens."""

import numpy as np

from cumoe.reference.experts import local_experts


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def align_block_size(
    topk_ids: np.ndarray,
    block_size: int,
    num_experts: int,
    *,
    expert_map: np.ndarray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Give each expert, in order, its pairs in ascending order, then T*k up to a multiple of `block_size`.

    Returns `sorted_token_ids`, `expert_ids` (one a block, -1 after the last used block),
    `num_tokens_post_padded` (1,) and `scatter_idx` (T*k, 1). `expert_map` is applied to the pairs
    before they are sorted (`ignore_invalid_experts`), or to `expert_ids` after.
    """
    num_pairs = topk_ids.size
    size = num_pairs + num_experts * (block_size - 1)
    if pad_sorted_ids:
        size = cdiv(size, block_size) * block_size
    if num_pairs < num_experts:
        size = min(num_pairs * block_size, size)
    experts = local_experts(topk_ids, num_experts, expert_map if ignore_invalid_experts else None).reshape(-1)

    pairs: list[int] = []
    blocks: list[int] = []
    for e in range(num_experts):
        own = np.flatnonzero(experts == e)
        num_blocks = cdiv(len(own), block_size)
        pairs += [*own, *[num_pairs] * (num_blocks * block_size - len(own))]
        blocks += [e if expert_map is None or ignore_invalid_experts else expert_map[e]] * num_blocks

    sorted_token_ids = np.full(size, num_pairs, np.int32)
    sorted_token_ids[: len(pairs)] = pairs
    expert_ids = np.full(cdiv(size, block_size), -1, np.int32)
    expert_ids[: len(blocks)] = blocks
    scatter_idx = np.where(experts >= 0, np.arange(num_pairs), -1).astype(np.int32)[:, None]
    return sorted_token_ids, expert_ids, np.array([len(pairs)], np.int32), scatter_idx


def batched_align_block_size(
    max_num_tokens: int, block_size: int, expert_num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Give expert e its slots e * max_num_tokens + i, i < expert_num_tokens[e], padded to whole blocks.

    The sentinel is E_l * max_num_tokens.
    """
    sentinel = len(expert_num_tokens) * max_num_tokens
    size = len(expert_num_tokens) * cdiv(max_num_tokens, block_size) * block_size
    slots: list[int] = []
    blocks: list[int] = []
    for e, count in enumerate(np.clip(expert_num_tokens, 0, max_num_tokens)):
        num_blocks = cdiv(int(count), block_size)
        slots += [e * max_num_tokens + i for i in range(count)]
        slots += [sentinel] * (num_blocks * block_size - int(count))
        blocks += [e] * num_blocks
    sorted_token_ids = np.full(size, sentinel, np.int32)
    sorted_token_ids[: len(slots)] = slots
    expert_ids = np.full(size // block_size, -1, np.int32)
    expert_ids[: len(blocks)] = blocks
    return sorted_token_ids, expert_ids, np.array([len(slots)], np.int32)


def naive_block_assignment(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """One block a pair: its expert, -1 if it is skipped, (T*k,) int32."""
    return local_experts(topk_ids, num_experts, None).reshape(-1).astype(np.int32)


def count_expert_num_tokens(
    topk_ids: np.ndarray, num_local_experts: int, expert_map: np.ndarray | None = None
) -> np.ndarray:
    """How many pairs each local expert gets, (E_l,) int32."""
    experts = local_experts(topk_ids, num_local_experts, expert_map)
    return np.array([np.count_nonzero(experts == e) for e in range(num_local_experts)], np.int32)
