"""
The kernel that sorts up to 32 (token, choice) pairs by expert, as _sort_kernels.py does, in one block.

    row of p     how many pairs have a lower expert, or the same one and a lower number
    offsets[e]   how many pairs have an expert below e
    tiles        a pair that is a multiple of block_rows after its expert's first starts one

Shapes     as in _sort_kernels.py and _tile_kernels.py
Work       every warp holds all pairs, one a lane: warp 0 finds rows and tiles, thread 32 + e finds offsets[e]
Constants  ID type of an id: int32, uint32, int64
Launched   by permute.py, which trusts its caller, with 32 threads and one for each offset, in whole warps
"""

import numpy as np

from cumoe.rawkernels._device import (
    Ids,
    Int32,
    Int32s,
    Int64s,
    count_below,
    count_bits,
    cuda,
    divide,
    from_lane,
    inlined,
    is_less,
    keep_rolled,
    keep_small,
    let_next_start,
    or_of_warp,
    same_in_warp,
    store_four,
    wait_for_previous,
)
from cumoe.rawkernels._sort_kernels import bin_of

WARP = 32


@inlined
def less_of_eight(expert, lane, bound):
    """How many of the eight lanes from `lane` on hold an expert below `bound`."""
    count = is_less(from_lane(expert, lane), bound) + is_less(from_lane(expert, lane + 1), bound)
    count += is_less(from_lane(expert, lane + 2), bound) + is_less(from_lane(expert, lane + 3), bound)
    count += is_less(from_lane(expert, lane + 4), bound) + is_less(from_lane(expert, lane + 5), bound)
    count += is_less(from_lane(expert, lane + 6), bound) + is_less(from_lane(expert, lane + 7), bound)
    return count


def sort_few(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    offsets: Int64s,
    permuted_idx: Int32s,
    inv_permuted_idx: Int32s,
    schedule: Int32s,
    num_pairs: Int32,
    num_local: Int32,
    block_rows: Int32,
):
    """Sort the pairs."""
    keep_small()
    thread, lane = cuda.threadIdx.x, cuda.threadIdx.x & 31
    wait_for_previous()
    let_next_start()
    expert = bin_of(lane, ids, first_expert, expert_map, num_global, num_pairs, num_local)
    bound = expert if thread < WARP else np.int64(thread - WARP)
    before, first = np.int64(0), np.int64(0)
    while first < num_pairs:
        keep_rolled()
        before += less_of_eight(expert, first, bound)
        first += 8
    if thread >= WARP:
        if bound <= num_local:
            offsets[bound] = before
        return
    peers = same_in_warp(expert)
    within = count_below(peers)
    row, local = before + within, expert < num_local
    if lane < num_pairs:
        permuted_idx[row] = lane if local else num_pairs
        inv_permuted_idx[lane] = row if local else -1
    if block_rows > 0:
        starts = local and divide(within, block_rows) * block_rows == within
        own = np.int64(1) << row
        tiles = or_of_warp(own if starts else 0)  # a bit for each row where a tile starts
        if starts:
            tile = count_bits(tiles & (own - 1))
            store_four(schedule, 1 + tile, expert, row, min(block_rows, count_bits(peers) - within), 0)
        if lane == 0:
            store_four(schedule, 0, count_bits(tiles), 0, 0, 0)
