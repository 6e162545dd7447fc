"""Tokens on shelves: slot e * capacity + i holds the i-th pair of local expert e, in token order."""

import numpy as np

from cumoe.reference.experts import local_experts


def assign_slots(
    topk_ids: np.ndarray,
    num_local_experts: int,
    capacity: int,
    first_expert: int = 0,
    expert_map: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Slot of each pair, (T, k) int32, -1 if it has none, and `expert_num_tokens`, (E_l,) int32.

    A pair has no slot if its expert is not local or already has `capacity` pairs.
    """
    experts = local_experts(topk_ids.astype(np.int64) - first_expert, num_local_experts, expert_map)
    slots = np.full(topk_ids.shape, -1, np.int32)
    expert_num_tokens = np.zeros(num_local_experts, np.int32)
    for e in range(num_local_experts):
        tokens, choices = np.nonzero(experts == e)  # pairs in ascending order
        expert_num_tokens[e] = min(len(tokens), capacity)
        slots[tokens[:capacity], choices[:capacity]] = e * capacity + np.arange(expert_num_tokens[e])
    return slots, expert_num_tokens


def scatter_rows(source: np.ndarray, slots: np.ndarray, num_local_experts: int, capacity: int) -> np.ndarray:
    """``out[e, i] = source[t]`` for the pair (t, j) of slot e * capacity + i; zero in unused slots."""
    out = np.zeros((num_local_experts * capacity, source.shape[1]), source.dtype)
    tokens, choices = np.nonzero(slots >= 0)
    out[slots[tokens, choices]] = source[tokens]
    return out.reshape(num_local_experts, capacity, source.shape[1])
