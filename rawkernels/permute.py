"""
Sort the (token, choice) pairs by expert, list the tiles of the sorted rows, and gather rows into that order.

The kernels are in _few_kernels.py, _sort_kernels.py and, for very many experts, _wide_kernels.py; the tiles of given
offsets in _tile_kernels.py, the rows in _copy_kernels.py.
"""

import functools
from typing import NamedTuple

import numpy as np

from cumoe.rawkernels import _copy, _numba

_WARP = 32
_MOST_THREADS = _numba.MAX_THREADS
_FEW_PAIRS = 32  # as many lanes sort in registers
_SHARED_WORDS = 24 << 10  # of a block: every GPU has as many
_SUMS_WORDS = 64  # of them, as in _sort_kernels.py
_ROUNDS = 4  # of a warp, up to which one block is faster than two launches
_MOST_BLOCKS = 128  # each reads what all have counted
_DIGIT_BITS = 10
_HEAD = 4  # words before the first tile of a schedule, and words of a tile
_LISTING_BLOCKS = 16
_THREADS = 256  # of a block of the kernels without collectives of a block


def sort_by_expert(
    topk_ids, expert_map, expert_first_token_offset, permuted_idx, inv_permuted_idx, schedule=None, block_rows=0
):
    """
    Fill the three outputs from `topk_ids` (T, k) and, for `block_rows` > 0, `schedule` with their tiles.

    `schedule` int32 (`schedule_size`,), aligned to 16 bytes: {number of tiles, 0, 0, 0}, then {expert, first row,
    rows, 0} for each tile, at most `block_rows` rows of one expert, in even parts; experts and rows ascend. Behind
    the tiles the sort finds the memory it needs; where there is none it asks for its own.
    """
    outputs = expert_first_token_offset, permuted_idx, inv_permuted_idx, schedule
    sort_shifted(topk_ids, 0, expert_map, *outputs, block_rows, even=True)


def sort_shifted(
    topk_ids,
    first_expert,
    expert_map,
    expert_first_token_offset,
    permuted_idx,
    inv_permuted_idx,
    schedule=None,
    block_rows=0,
    even=False,
):
    """`sort_by_expert` for ids that count from `first_expert`; all tiles of an expert but the last full, or even."""
    num_pairs, num_local = topk_ids.size, expert_first_token_offset.size - 1
    ids = topk_ids, first_expert, expert_map, expert_map.size
    outputs = expert_first_token_offset, permuted_idx, inv_permuted_idx, schedule
    sizes = num_pairs, num_local, block_rows
    plan = plan_sort(num_pairs, num_local)
    if plan.few:
        kernel = _numba.kernel("_few_kernels.py", "sort_few", ID=topk_ids.dtype.name)
        kernel(1, plan.threads, *ids, *outputs, *sizes, overlap=True)
        return
    scratch = _scratch(schedule, *sizes)
    if plan.wide:
        _sort_wide(ids, outputs, sizes, even, scratch)
        return
    if plan.blocks > 1:
        _kernel("count_pairs", topk_ids)(
            plan.blocks,
            plan.threads,
            *ids,
            scratch,
            num_pairs,
            num_local,
            plan.per_warp * plan.sorters,
            shared=4 * (num_local + 1),
            overlap=True,
        )
    _kernel("sort_pairs", topk_ids, SEVERAL=plan.blocks > 1)(
        plan.blocks,
        plan.threads,
        *ids,
        scratch,
        *outputs,
        *sizes,
        int(even),
        plan.sorters,
        plan.per_warp,
        shared=plan.shared,
        overlap=True,
    )


def schedule_size(num_pairs, num_experts, block_rows):
    """Elements of the `schedule` of `sort_by_expert`: tiles, if `block_rows` > 0, and what the sort needs."""
    return _list_words(num_pairs, num_experts, block_rows) + _scratch_words(num_pairs, num_experts)


def list_tiles(expert_first_token_offset, schedule, block_rows):
    """Fill the tiles of `schedule` from given offsets, int64 (E + 1,); nothing if `block_rows` is 0."""
    if block_rows > 0:
        num_local = expert_first_token_offset.size - 1
        list_tiles_of(expert_first_token_offset, True, num_local, schedule, block_rows, 0, even=True)


def list_tiles_of(counts, offsets, num_local, schedule, block_rows, capacity, even=False):
    """`list_tiles` from offsets, or from the counts of shelves of `capacity` rows."""
    threads = min(_MOST_THREADS, _whole_warps(num_local + 1))
    _numba.kernel("_tile_kernels.py", "list_tiles", COUNT=counts.dtype.name, OFFSETS=offsets)(
        _LISTING_BLOCKS, threads, counts, schedule, num_local, block_rows, int(even), capacity, overlap=True
    )


class SortPlan(NamedTuple):
    """How many warps sort, and how many pairs each."""

    few: bool  # by sort_few
    wide: bool  # digit by digit
    blocks: int = 1
    threads: int = 0
    sorters: int = 0  # warps of a block that have pairs
    per_warp: int = 0
    shared: int = 0  # bytes of a block


@functools.lru_cache(maxsize=4096)
def plan_sort(num_pairs, num_local):
    """Choose the kernels for so many pairs and experts."""
    bins = num_local + 1
    threads = _WARP + _whole_warps(bins)
    if num_pairs <= _FEW_PAIRS and threads <= _MOST_THREADS:
        return SortPlan(few=True, wide=False, threads=threads)
    most = (_SHARED_WORDS - _SUMS_WORDS) // bins - 2  # a warp takes a count for each bin, the block two more
    if most < 1:
        return SortPlan(few=False, wide=True)
    warps = _MOST_THREADS // _WARP
    wanted = max(1, -(-num_pairs // _WARP))
    sorters = min(warps, 1 << (most.bit_length() - 1), 1 << (wanted - 1).bit_length())
    round_pairs = _WARP * sorters
    blocks = 1 if num_pairs <= _ROUNDS * round_pairs else min(_MOST_BLOCKS, -(-num_pairs // round_pairs))
    per_warp = _WARP * max(1, -(-num_pairs // (round_pairs * blocks)))
    blocks = max(1, -(-num_pairs // (per_warp * sorters)))  # none without a pair
    threads = _MOST_THREADS if blocks > 1 else max(round_pairs, min(_MOST_THREADS, _whole_warps(bins)))
    return SortPlan(False, False, blocks, threads, sorters, per_warp, 4 * (_SUMS_WORDS + (sorters + 2) * bins))


def _whole_warps(threads):
    return -(-threads // _WARP) * _WARP


def _list_words(num_pairs, num_experts, block_rows):
    """Words of the head and of the most tiles that there can be."""
    if block_rows == 0:
        return 0
    return _HEAD + _HEAD * (min(num_pairs, num_experts) + num_pairs // block_rows)


def _scratch_words(num_pairs, num_local):
    plan = plan_sort(num_pairs, num_local)
    if plan.wide:
        digits = 1 << _DIGIT_BITS
        return 2 * (digits + 2) + 3 * _aligned(num_pairs) + _scratch_words(num_pairs, digits)
    if plan.blocks <= 1:
        return 0
    rounds = -(-num_pairs // (_WARP * plan.sorters))
    return min(_MOST_BLOCKS, rounds) * (num_local + 1)  # at least plan.blocks, and enough for fewer pairs too


def _aligned(words):
    return -(-words // 4) * 4


def _scratch(schedule, num_pairs, num_local, block_rows):
    """What lies behind the tiles, or new memory, or None if none is needed."""
    words, start = _scratch_words(num_pairs, num_local), _list_words(num_pairs, num_local, block_rows)
    if words == 0:
        return None
    if schedule is not None and schedule.size >= start + words:
        return schedule[start:]
    import cupy as cp

    return cp.empty(words, np.int32)


def _kernel(name, topk_ids, **constants):
    return _numba.kernel("_sort_kernels.py", name, ID=topk_ids.dtype.name, **constants)


def _sort_wide(ids, outputs, sizes, even, scratch):
    """Sort by one digit of the expert after the other, the lowest first; each sort keeps the order before."""
    offsets, permuted_idx, inv_permuted_idx, schedule = outputs
    num_pairs, num_local, block_rows = sizes
    digits, length = 1 << _DIGIT_BITS, _aligned(num_pairs)
    digit_offsets = scratch[: 2 * (digits + 1)].view(np.int64)
    start = 2 * (digits + 2)
    keys, by_digit, other = (scratch[start + i * length : start + i * length + num_pairs] for i in range(3))
    inner = scratch[start + 3 * length :]
    passes = max(1, -(-(num_local - 1).bit_length() // _DIGIT_BITS))
    grid, order, constants = grid_of(num_pairs), None, {"ID": ids[0].dtype.name}
    for i in range(passes):
        new_order = permuted_idx if (passes - i) % 2 else other  # the last one is the result
        digit = num_pairs, num_local, i * _DIGIT_BITS, digits - 1
        kernel = _numba.kernel("_wide_kernels.py", "take_digits", FIRST=i == 0, **constants)
        kernel(*grid, *ids, order, keys, *digit, overlap=True)
        sort_by_expert(keys, keys[:0], digit_offsets, by_digit, inv_permuted_idx, inner)
        kernel = _numba.kernel("_wide_kernels.py", "follow", FIRST=i == 0)
        kernel(*grid, order, by_digit, new_order, num_pairs, overlap=True)
        order = new_order
    kernel = _numba.kernel("_wide_kernels.py", "finish", **constants)
    kernel(*grid_of(max(num_pairs, num_local + 1)), *ids, order, offsets, inv_permuted_idx, *sizes[:2], overlap=True)
    if block_rows > 0:
        list_tiles_of(offsets, True, num_local, schedule, block_rows, 0, even)


def grid_of(items):
    """Blocks and threads for kernels with a thread an item; they go in steps of the grid."""
    return max(1, min(-(-items // _THREADS), 1 << 16)), _THREADS


def sort_by_expert_aligned(
    topk_ids, expert_map, expert_num_tokens, m_indices, permuted_idx, inv_permuted_idx, alignment
):
    """
    Sort like `sort_by_expert`, each expert's rows starting at a multiple of `alignment`.

    `m_indices` int32 (M_sum,) is the expert of each row, -1 in padding; `permuted_idx` int32 (M_sum,) its
    pair, T*k in padding; `expert_num_tokens` int32 (E_l,) how many rows of an expert are not padding.
    """
    num_pairs, num_local = topk_ids.size, expert_num_tokens.size
    offsets, dense, schedule = sorted_scratch(num_pairs, num_local, alignment)
    sort_shifted(topk_ids, 0, expert_map, offsets, dense, inv_permuted_idx, schedule, alignment)
    _numba.kernel("_layout_kernels.py", "pad_rows")(
        *grid_of(max(m_indices.size, num_local)),
        schedule,
        dense,
        offsets,
        expert_num_tokens,
        m_indices,
        permuted_idx,
        inv_permuted_idx,
        m_indices.size,
        num_pairs,
        num_local,
        alignment,
        overlap=True,
    )


def sorted_scratch(num_pairs, num_local, block_rows):
    """Memory for the dense order on the way to another layout: offsets, permuted_idx, schedule."""
    import cupy as cp

    offsets, dense = cp.empty(num_local + 1, np.int64), cp.empty(num_pairs, np.int32)
    return offsets, dense, cp.empty(schedule_size(num_pairs, num_local, block_rows), np.int32)


def gather_rows(source, permuted_idx, out, top_k):
    """``out[r] = source[permuted_idx[r] // top_k]``, bytes both; a row without a pair is left as it is."""
    if out.size > 0:
        _copy.rows(source, permuted_idx, out, top_k, scatter=False)
