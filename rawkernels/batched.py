"""
Tokens in the batched format: one shelf of slots for each local expert.

The slots come from the sorted order: the i-th pair of an expert is i rows after the expert's first.
"""

import numpy as np

from cumoe.rawkernels import _copy, _numba, permute


def assign_slots(topk_ids, expert_map, expert_num_tokens, slots, first_expert, capacity):
    """
    Fill `slots` int32 (T, k) and `expert_num_tokens` int32 (E_l,).

    Local experts are first_expert + 0..E_l-1, or those that `expert_map` (E,) names if it has entries. A
    pair of no local expert, or beyond an expert's `capacity`, has slot -1; counts are held to `capacity`.
    """
    import cupy as cp

    num_pairs, num_local = topk_ids.size, expert_num_tokens.size
    offsets, dense, scratch = permute.sorted_scratch(num_pairs, num_local, 0)
    inv_permuted_idx = cp.empty(num_pairs, np.int32)
    permute.sort_shifted(topk_ids, first_expert, expert_map, offsets, dense, inv_permuted_idx, scratch)
    _numba.kernel("_layout_kernels.py", "shelve_pairs", ID=topk_ids.dtype.name)(
        *permute.grid_of(max(num_pairs, num_local)),
        topk_ids,
        first_expert,
        expert_map,
        expert_map.size,
        offsets,
        inv_permuted_idx,
        expert_num_tokens,
        slots,
        num_pairs,
        num_local,
        capacity,
        overlap=True,
    )


def scatter_rows(source, slots, out):
    """``out[slots[t, j]] = source[t]``, bytes both; slots below 0 are skipped."""
    if slots.size > 0 and source.shape[1] > 0:
        _copy.rows(source, slots, out, slots.shape[1], scatter=True)
