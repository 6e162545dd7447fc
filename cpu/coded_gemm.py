"""
Products with panels of codes, which become numbers in the registers of the micro-kernel (`coded_panels`).

Codes are multiplied as they are; scales of groups along K meet the float32 sums of their group. Rows of int8 codes and
integer weights are multiplied in integers, exactly: the unsigned weights are too large by 128 or 8, and what that adds
to a row's sums is taken off where they begin.
"""

import functools

import numba
import numpy as np
from numba import types

from cumoe.cpu import _indirect, _intrinsics, _spread, _vector_tile, coded_panels, pack
from cumoe.cpu._jit import jit
from cumoe.cpu.epilogue import epilogue, put_rows, source_row

_PAIRS_BYTES = 256  # of a step
_PANEL_BYTES = 128 << 10  # of a panel between two passes over the rows: it stays in the L2 cache
_FEW_BLOCKS = 2  # of rows: they make the numbers in their registers, more of them read what was made once
_AHEAD_BYTES = 6144  # of codes in a step's few lines; bytes that are multiplied as they come are like bfloat16
_TOO_LARGE = {"bytes": 128, "nibbles": 8}


def row_bytes(made, k, kernel):
    """Bytes of a row of the block that a task gathers, with what its sums begin with, or the factors of its groups."""
    item = 1 if made.is_integer else 2 if kernel.row_dtype == "bfloat16" else 4
    return made.k_padded(k) * item + (4 * made.groups(k) if made.is_integer or made.in_parts else 0)


def steps_per_pass(made):
    """Steps of a panel between two passes over the rows, whole groups."""
    most = max(1, _PANEL_BYTES // (_PAIRS_BYTES if made.spreads else made.step_bytes))
    return max(1, most // made.group_steps) * made.group_steps if made.group else most


def spread_bytes(made):
    """Bytes of the numbers that a piece of a panel is spread to, and of their scales."""
    if not made.spreads:
        return 0
    steps, group_bytes = steps_per_pass(made), made.tile_of_pairs(True).group_bytes
    return steps * _PAIRS_BYTES + (steps // made.group_steps * group_bytes if made.group else 0)


@functools.cache
def multiplier(made, kernel):
    """Where the machine code of `_multiply_codes` begins, as in `panel_gemm`: there is one for each layout."""
    narrow = kernel.row_dtype == "bfloat16"
    tile = made.tile(narrow)
    pairs = made.tile_of_pairs(narrow) if made.spreads else tile
    multiply = jit(
        inner=True,
        tile=_vector_tile.emit(tile),
        tile_of_pairs=_vector_tile.emit(pairs),
        spread=_spread.spread(made.kind, made.scale, made.has_zeros) if made.spreads else _nothing_to_spread,
        spreads=made.spreads,
        max_rows=tile.max_rows,
        max_rows_of_pairs=pairs.max_rows,
        row_step_bytes=4 * tile.row_words,
        item_bytes=1 if made.is_integer else 2 if narrow else 4,
        side_bytes=coded_panels.COLUMNS // 2 * 4,
        pass_steps=steps_per_pass(made),
        few_blocks=_FEW_BLOCKS,
        ahead_bytes=kernel.ahead_bytes if made.kind == "bytes" else _AHEAD_BYTES,
        step=made.step,
        step_bytes=made.step_bytes,
        group=made.group,
        group_bytes=made.group_bytes,
    )(_multiply_codes)
    return _indirect.address_for(multiply, (types.int64,) * 7 + (types.boolean,))


def packer(made, rule, codes, scale, zeros):
    """Where the machine code begins that packs a panel of arrays of these types."""
    kinds = tuple(map(numba.typeof, (codes, scale, zeros)))
    return _packer(made._replace(in_parts=False), rule, kinds)


@functools.cache
def _packer(made, rule, kinds):
    rest = types.int64, types.int64, types.UniTuple(types.int64, 5), types.int64, types.uint8[::1]
    return _indirect.address_for(coded_panels.pack_panel(made, rule), kinds + rest)


def worker(made, kernel, dtype, activation):
    """The compiled loop of one thread over tasks."""
    too_large = _TOO_LARGE[made.kind] if made.is_integer else 0
    return _worker(too_large, made.is_integer and not made.group, made.in_parts, kernel, dtype, activation)


@functools.cache
def _worker(too_large, sums_are_integers, in_parts, kernel, dtype, activation):
    integers = jit(inline=True, inner=True, too_large=too_large)(_load_integers)
    numbers = jit(inline=True, inner=True, pack_rows=pack.pack_rows(kernel, dtype))(_load_numbers)
    return jit(
        inner=True,
        load_rows=integers if too_large else numbers,
        put_factors=_put_part_factors if in_parts else _no_part_factors,
        finish=epilogue(activation, dtype, coded_panels.COLUMNS // 2, kernel.lanes, sums_are_integers),
    )(_work_codes)


@jit(inline=True, inner=True)
def _nothing_to_spread(source, steps, target, group_steps):
    """Codes become numbers on the way, or none at all."""


@jit(inline=True, inner=True)
def _no_part_factors(problem, row_block, room, row0, rows):
    """No row has any."""


@jit(inline=True, inner=True)
def _put_part_factors(problem, row_block, room, row0, rows):
    """The factors of each row and group, behind the `room` rows of a block."""
    p = problem
    groups = (p.k_padded + p.group - 1) // p.group
    place = row_block.view(np.float32)[room * p.k_padded * row_block.itemsize // 4 :]
    for r in range(rows):
        row = source_row(p, row0 + r)
        for g in range(groups):
            place[r * groups + g] = p.part_factor[row, g]


# ---- templates; jit(...) gives the names below their values ----

max_rows = max_rows_of_pairs = row_step_bytes = item_bytes = side_bytes = pass_steps = few_blocks = ahead_bytes = 0
group = group_bytes = too_large = 0
step = step_bytes = 1
spreads = False
tile = tile_of_pairs = spread = pack_rows = load_rows = put_factors = finish = None


def _load_numbers(problem, row0, rows, target):
    p = problem
    pack_rows(p.x, p.permuted_idx, p.top_k, p.input_scale, row0, rows, p.k_padded, target)


def _load_integers(problem, row0, rows, target):
    """Rows of int8 codes, and behind all rows what the sums of each row and group begin with."""
    p = problem
    x, k_padded = p.x, p.k_padded
    k_size, width = x.shape[1], p.group if p.group else k_padded
    parts = (k_padded + width - 1) // width
    room = target.view(np.int8)
    starts = room[room.size // (k_padded + 4 * parts) * k_padded :].view(np.int32)
    for r in range(rows):
        line = x[source_row(p, row0 + r)]
        row = room[r * k_padded : (r + 1) * k_padded]
        for k in range(k_size):
            row[k] = line[k]
        row[k_size:] = 0
        for part in range(parts):
            total = np.int32(0)
            for code in line[part * width : (part + 1) * width]:
                total += np.int32(code)
            starts[r * parts + part] = np.int32(-too_large) * total


def _multiply_codes(rows, room, row_block, panel, k_padded, numbers, sums, more):
    """
    ``sums[:, :rows] = row_block @ panel``; with `more`, the next weights are asked for meanwhile.

    The operands are addresses; each half of `sums` has `room` rows, and behind as many of `row_block` is what they
    begin with. For many rows a piece of the panel becomes pairs of bfloat16 in `numbers` first. Integers without
    groups leave the bits of int32.
    """
    stride = k_padded * item_bytes
    starts = row_block + room * stride
    steps, group_steps = k_padded // step, group // step
    groups = (k_padded + group - 1) // group if group else 1
    blocks = (rows + max_rows - 1) // max_rows
    from_memory = spreads and blocks > few_blocks
    if from_memory:
        blocks = (rows + max_rows_of_pairs - 1) // max_rows_of_pairs
    scale_bytes = group_bytes // group_steps if group else 0  # of a step
    share = step_bytes if blocks == 1 else (step_bytes + scale_bytes + blocks - 1) // blocks
    piece_steps = steps if blocks == 1 else pass_steps
    for first in range(0, steps, piece_steps):
        count = min(piece_steps, steps - first)
        first_group = first // group_steps if group else 0
        piece = panel + first * step_bytes + first_group * group_bytes
        if from_memory:
            spread(piece, count, numbers, group_steps)
        first_row = 0
        for block in range(blocks):
            block_rows = rows // blocks + (1 if block < rows % blocks else 0)
            ahead, asked, asked_scales = piece, 0, 0
            if more:
                ahead += ahead_bytes if blocks == 1 else count * (step_bytes + scale_bytes + block * share)
                asked, asked_scales = share, group_bytes if blocks == 1 else 0
            row = row_block + first_row * stride + first * row_step_bytes
            target, half = sums + first_row * side_bytes, room * side_bytes
            start = starts + (first_row * groups + first_group) * 4
            last = asked_scales, group_steps, start, groups * 4
            if from_memory:
                tile_of_pairs(block_rows, row, stride, numbers, count, target, half, first, ahead, asked, *last)
            else:
                tile(block_rows, row, stride, piece, count, target, half, first, ahead, asked, *last)
            first_row += block_rows


def _work_codes(problem, tasks, counter, row_block, decoded, panel_block, sums, codes, edges):
    """Take tasks until none is left."""
    p = problem
    outputs, is_packed = p.out.shape[1], panel_block.size == 0
    order, room = (p.first_gate, p.first_up, p.distance, outputs, p.side), sums.shape[1]
    operands = p.k_padded, decoded.ctypes.data, sums.ctypes.data, is_packed
    while True:
        task = _intrinsics.next_task(counter)
        if task >= tasks.shape[0] or tasks[task, 2] == 0:
            break
        expert, row0, rows, first_panel = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
        load_rows(p, row0, rows, row_block)
        put_factors(p, row_block, room, row0, rows)
        put_rows(p, edges, room, row0, rows)
        for panel in range(first_panel, first_panel + tasks[task, 4]):
            if is_packed:
                address = np.int64(p.weights.ctypes.data) + (expert * p.weights.shape[1] + panel) * p.panel_bytes
            else:
                address = np.int64(panel_block.ctypes.data)
                codes_of = p.weights, p.scale, p.zero_points
                _indirect.call(p.pack, (*codes_of, expert, panel, order, p.k_padded, panel_block.view(np.uint8)))
            _indirect.call(p.multiply, (rows, room, row_block.ctypes.data, address, *operands))
            width = min(p.side, outputs - panel * p.side)
            finish(p, sums, codes, edges, expert, row0, rows, panel * p.side, width)
