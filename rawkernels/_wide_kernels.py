"""
Kernels that sort by a number of experts too large for shared memory, a digit at a time, the lowest first.

    for each digit   digits[i] = digit of the expert of pair order[i]; sort i by it (_sort_kernels.py);
                     order[r] = order before[i that is r-th]
    at the end       offsets[e] = first row whose expert is not below e, inv_permuted_idx[order[r]] = r

Shapes     P pairs, E local experts; order (P,) int32 with P in the rows after the last pair; digits (P,) int32
Work       a thread for each row or expert, in steps of the grid
Constants  ID type of an id, as in _sort_kernels.py; FIRST digit: order before is 0, 1, ...
Launched   by permute.py, which trusts its caller
"""

import numpy as np

from cumoe.rawkernels._device import (
    Ids,
    Int32,
    Int32s,
    Int64s,
    keep_rolled,
    keep_small,
    let_next_start,
    wait_for_previous,
)
from cumoe.rawkernels._layout_kernels import first_index, index_step
from cumoe.rawkernels._sort_kernels import bin_of

FIRST = True


def take_digits(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    order: Int32s,
    digits: Int32s,
    num_pairs: Int32,
    num_local: Int32,
    shift: Int32,
    mask: Int32,
):
    """The digit of each row's expert, -1 for a pair that is skipped and for a row without one."""
    keep_small()
    wait_for_previous()
    let_next_start()
    row = first_index()
    while row < num_pairs:
        keep_rolled()
        pair = row if FIRST else np.int64(order[row])
        e = bin_of(pair, ids, first_expert, expert_map, num_global, num_pairs, num_local)
        digits[row] = (e >> shift) & mask if e < num_local else np.int64(-1)
        row += index_step()


def follow(order: Int32s, permuted_idx: Int32s, new_order: Int32s, num_pairs: Int32):
    """``new_order[r] = order[permuted_idx[r]]``."""
    keep_small()
    wait_for_previous()
    let_next_start()
    row = first_index()
    while row < num_pairs:
        keep_rolled()
        before = np.int64(permuted_idx[row])
        pair = before
        if before < num_pairs and not FIRST:
            pair = np.int64(order[before])
        new_order[row] = pair
        row += index_step()


def finish(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    order: Int32s,
    offsets: Int64s,
    inv_permuted_idx: Int32s,
    num_pairs: Int32,
    num_local: Int32,
):
    """Offsets by binary search; the row of each pair, -1 for a pair that is skipped."""
    keep_small()
    wait_for_previous()
    let_next_start()
    i = first_index()
    while i < num_pairs:
        keep_rolled()
        if bin_of(i, ids, first_expert, expert_map, num_global, num_pairs, num_local) >= num_local:
            inv_permuted_idx[i] = -1
        if order[i] < num_pairs:
            inv_permuted_idx[order[i]] = i
        i += index_step()
    e = first_index()
    while e <= num_local:
        keep_rolled()
        low, high = np.int64(0), np.int64(num_pairs)
        while low < high:
            keep_rolled()
            middle = (low + high) >> 1
            found = bin_of(np.int64(order[middle]), ids, first_expert, expert_map, num_global, num_pairs, num_local)
            if found < e:
                low = middle + 1
            else:
                high = middle
        offsets[e] = low
        e += index_step()
