"""
Kernels that move rows of bytes: a gather by pair, a scatter by slot.

    gather    target[i] = source[index[i] // top_k]    for each row i of the target; none if there is no such row
    scatter   target[index[i]] = source[i // top_k]    for each pair i; none if index[i] < 0

Shapes     source (num_sources, units), target (rows, units), in units of 1 to 16 bytes; index (num_items,) int32
Work       2 ** `lanes` threads share a row; a thread takes every 2 ** lanes-th unit, four of them at once
Constants  UNIT type of a unit: uint8 to uint64, bytes16; SCATTER or gather
Launched   by permute.py and batched.py, which trust their callers
"""

import numpy as np

from cumoe.rawkernels._device import (
    Int32,
    Int32s,
    Int64,
    Units,
    cuda,
    divide,
    keep_rolled,
    keep_small,
    let_next_start,
    load_unit,
    store_unit,
    wait_for_previous,
)

SCATTER = False


def copy_rows(
    source: Units,
    index: Int32s,
    target: Units,
    num_items: Int64,
    num_sources: Int64,
    units: Int64,
    top_k: Int32,
    lanes: Int32,
):
    """Copy the row that each item names."""
    keep_small()
    step = np.int64(1) << lanes
    unit = np.int64(cuda.threadIdx.x & (step - 1))
    item = np.int64(cuda.blockIdx.x) * (cuda.blockDim.x >> lanes) + (cuda.threadIdx.x >> lanes)
    wait_for_previous()
    let_next_start()
    if item >= num_items:
        return
    place = np.int64(index[item])
    if SCATTER:
        there, row = place >= 0, place
        source_row = divide(item, top_k)
    else:
        source_row = divide(place, top_k)
        there, row = source_row < num_sources, item
    if not there:
        return
    source_at, target_at = source_row * units, row * units
    while unit + 3 * step < units:  # four loads at once, so that they overlap
        keep_rolled()
        a = load_unit(source, source_at + unit)
        b = load_unit(source, source_at + unit + step)
        c = load_unit(source, source_at + unit + 2 * step)
        d = load_unit(source, source_at + unit + 3 * step)
        store_unit(target, target_at + unit, a)
        store_unit(target, target_at + unit + step, b)
        store_unit(target, target_at + unit + 2 * step, c)
        store_unit(target, target_at + unit + 3 * step, d)
        unit += 4 * step
    while unit < units:
        keep_rolled()
        store_unit(target, target_at + unit, load_unit(source, source_at + unit))
        unit += step
