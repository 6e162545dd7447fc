"""
What happens to a tile of sums: factors of quantised operands, bias, router weight, rounding, activation, store.

The order is the reference's: ``h = (sum * (row factor * column factor) + bias) * scale``, rounded to the dtype of the
activations, then the activation, rounded again. The sums of a panel are in the cache, the gate half and the up half
(of a plain product: the first and the second half of the columns) each in one piece, so that the loops run
over many consecutive elements and become vector code. `codes` holds the results before they are copied
to their rows. The usual activations stay in registers from the sums to the rows (`_vector_epilogue.py`).
"""

import functools

import numpy as np

from cumoe.cpu import _vector_epilogue, act
from cumoe.cpu._jit import jit
from cumoe.cpu.bits import CODECS


@functools.cache
def epilogue(activation, dtype, half, lanes, is_integer=False):
    """
    The compiled epilogue of panels of `2 * half` columns; `activation` is a name of `act.SCALAR` or "".

    It takes (problem, sums, codes, edges, expert, first row, rows, first output, outputs); `edges` is float32, as long
    as `edge_size` says, and begins with what `put_rows` found for these rows. The common ones become part of their
    callers: to hand on `problem` takes longer than a row. With `is_integer`, `sums` holds the bits of int32.
    """
    if _vector_epilogue.can_store(activation, dtype):
        store = _vector_epilogue.emit(_vector_epilogue.Store(activation, dtype, lanes, half // lanes, is_integer))
        return jit(inline=True, inner=True, finish=store, half=half, gated=bool(activation))(_in_registers)
    load, store = CODECS[dtype]
    if not activation:
        return jit(inner=True, finish=jit(inner=True, store=store)(_store), half=half, is_integer=is_integer)(
            _each_half
        )
    finish = jit(inner=True, load=load, store=store, activate=act.SCALAR[activation])(_activate)
    template = _each_half if activation.endswith("_no_mul") else _both_halves
    return jit(inner=True, finish=finish, half=half, is_integer=is_integer)(template)


def edge_size(rows, columns):
    """Numbers that the rows and the columns of a tile are multiplied by, or that are added to them."""
    return 2 * (rows + columns)


@jit(inline=True, inner=True)
def source_row(problem, row):
    """The row of x that a row of the product is."""
    p = problem
    if not p.top_k:
        return row
    return (np.int64(p.permuted_idx[row]) if p.permuted_idx.size else row) // p.top_k


@jit(inline=True, inner=True)
def put_rows(problem, edges, room, row0, rows):
    """Factor and scale of each row of a task, 1 for what is not there, to the first ``2 * room`` of `edges`."""
    p = problem
    factors, scales = edges[:rows], edges[room : room + rows]
    factors[:] = np.float32(1)
    scales[:] = np.float32(1)
    if p.row_factor.size:
        for r in range(rows):
            factors[r] = p.row_factor[source_row(p, row0 + r)]
    if p.output_scale.size:
        for r in range(rows):
            scales[r] = p.output_scale[np.int64(p.permuted_idx[row0 + r]) if p.permuted_idx.size else row0 + r]


# ---- templates; jit(...) gives the names below their values ----

load = store = activate = finish = None
half = 0
gated = is_integer = False


def _in_registers(problem, sums, codes, edges, expert, row0, rows, column0, width):
    p = problem
    room = sums.shape[1]
    columns = edges[2 * room :]
    up = p.first_up if gated else p.first_gate
    second = column0 if gated else column0 + half
    _put_columns(p, columns[:half], columns[2 * half : 3 * half], expert, p.first_gate, column0)
    _put_columns(p, columns[half : 2 * half], columns[3 * half :], expert, up, second)
    full, size = half if gated else 2 * half, p.out.itemsize
    target, stride = np.int64(codes.ctypes.data), full * size  # an unsigned one would make floats of both
    if width == full:
        target = np.int64(p.out.ctypes.data) + row0 * p.out.strides[0] + column0 * size
        stride = p.out.strides[0]
    rows_at, columns_at, halves = edges.ctypes.data, columns.ctypes.data, (sums.ctypes.data, room * half * 4)
    finish(*halves, rows, rows_at, room * 4, columns_at, target, stride, p.alpha, p.beta, p.limit)
    if width < full:
        _copy_rows(codes, full, p.out, row0, rows, column0, width)


@jit(inline=True, inner=True)
def _put_columns(problem, factors, biases, expert, first, column0):
    """Factor and bias of each column that there is; 1, and -0, which changes no sum, for what is not there."""
    p = problem
    start = first + column0 * p.distance
    if p.column_factor.shape[1] > 1:
        count = min(factors.size, (p.column_factor.shape[1] - start + p.distance - 1) // p.distance)
        for j in range(count):
            factors[j] = p.column_factor[expert, start + j * p.distance]
    else:
        factors[:] = p.column_factor[expert, 0] if p.column_factor.size else np.float32(1)
    if p.bias.size:
        count = min(biases.size, (p.bias.shape[1] - start + p.distance - 1) // p.distance)
        for j in range(count):
            biases[j] = p.bias[expert, start + j * p.distance]
    else:
        biases[:] = np.float32(-0.0)


def _each_half(problem, sums, codes, edges, expert, row0, rows, column0, width):
    """Without a gate: ``out[row, column0 : column0 + width]`` from the two halves of the columns."""
    p = problem
    for side in range(2):
        start = side * half
        if start < width:
            if is_integer:
                _to_floats(sums[side], rows)
            _add_bias_and_scale(p, sums[side], half, expert, p.first_gate, row0, rows, column0 + start, width - start)
            h = sums[side].reshape(-1)[: rows * half]
            finish(h, h, p.alpha, p.beta, p.limit, codes)
            _copy_rows(codes, half, p.out, row0, rows, column0 + start, min(half, width - start))


def _both_halves(problem, sums, codes, edges, expert, row0, rows, column0, width):
    """With a gate: one output for each pair of columns."""
    p = problem
    if is_integer:
        _to_floats(sums[0], rows)
        _to_floats(sums[1], rows)
    _add_bias_and_scale(p, sums[0], half, expert, p.first_gate, row0, rows, column0, width)
    _add_bias_and_scale(p, sums[1], half, expert, p.first_up, row0, rows, column0, width)
    gate, up = sums[0].reshape(-1)[: rows * half], sums[1].reshape(-1)[: rows * half]
    finish(gate, up, p.alpha, p.beta, p.limit, codes)
    _copy_rows(codes, half, p.out, row0, rows, column0, width)


@jit(inline=True, inner=True)
def _to_floats(sums, rows):
    line = sums.reshape(-1)[: rows * sums.shape[1]]
    whole = line.view(np.int32)
    for i in range(line.size):
        line[i] = np.float32(whole[i])


def _store(sums, unused, alpha, beta, limit, codes):
    for i in range(sums.size):
        codes[i] = store(sums[i])


def _activate(gate, up, alpha, beta, limit, codes):
    for i in range(gate.size):
        codes[i] = store(activate(load(store(gate[i])), load(store(up[i])), alpha, beta, limit))


@jit(inline=True, inner=True)
def _add_bias_and_scale(problem, sums, half, expert, first, row0, rows, column0, width):
    """``sums[r, j] = (sums[r, j] * factors + bias of output column0 + j) * output_scale[pair of row]``, where given."""
    p = problem
    if p.row_factor.size or p.column_factor.size:
        _multiply_by_factors(p, sums, half, expert, first, row0, rows, column0, width)
    if p.bias.size:
        bias = p.bias[expert, first + column0 * p.distance :]
        for r in range(rows):
            for j in range(min(half, width)):
                sums[r, j] += bias[j * p.distance]
    if p.output_scale.size:
        for r in range(rows):
            scale = p.output_scale[np.int64(p.permuted_idx[row0 + r]) if p.permuted_idx.size else row0 + r]
            for j in range(half):
                sums[r, j] *= scale


@jit(inline=True, inner=True)
def _multiply_by_factors(problem, sums, half, expert, first, row0, rows, column0, width):
    """``sums[r, j] *= row_factor[source of row] * column_factor[output column0 + j]``, 1 for what is not there."""
    p = problem
    for r in range(rows):
        factor = p.row_factor[source_row(p, row0 + r)] if p.row_factor.size else np.float32(1)
        if p.column_factor.shape[1] > 1:
            column = p.column_factor[expert, first + column0 * p.distance :]
            for j in range(min(half, width)):
                sums[r, j] *= np.float32(factor * column[j * p.distance])
        else:
            if p.column_factor.size:
                factor = np.float32(factor * p.column_factor[expert, 0])
            for j in range(min(half, width)):
                sums[r, j] *= factor


@jit(inline=True, inner=True)
def _copy_rows(codes, half, out, row0, rows, column0, width):
    for r in range(rows):
        target = out[row0 + r]
        if width == half:
            for j in range(half):
                target[column0 + j] = codes[r * half + j]
        else:
            for j in range(width):
                target[column0 + j] = codes[r * half + j]
