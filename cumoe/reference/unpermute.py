"""Rows added up per token, in float64, with a bound on the error of any honest float32 sum."""

import numpy as np

from cumoe.reference.experts import unknown_is_infinite
from cumoe.reference.rounding import FLUSH, Bounded, gamma, rounded


def unpermute(
    y: np.ndarray,
    topk_weights: np.ndarray | None,
    inv_permuted_idx: np.ndarray,
    num_rows: int | None = None,
) -> Bounded:
    """``out[t] = sum over j of topk_weights[t, j] * y[inv_permuted_idx[t, j]]``, rows outside 0..num_rows-1 skipped."""
    num_rows = len(y) if num_rows is None else min(num_rows, len(y))
    used = (inv_permuted_idx >= 0) & (inv_permuted_idx < num_rows)
    x = np.zeros((*inv_permuted_idx.shape, y.shape[1]), y.dtype)
    x[used] = y[inv_permuted_idx[used]]
    return weighted_sum(x, topk_weights, used)


def weighted_sum(x: np.ndarray, topk_weights: np.ndarray | None, used: np.ndarray) -> Bounded:
    """``out[t] = sum over j of topk_weights[t, j] * x[t, j]`` where `used`; rounded to the dtype of `x` at the end."""
    num_tokens, top_k, hidden_size = x.shape
    weights = np.ones(used.shape) if topk_weights is None else topk_weights.astype(np.float64)
    value = np.zeros((num_tokens, hidden_size))
    size = np.zeros_like(value)
    with np.errstate(invalid="ignore", over="ignore"):
        for j in range(top_k):
            # a skipped choice adds nothing, not even 0 * inf
            term = np.where(used[:, j, None], weights[:, j, None] * x[:, j].astype(np.float64), 0.0)
            value += term
            size += np.abs(term)
        error = gamma(top_k) * size + top_k * FLUSH
        return Bounded(value, unknown_is_infinite(rounded(value, error, x.dtype)))


def used_choices(num_tokens: int, top_k: int, topk_ids: np.ndarray | None, expert_map: np.ndarray | None) -> np.ndarray:
    """Which choices count: id >= 0 and, with a map, inside it and mapped to >= 0; all without ids."""
    if topk_ids is None:
        return np.ones((num_tokens, top_k), bool)
    ids = topk_ids.astype(np.int64)
    if expert_map is None:
        return ids >= 0
    inside = (ids >= 0) & (ids < len(expert_map))
    return inside & (expert_map[np.where(inside, ids, 0)] >= 0)
