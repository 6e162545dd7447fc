"""
Kernels that bring sorted pairs into other layouts: rows padded to whole blocks, shelves, plain counts.

    pad_rows      row tile * alignment + i takes the pair that is i-th in the tile, or padding
    pad_blocks    the same as blocks of pair numbers, each with the label of its expert
    pad_shelves   the same for the used slots of shelves
    shelve_pairs  slot = e * capacity + (row - offsets[e]) of a pair of expert e, -1 beyond the capacity
    count_tokens  pairs of each expert;  name_experts  the expert of each pair

Shapes     P pairs, E local experts; tiles as in _tile_kernels.py, `dense` (P,) the pairs in sorted order
Work       a thread for each slot, row, block or pair, in steps of the grid
Constants  ID type of an id, as in _sort_kernels.py
Launched   by permute.py, align.py and batched.py, which trust their callers
"""

import numpy as np

from cumoe.rawkernels._device import (
    Ids,
    Int32,
    Int32s,
    Int64,
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
    same_in_warp,
    wait_for_previous,
)
from cumoe.rawkernels._sort_kernels import bin_of


@inlined
def first_index():
    """The own number among the threads of the grid."""
    return np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x


@inlined
def index_step():
    """How many threads the grid has."""
    return np.int64(cuda.gridDim.x) * cuda.blockDim.x


@inlined
def position_in_tile(schedule, slot, block_rows):
    """The tile of a slot, and the row that it holds, -1 if it holds none."""
    tile = divide(slot, block_rows)
    i = slot - tile * block_rows
    row = np.int64(-1)
    if tile < schedule[0] and i < schedule[4 * tile + 6]:
        row = schedule[4 * tile + 5] + i
    return tile, row


def pad_rows(
    schedule: Int32s,
    dense: Int32s,
    offsets: Int64s,
    expert_num_tokens: Int32s,
    m_indices: Int32s,
    permuted_idx: Int32s,
    inv_permuted_idx: Int32s,
    num_rows: Int64,
    num_pairs: Int32,
    num_local: Int32,
    alignment: Int32,
):
    """Rows of each expert from a multiple of `alignment` on; `inv_permuted_idx` of skipped pairs stays."""
    keep_small()
    wait_for_previous()
    let_next_start()
    row = first_index()
    while row < num_rows:
        keep_rolled()
        tile, sorted_row = position_in_tile(schedule, row, alignment)
        expert, pair = np.int64(-1), np.int64(num_pairs)
        if sorted_row >= 0:
            expert, pair = np.int64(schedule[4 * tile + 4]), np.int64(dense[sorted_row])
            inv_permuted_idx[pair] = row
        m_indices[row] = expert
        permuted_idx[row] = pair
        row += index_step()
    e = first_index()
    while e < num_local:
        keep_rolled()
        expert_num_tokens[e] = offsets[e + 1] - offsets[e]
        e += index_step()


def pad_blocks(
    schedule: Int32s,
    dense: Int32s,
    inv_permuted_idx: Int32s,
    labels: Int32s,
    sorted_token_ids: Int32s,
    expert_ids: Int32s,
    num_tokens_post_padded: Int32s,
    scatter_idx: Int32s,
    num_slots: Int64,
    num_blocks: Int64,
    num_scattered: Int64,
    num_labels: Int32,
    num_pairs: Int32,
    block_size: Int32,
):
    """Blocks of pairs; `labels` (E,) rename the experts of the blocks if there are any."""
    keep_small()
    wait_for_previous()
    let_next_start()
    used = np.int64(schedule[0])
    slot = first_index()
    if slot == 0:
        num_tokens_post_padded[0] = used * block_size
    while slot < num_slots:
        keep_rolled()
        _, row = position_in_tile(schedule, slot, block_size)
        pair = np.int64(num_pairs)
        if row >= 0:
            pair = np.int64(dense[row])
        sorted_token_ids[slot] = pair
        slot += index_step()
    block = first_index()
    while block < num_blocks:
        keep_rolled()
        expert = np.int64(-1)
        if block < used:
            expert = np.int64(schedule[4 * block + 4])
            if num_labels > 0:
                expert = np.int64(labels[expert])
        expert_ids[block] = expert
        block += index_step()
    pair = first_index()
    while pair < num_scattered:
        keep_rolled()
        scatter_idx[pair] = pair if inv_permuted_idx[pair] >= 0 else -1
        pair += index_step()


def pad_shelves(
    schedule: Int32s,
    sorted_token_ids: Int32s,
    expert_ids: Int32s,
    num_tokens_post_padded: Int32s,
    num_slots: Int64,
    num_blocks: Int64,
    sentinel: Int32,
    block_size: Int32,
):
    """Blocks of the used slots of shelves; a row of a tile is a slot here."""
    keep_small()
    wait_for_previous()
    let_next_start()
    used = np.int64(schedule[0])
    slot = first_index()
    if slot == 0:
        num_tokens_post_padded[0] = used * block_size
    while slot < num_slots:
        keep_rolled()
        _, row = position_in_tile(schedule, slot, block_size)
        sorted_token_ids[slot] = row if row >= 0 else sentinel
        slot += index_step()
    block = first_index()
    while block < num_blocks:
        keep_rolled()
        expert = np.int64(-1)
        if block < used:
            expert = np.int64(schedule[4 * block + 4])
        expert_ids[block] = expert
        block += index_step()


def shelve_pairs(
    ids: Ids,
    first_expert: Int32,
    expert_map: Int32s,
    num_global: Int32,
    offsets: Int64s,
    inv_permuted_idx: Int32s,
    expert_num_tokens: Int32s,
    slots: Int32s,
    num_pairs: Int32,
    num_local: Int32,
    capacity: Int32,
):
    """The slot of each pair, and the used slots of each expert."""
    keep_small()
    wait_for_previous()
    let_next_start()
    pair = first_index()
    while pair < num_pairs:
        keep_rolled()
        e = bin_of(pair, ids, first_expert, expert_map, num_global, num_pairs, num_local)
        slot = np.int64(-1)
        if e < num_local:
            place = inv_permuted_idx[pair] - offsets[e]
            if place < capacity:
                slot = e * capacity + place
        slots[pair] = slot
        pair += index_step()
    e = first_index()
    while e < num_local:
        keep_rolled()
        expert_num_tokens[e] = min(offsets[e + 1] - offsets[e], np.int64(capacity))
        e += index_step()


def count_tokens(
    ids: Ids, expert_map: Int32s, num_global: Int32, expert_num_tokens: Int32s, num_pairs: Int32, num_local: Int32
):
    """Add the pairs of each expert to `expert_num_tokens`, which must hold zeros."""
    keep_small()
    wait_for_previous()
    let_next_start()
    lane = cuda.threadIdx.x & 31
    base = first_index() - lane
    while base < num_pairs:  # whole warps
        keep_rolled()
        e = bin_of(base + lane, ids, 0, expert_map, num_global, num_pairs, num_local)
        peers = same_in_warp(e)
        if e < num_local and count_below(peers) == 0:
            add_to(expert_num_tokens, e, count_bits(peers))
        base += index_step()


def name_experts(ids: Ids, expert_map: Int32s, expert_ids: Int32s, num_pairs: Int32, num_local: Int32):
    """``expert_ids[pair]`` = the expert of a pair, -1 if it is skipped."""
    keep_small()
    wait_for_previous()
    let_next_start()
    pair = first_index()
    while pair < num_pairs:
        keep_rolled()
        e = bin_of(pair, ids, 0, expert_map, 0, num_pairs, num_local)
        expert_ids[pair] = e if e < num_local else np.int64(-1)
        pair += index_step()
