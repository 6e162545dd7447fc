"""
Kernels that sort the (token, choice) pairs by expert: a counting sort, stable, the same on every run.

    offsets[e] = how many pairs have a local expert below e
    row of p   = offsets[e] + how many pairs below p have the expert e of p
    permuted_idx[row of p] = p,  inv_permuted_idx[p] = row of p

Shapes     P = T * k pairs, E local experts; ids (P,), offsets (E + 1,) int64, permuted_idx and inv_permuted_idx
           (P,) int32; schedule as in _tile_kernels.py, if block_rows > 0
Skipped    pairs are those of bin E: they take the last rows, as P there and as -1 in inv_permuted_idx
Work       each of `sorters` warps a block has `per_warp` pairs in a row; it counts them by bin in its own part of
           shared memory, the counts are summed up over bins, blocks and warps, and the warp goes through its
           pairs again. One block needs no other kernel; several get the counts of all blocks from count_pairs,
           and each sums them up for itself. Up to 32 pairs are sorted by _few_kernels.py.
Constants  ID type of an id: int32, uint32, int64; SEVERAL blocks, or one
Launched   by permute.py, which trusts its caller; blocks are whole warps, shared memory as permute.py counts it
"""

import numpy as np

from cumoe.rawkernels._device import (
    Ids,
    Int32,
    Int32s,
    Int64s,
    add_to,
    count_below,
    count_bits,
    cuda,
    divide,
    inlined,
    keep_rolled,
    keep_small,
    let_next_start,
    pointer,
    same_in_warp,
    store_four,
    sync_warp,
    wait_for_previous,
)
from cumoe.rawkernels._tile_kernels import sum_before, sum_of_block, write_tiles

WARP = 32
SUMS_WORDS = 64
SEVERAL = True


@inlined
def local_expert(expert, expert_map, num_global, num_local):
    """The local number of a global expert id, `num_local` for one that is skipped."""
    local = np.int64(expert)
    if num_global > 0:
        local = np.int64(-1)
        if expert >= 0 and expert < num_global:
            local = np.int64(expert_map[expert])
    if local < 0 or local >= num_local:
        local = np.int64(num_local)
    return local


@inlined
def bin_of(pair, ids, first_expert, expert_map, num_global, num_pairs, num_local):
    """The local expert of a pair, `num_local` if it is skipped, `num_local + 1` after the last pair."""
    if pair < num_pairs:
        return local_expert(np.int64(ids[pair]) - first_expert, expert_map, num_global, num_local)
    return np.int64(num_local) + 1


def count_pairs(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    counts: Int32s,
    num_pairs: Int32,
    num_local: Int32,
    per_block: Int32,
):
    """``counts[block, e]`` = pairs of bin e among the `per_block` pairs of a block; (blocks, E + 1)."""
    keep_small()
    thread, lane, bins = cuda.threadIdx.x, cuda.threadIdx.x & 31, num_local + 1
    found = pointer(cuda.shared.array(0, np.int32))
    e = np.int64(thread)
    while e < bins:
        keep_rolled()
        found[e] = 0
        e += cuda.blockDim.x
    cuda.syncthreads()
    wait_for_previous()
    let_next_start()
    begin = np.int64(cuda.blockIdx.x) * per_block
    end = min(begin + per_block, num_pairs)
    base = begin + thread - lane
    while base < end:
        keep_rolled()
        expert = bin_of(base + lane, ids, first_expert, expert_map, num_global, num_pairs, num_local)
        peers = same_in_warp(expert)
        if expert < bins and count_below(peers) == 0:  # one lane for each bin
            add_to(found, expert, count_bits(peers))
        base += cuda.blockDim.x
    cuda.syncthreads()
    e = np.int64(thread)
    while e < bins:
        keep_rolled()
        counts[cuda.blockIdx.x * np.int64(bins) + e] = found[e]
        e += cuda.blockDim.x


@inlined
def counted(counts, block, bins, e):
    """What a block has counted in a bin, 0 after the last block."""
    return np.int64(counts[block * bins + e]) if block < cuda.gridDim.x else np.int64(0)


@inlined
def if_earlier(count, block):
    """The count of a block before this one, else 0."""
    return count if block < cuda.blockIdx.x else np.int64(0)


@inlined
def add_counts(counts, rows, before, total, bins):
    """Sum the counts of the blocks before this one, and of all, for each bin; threads share a bin's blocks."""
    step = max(np.int64(1), divide(cuda.blockDim.x, bins))
    part = np.int64(cuda.threadIdx.x)
    while part < step * bins:
        keep_rolled()
        block = divide(part, bins)
        e = part - block * bins
        found, earlier = np.int64(0), np.int64(0)
        while block < cuda.gridDim.x:  # eight loads at once, so that they overlap
            keep_rolled()
            a, b = counted(counts, block, bins, e), counted(counts, block + step, bins, e)
            c, d = counted(counts, block + 2 * step, bins, e), counted(counts, block + 3 * step, bins, e)
            f, g = counted(counts, block + 4 * step, bins, e), counted(counts, block + 5 * step, bins, e)
            h, i = counted(counts, block + 6 * step, bins, e), counted(counts, block + 7 * step, bins, e)
            found += a + b + c + d + f + g + h + i
            earlier += if_earlier(a, block) + if_earlier(b, block + step)
            earlier += if_earlier(c, block + 2 * step) + if_earlier(d, block + 3 * step)
            earlier += if_earlier(f, block + 4 * step) + if_earlier(g, block + 5 * step)
            earlier += if_earlier(h, block + 6 * step) + if_earlier(i, block + 7 * step)
            block += 8 * step
        add_to(rows, before + e, earlier)
        add_to(rows, total + e, found)
        part += cuda.blockDim.x


@inlined
def stack_counts(rows, at, bins, sorters):
    """Turn each warp's count of a bin, the first one at `at`, into the sum over the warps before; return the sum."""
    total, end = np.int64(0), at + sorters * bins
    while at + 3 * bins < end:  # four loads at once, so that they overlap
        keep_rolled()
        a, b, c, d = rows[at], rows[at + bins], rows[at + 2 * bins], rows[at + 3 * bins]
        rows[at] = total
        rows[at + bins] = total + a
        rows[at + 2 * bins] = total + a + b
        rows[at + 3 * bins] = total + a + b + c
        total += a + b + c + d
        at += 4 * bins
    while at < end:
        keep_rolled()
        count = rows[at]
        rows[at] = total
        total += count
        at += bins
    return total


def sort_pairs(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    counts: Int32s,
    offsets: Int64s,
    permuted_idx: Int32s,
    inv_permuted_idx: Int32s,
    schedule: Int32s,
    num_pairs: Int32,
    num_local: Int32,
    block_rows: Int32,
    even: Int32,
    sorters: Int32,
    per_warp: Int32,
):
    """Sort the pairs; with several blocks `counts` holds what count_pairs found for blocks of the same pairs."""
    keep_small()
    thread, lane, warp = cuda.threadIdx.x, cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    bins = np.int64(num_local) + 1
    sums = pointer(cuda.shared.array(0, np.int64))  # (32,)
    rows = pointer(cuda.shared.array(0, np.int32))  # behind them (sorters, bins), then two of (bins,)
    first = SUMS_WORDS + sorters * bins
    own, total = SUMS_WORDS + warp * bins, first + bins
    e = np.int64(lane)
    while e < bins and warp < sorters:
        keep_rolled()
        rows[own + e] = 0
        e += WARP
    if SEVERAL:
        e = np.int64(thread)
        while e < 2 * bins:
            keep_rolled()
            rows[first + e] = 0
            e += cuda.blockDim.x
        cuda.syncthreads()
    sync_warp()
    wait_for_previous()
    let_next_start()

    begin = (np.int64(cuda.blockIdx.x) * sorters + warp) * per_warp
    end = min(begin + per_warp, np.int64(num_pairs)) if warp < sorters else begin
    base = begin
    while base < end:
        keep_rolled()
        expert = bin_of(base + lane, ids, first_expert, expert_map, num_global, num_pairs, num_local)
        peers = same_in_warp(expert)
        if expert < bins and count_below(peers) == 0:  # one lane for each bin
            rows[own + expert] += count_bits(peers)
        sync_warp()
        base += WARP
    if SEVERAL:
        add_counts(counts, rows, first, total, bins)
    cuda.syncthreads()

    reached, base = np.int64(0), np.int64(0)  # tiles in the upper half, rows in the lower, as in all the sums
    while base < bins:
        keep_rolled()
        e = base + thread
        count, tiles, before = np.int64(0), np.int64(0), np.int64(0)
        if e < bins:
            count = stack_counts(rows, SUMS_WORDS + e, bins, sorters)
            if SEVERAL:
                before, count = np.int64(rows[first + e]), np.int64(rows[total + e])
        if block_rows > 0 and e < num_local:
            tiles = divide(count + block_rows - 1, block_rows)
        start = reached + sum_before(sums, (tiles << 32) + count)
        row, tile = start & 0xFFFFFFFF, start >> 32
        if e < bins:
            rows[first + e] = row + before
            if cuda.blockIdx.x == 0:
                offsets[e] = row
        write_tiles(schedule, e, row, count, tile, tiles, block_rows, even)
        if block_rows > 0 and e == num_local and cuda.blockIdx.x == 0:
            store_four(schedule, 0, tile, 0, 0, 0)
        base += cuda.blockDim.x
        if base < bins:
            reached += sum_of_block(sums)
    cuda.syncthreads()

    base = begin
    while base < end:
        keep_rolled()
        pair = base + lane
        expert = bin_of(pair, ids, first_expert, expert_map, num_global, num_pairs, num_local)
        peers = same_in_warp(expert)
        below = count_below(peers)
        row = np.int64(below)
        if expert < bins:
            row += rows[first + expert] + rows[own + expert]
        sync_warp()  # all have read the row that the first of them moves on
        if expert < bins and below == 0:
            rows[own + expert] += count_bits(peers)
        sync_warp()
        if expert < num_local:
            permuted_idx[row] = pair
            inv_permuted_idx[pair] = row
        elif expert < bins:
            permuted_idx[row] = num_pairs
            inv_permuted_idx[pair] = -1
        base += WARP
