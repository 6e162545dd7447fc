"""
Tokens in the batched format: one shelf of slots for each local expert.

    batched[e, i]       the i-th pair of expert e, in token order; e * capacity + i is its slot

Slots at or after an expert's count are neither read nor written.
"""

import numpy as np

from cumoe.cpu import rows as row_loop
from cumoe.cpu._jit import jit
from cumoe.cpu.permute import copy_bytes, local_expert


@jit()
def assign_slots(topk_ids, expert_map, expert_num_tokens, slots, first_expert, capacity):
    """
    Fill `slots` int32 (T, k) and `expert_num_tokens` int32 (E_l,).

    Local experts are first_expert + 0..E_l-1, or those that `expert_map` (E,) names if it has entries. A
    pair of no local expert, or beyond an expert's `capacity`, has slot -1; counts are held to `capacity`.
    """
    expert_num_tokens[:] = 0
    for t in range(topk_ids.shape[0]):
        for j in range(topk_ids.shape[1]):
            expert = np.int64(topk_ids[t, j]) - first_expert
            e = local_expert(expert, expert_map, expert_num_tokens.size)
            slots[t, j] = -1
            if e >= 0 and expert_num_tokens[e] < capacity:
                slots[t, j] = e * capacity + expert_num_tokens[e]
                expert_num_tokens[e] += 1


def scatter_rows(source, slots, out):
    """``out[slots[t, j]] = source[t]``, bytes both; slots below 0 are skipped."""
    # to copy four bytes counts like one number of other row loops
    row_loop.run(_scatter, len(source), slots.size * source.shape[1] // 4, (source, slots, out))


def _scatter(first, last, arguments):
    source, slots, out = arguments
    for t in range(first, last):
        for j in range(slots.shape[1]):
            if slots[t, j] >= 0:
                copy_bytes(source[t], out[slots[t, j]])
