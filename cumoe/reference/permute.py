"""Pairs (token, choice) sorted by expert; pair = t * k + j."""

import numpy as np

from cumoe.reference.experts import local_experts


def sort_by_expert(
    topk_ids: np.ndarray, num_local_experts: int, expert_map: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Rows = the pairs of expert 0 in ascending order, then those of expert 1, and so on.

    Returns `expert_first_token_offset` (E_l + 1,) int64, `permuted_idx` (T*k,) int32 row -> pair, T*k in
    rows without a pair, and `inv_permuted_idx` (T, k) int32 pair -> row, -1 for a skipped pair.
    """
    experts = local_experts(topk_ids, num_local_experts, expert_map).reshape(-1)
    groups = [np.flatnonzero(experts == e) for e in range(num_local_experts)]
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    permuted_idx = np.full(experts.size, experts.size, np.int32)
    permuted_idx[: offsets[-1]] = np.concatenate(groups)
    inv_permuted_idx = np.full(experts.size, -1, np.int32)
    inv_permuted_idx[permuted_idx[: offsets[-1]]] = np.arange(offsets[-1])
    return offsets, permuted_idx, inv_permuted_idx.reshape(topk_ids.shape)


def gather_rows(source: np.ndarray, permuted_idx: np.ndarray, top_k: int) -> np.ndarray:
    """``out[r] = source[permuted_idx[r] // top_k]``, zero where `permuted_idx` names no pair."""
    out = np.zeros((len(permuted_idx), *source.shape[1:]), source.dtype)
    filled = permuted_idx < len(source) * top_k
    out[filled] = source[permuted_idx[filled] // top_k]
    return out


def sort_by_expert_aligned(
    topk_ids: np.ndarray, num_local_experts: int, alignment: int, expert_map: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Rows as in `sort_by_expert`, each expert's padded to a multiple of `alignment`.

    Returns `m_indices` (M_sum,) int32 row -> expert, -1 in padding, `permuted_idx` (M_sum,) int32 row ->
    pair, T*k in padding, `inv_permuted_idx` (T, k) int32 and `expert_num_tokens` (E_l,) int32.
    """
    num_pairs = topk_ids.size
    num_rows = num_pairs + min(num_pairs, num_local_experts) * (alignment - 1)
    num_rows = -(-num_rows // alignment) * alignment
    experts = local_experts(topk_ids, num_local_experts, expert_map).reshape(-1)
    m_indices = np.full(num_rows, -1, np.int32)
    permuted_idx = np.full(num_rows, num_pairs, np.int32)
    inv_permuted_idx = np.full(num_pairs, -1, np.int32)
    expert_num_tokens = np.zeros(num_local_experts, np.int32)
    first = 0
    for e in range(num_local_experts):
        pairs = np.flatnonzero(experts == e)
        rows = first + np.arange(len(pairs))
        m_indices[rows] = e
        permuted_idx[rows] = pairs
        inv_permuted_idx[pairs] = rows
        expert_num_tokens[e] = len(pairs)
        first += -(-len(pairs) // alignment) * alignment
    return m_indices, permuted_idx, inv_permuted_idx.reshape(topk_ids.shape), expert_num_tokens
