"""
The list of tiles: which rows each block of a grouped product takes, made on the device.

    schedule             {number of tiles, 0, 0, 0}, then {expert, first row, rows, 0} for each tile; int32
    tile i of expert e   rows first + i * height on, at most height; experts ascending
    height               block_rows; with `even`, less where the expert's rows then fall more evenly

Work       every block sums up the tiles of all experts, a thread for each expert, and writes every gridDim-th of
           an expert's tiles
Constants  OFFSETS: the rows of expert e are counts[e]..counts[e + 1] (True), or the first counts[e] of the
           `capacity` rows from e * capacity on; COUNT type of a count: int32, int64
Launched   by permute.py and align.py, which trust their callers; blocks are whole warps
"""

import numpy as np

from cumoe.rawkernels._device import (
    Counts,
    Int32,
    Int32s,
    cuda,
    divide,
    inlined,
    keep_rolled,
    keep_small,
    let_next_start,
    pointer,
    store_four,
    sum_of_warp,
    sum_up_to_lane,
    wait_for_previous,
)

WARP = 32
EVEN_ABOVE = 32  # tiles up to this height are the smallest that any product has
OFFSETS = True


@inlined
def sum_lanes(pair):
    """Sum of two numbers, packed into the halves of an int64, over the warp."""
    return (sum_of_warp(pair >> 32) << 32) + sum_of_warp(pair & 0xFFFFFFFF)


@inlined
def sum_before(sums, value):
    """Sum of a packed pair over the threads of the block below the own one; `sums` (32,) is left full."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    up_to = sum_up_to_lane(value)
    if lane == WARP - 1:
        sums[warp] = up_to
    cuda.syncthreads()
    return up_to - value + sum_lanes(sums[lane] if lane < warp else 0)


@inlined
def sum_of_block(sums):
    """Sum over the block, after `sum_before`, which may be called again."""
    lane = cuda.threadIdx.x & 31
    total = sum_lanes(sums[lane] if lane * WARP < cuda.blockDim.x else 0)
    cuda.syncthreads()
    return total


@inlined
def height_of(count, tiles, block_rows, even):
    """Rows of each of an expert's tiles but the last: few enough for even tiles, in steps of 16, none of them empty."""
    height = np.int64(block_rows)
    if even and tiles > 1 and block_rows > EVEN_ABOVE:
        height = min(height, divide(divide(count + tiles - 1, tiles) + 15, 16) * 16)
    return height


@inlined
def write_tiles(schedule, expert, row, count, tile, tiles, block_rows, even):
    """Write this block's share of an expert's tiles."""
    height = height_of(count, tiles, block_rows, even)
    i = np.int64(cuda.blockIdx.x)
    while i < tiles:
        keep_rolled()
        done = i * height
        store_four(schedule, 1 + tile + i, expert, row + done, min(height, count - done), 0)
        i += cuda.gridDim.x


def list_tiles(counts: Counts, schedule: Int32s, num_local: Int32, block_rows: Int32, even: Int32, capacity: Int32):
    """Write the list from the offsets or the counts of the experts."""
    keep_small()
    sums = pointer(cuda.shared.array(32, np.int64))
    wait_for_previous()
    let_next_start()
    reached, base = np.int64(0), np.int64(0)
    while base <= num_local:
        keep_rolled()
        e = base + cuda.threadIdx.x
        row, count, tiles = np.int64(0), np.int64(0), np.int64(0)
        if e < num_local:
            if OFFSETS:
                row = np.int64(counts[e])
                count = np.int64(counts[e + 1]) - row
            else:
                row = e * capacity
                count = np.int64(min(max(np.int64(counts[e]), 0), capacity))
            tiles = divide(count + block_rows - 1, block_rows)
        tile = reached + sum_before(sums, tiles)
        write_tiles(schedule, e, row, count, tile, tiles, block_rows, even)
        if e == num_local and cuda.blockIdx.x == 0:
            store_four(schedule, 0, tile, 0, 0, 0)
        base += cuda.blockDim.x
        if base <= num_local:
            reached += sum_of_block(sums)
