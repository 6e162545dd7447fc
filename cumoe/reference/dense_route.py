"""Router weights as a dense (T, E) table and as (T, k) choices."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def topk_from_dense(router_weights: Array, top_k: int) -> tuple[Array, Array]:
    """The k weights of greatest magnitude of each row, equal ones by the lower id, NaN first; no id for a 0."""
    dense = router_weights.astype(np.float32)
    size = np.where(np.isnan(dense), np.inf, np.abs(dense))
    ids = np.argsort(-size, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(size, ids, axis=1) > 0
    return np.where(chosen, np.take_along_axis(dense, ids, axis=1), np.float32(0)), np.where(chosen, ids, -1)


def dense_from_topk(topk_weights: Array, topk_ids: Array, num_experts: int) -> Array:
    """``out[t, topk_ids[t, j]] += topk_weights[t, j]``, choices in order, in float32."""
    out = np.zeros((len(topk_ids), num_experts), np.float32)
    for t, j in np.ndindex(topk_ids.shape):
        if 0 <= topk_ids[t, j] < num_experts:
            out[t, topk_ids[t, j]] += topk_weights[t, j].astype(np.float32)
    return out
