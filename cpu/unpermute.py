"""
Add the rows that belong to a token, back in token order.

    out[t, h] = sum over j ascending of weight[t, j] * y[row[t, j], h]

float32 multiply, float32 add, one rounding at the store; the sum starts at +0, so the bits depend on the
token's own rows only. A row below 0 is skipped and never read.
"""

import functools

import numpy as np

from cumoe.cpu import bits
from cumoe.cpu import rows as row_loop
from cumoe.cpu._jit import jit

_TILE = 512  # float32 sums of one tile of columns stay in the first-level cache

# constants of the templates below; jit(...) sets them
LOAD, STORE = bits.CODECS["float32"]
WEIGHTED = True
ADD_ROW = STORE_ROW = None


def unpermute(y, topk_weights, inv_permuted_idx, out, dtype, expert_first_token_offset=None):
    """
    Write ``out`` (T, H) from the rows of ``y`` (R, >= H), whose inner axis is contiguous.

    `topk_weights` is float32 (T, k), or None to add the rows unweighted. `inv_permuted_idx` (T, k) is
    int32 or int64; a choice whose row is outside 0..R-1, or at or after the last of
    `expert_first_token_offset`, is skipped. `dtype` names what the bits of `y` and `out` mean: float32,
    bfloat16 or float16.
    """
    if out.size == 0:
        return
    num_rows = y.shape[0]
    if expert_first_token_offset is not None:
        num_rows = min(num_rows, int(expert_first_token_offset[-1]))
    if y.strides[1] != y.itemsize:
        y = np.ascontiguousarray(y)
    flat, (row_stride, _) = _flat(y)
    _run(flat, row_stride, 1, num_rows, topk_weights, inv_permuted_idx, out, dtype, False)


def weighted_sum(x, topk_weights, topk_ids, expert_map, out, dtype, keep):
    """
    Write ``out`` (T, H), the sum over the choices of ``x`` (T, k, H), which may have any strides.

    `topk_weights` is float32 (T, k), or None for ones. With `topk_ids` (T, k), a choice is skipped whose
    id is < 0 or, where `expert_map` (E,) has entries, outside 0..E-1 or mapped below 0. A token without
    any choice left becomes 0, or keeps what `out` holds if `keep`.
    """
    if out.size == 0:
        return
    flat, (token_stride, choice_stride, column_stride) = _flat(x)
    rows = np.empty(x.shape[:2], np.int64)
    _choice_offsets(
        np.empty((0, 0), np.int32) if topk_ids is None else topk_ids, expert_map, token_stride, choice_stride, rows
    )
    _run(flat, 1, column_stride, flat.size, topk_weights, rows, out, dtype, keep)


def _flat(x):
    """The memory of an array as one vector, and the strides of its axes in elements; a copy if they are not whole."""
    if x.flags.c_contiguous:
        return x.reshape(-1), tuple(stride // x.itemsize for stride in x.strides)
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        x = np.ascontiguousarray(x)
    strides = tuple(stride // x.itemsize for stride in x.strides)
    length = 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(x, (length,), (x.itemsize,)), strides


@jit()
def _choice_offsets(topk_ids, expert_map, token_stride, choice_stride, rows):
    for t in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            expert = np.int64(topk_ids[t, j]) if topk_ids.size > 0 else 0
            if topk_ids.size > 0 and expert_map.size > 0:
                expert = np.int64(expert_map[expert]) if 0 <= expert < expert_map.size else -1
            rows[t, j] = t * token_stride + j * choice_stride if expert >= 0 else -1


def _run(flat, row_stride, column_stride, num_rows, weights, rows, out, dtype, keep):
    weighted = weights is not None
    if not weighted:
        weights = np.empty((0, 0), np.float32)
    arrays = flat, row_stride, column_stride, num_rows, weights, rows, out, keep
    inner = _inner_loops(dtype, weighted)
    row_loop.run(_combine, len(out), rows.size * out.shape[1], arrays, WEIGHTED=weighted, **inner)


@functools.cache
def _inner_loops(dtype, weighted):
    load, store = bits.CODECS[dtype]
    add_row = jit(inner=True, LOAD=load, WEIGHTED=weighted)(_add_row)
    store_row = jit(inner=True, STORE=store)(_store_row)
    return {"ADD_ROW": add_row, "STORE_ROW": store_row}


def _combine(first, last, arguments):
    flat, row_stride, column_stride, num_rows, weights, rows, out, keep = arguments
    num_columns = out.shape[1]
    sums = np.empty(_TILE, np.float32)
    for t in range(first, last):
        used = not keep  # with `keep`, a token without any row leaves `out` as it is
        for j in range(rows.shape[1]):
            used |= 0 <= rows[t, j] < num_rows
        if not used:
            continue
        for start in range(0, num_columns, _TILE):
            width = min(_TILE, num_columns - start)
            sums[:] = 0
            for j in range(rows.shape[1]):
                if not 0 <= rows[t, j] < num_rows:
                    continue
                low = np.int64(rows[t, j]) * row_stride + start * column_stride
                weight = weights[t, j] if WEIGHTED else np.float32(1)
                if column_stride == 1:
                    ADD_ROW(sums, weight, flat[low : low + width])
                else:
                    ADD_ROW(sums, weight, flat[low : low + width * column_stride : column_stride])
            STORE_ROW(sums, out[t, start : start + width])


# The two inner loops are functions of their own: inside `_combine` LLVM does not turn them into vector code.
def _add_row(sums, weight, y):
    for h in range(y.size):
        sums[h] += weight * LOAD(y[h]) if WEIGHTED else LOAD(y[h])


def _store_row(sums, out):
    for h in range(out.size):
        out[h] = STORE(sums[h])
