"""Experts that only hand their token on: ids from `num_experts` on."""

from typing import Any

import numpy as np

from cumoe.reference.rounding import FLUSH, Bounded, gamma, rounded

Array = np.ndarray[Any, Any]


def zero_experts(
    hidden_states: Array,
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    copies: bool = True,
    masked_id: int = 0,
) -> tuple[Array, Array, Bounded]:
    """``out[t] = (sum of the special weights of t) * hidden_states[t]``, 0 where the sum is 0; and what is left."""
    special = topk_ids >= num_experts
    weight = np.where(special & copies, topk_weights, 0).astype(np.float64)
    total = weight.sum(axis=1, keepdims=True)
    total_error = gamma(topk_ids.shape[1]) * np.abs(weight).sum(axis=1, keepdims=True)
    x = hidden_states.astype(np.float64)
    with np.errstate(invalid="ignore"):
        value = np.where(total == 0, 0.0, total * x)
        error = np.where(total_error == 0, 0.0, total_error * np.abs(x))
        error = rounded(value, error + FLUSH, np.dtype(np.float32))
        error = np.where(total_error == 0, 0.0, rounded(value, error, hidden_states.dtype))
    left_weights = np.where(special, np.float32(0), topk_weights)
    left_ids = np.where(special, np.array(masked_id).astype(topk_ids.dtype), topk_ids)
    return left_weights, left_ids, Bounded(value, error)
