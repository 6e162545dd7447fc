"""
Quantisers: extremes of each group, its scale, and the code of each number; and back.

Operands are (L, N, K), L matrices; codes are too, or (L, N, K/2) where two of four bits share a byte, the even k in
the low bits. A group is ``group_rows`` x ``group_cols`` elements of a matrix, fewer at the ends; what it has is element
(l, n // group_rows, k // group_cols) of an (L, Nb, Kb) array. `limits` and `global_scale` are (L,) float32.
"""

import functools

import numpy as np

from cumoe.cpu import bits, rows
from cumoe.cpu._jit import jit
from cumoe.cpu.format_rules import DECODERS, ENCODERS, SCALES, zero_point

# small floats and plain integers that scales are stored as: dtype name -> (code to float32, float32 to code)
_SCALE_CODECS = {**bits.CODECS, "uint8": (bits.float32_from_float32, bits.float32_from_float32)}


@jit(inline=True)
def _eight(zero_points, m, n, g):
    return 8


@jit(inline=True)
def _half_of_256(zero_points, m, n, g):
    return 128


@jit(inline=True)
def _stored(zero_points, m, n, g):
    return zero_points[m, n, g]


# constants of the templates below; jit(...) and rows.run(...) set them
LOAD, STORE = bits.CODECS["float32"]
SCALE = LOAD
RULE = SCALES["fp8"]
PREPARE, CODE, ZERO = ENCODERS["fp8"].prepare, ENCODERS["fp8"].code, _eight
ROW, WORTH, WORTH_OF_CODE, GIVEN = None, PREPARE, DECODERS["fp8"].code, False


def _row_extremes(first, last, arguments):
    x, group_cols, low, high = arguments
    num_rows, size = x.shape[1], x.shape[2]
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        for g in range(low.shape[2]):
            smallest = largest = np.float32(0)
            for k in range(g * group_cols, min((g + 1) * group_cols, size)):
                value = LOAD(x[m, n, k])
                smallest = value if value < smallest else smallest
                largest = value if value > largest else largest
            low[m, n, g] = smallest
            high[m, n, g] = largest


def _block_extremes(first, last, arguments):
    row_low, row_high, group_rows, low, high = arguments
    blocks, size = low.shape[1], row_low.shape[1]
    for b in range(first, last):
        m, block = b // blocks, b % blocks
        for g in range(low.shape[2]):
            smallest = largest = np.float32(0)
            for n in range(block * group_rows, min((block + 1) * group_rows, size)):
                smallest = min(smallest, row_low[m, n, g])
                largest = max(largest, row_high[m, n, g])
            low[m, block, g] = smallest
            high[m, block, g] = largest


def extremes(x, dtype, group_rows, group_cols, low, high):
    """``min(x, 0)`` and ``max(x, 0)`` of each group, float32; `dtype` names what the bits of `x` mean."""
    num_rows, by_row = x.shape[0] * x.shape[1], low.shape[1] == x.shape[1]  # a matrix without rows has one group
    row_low, row_high = low, high
    if not by_row:
        row_low, row_high = (np.empty((*x.shape[:2], low.shape[2]), np.float32) for _ in range(2))
    rows.run(_row_extremes, num_rows, x.size, (x, group_cols, row_low, row_high), LOAD=bits.CODECS[dtype][0])
    if not by_row:
        arguments = row_low, row_high, group_rows, low, high
        rows.run(_block_extremes, low.shape[0] * low.shape[1], row_low.size, arguments)


def _scales(first, last, arguments):
    low, high, limits, out = arguments
    num_rows = out.shape[1]
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        for g in range(out.shape[2]):
            out[m, n, g] = STORE(RULE(low[m, n, g], high[m, n, g], limits[m]))


def scales(low, high, limits, rule, dtype, out):
    """Scale of each group by a rule of `SCALES`; `limits` or None; `dtype` is that of `out`, uint8 for codes."""
    arguments = low, high, np.full(len(out), np.inf, np.float32) if limits is None else limits, out
    num_rows = out.shape[0] * out.shape[1]
    rows.run(_scales, num_rows, out.size, arguments, RULE=SCALES[rule], STORE=_SCALE_CODECS[dtype][1])


def _zero_points(first, last, arguments):
    low, scale, most, out = arguments
    num_rows = out.shape[1]
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        for g in range(out.shape[2]):
            out[m, n, g] = zero_point(low[m, n, g], SCALE(scale[m, n, g]), most)


def zero_points(low, scale, dtype, most, out):
    """The zero point of each group, 0..most; `dtype` names what the bits of `scale` mean."""
    num_rows = out.shape[0] * out.shape[1]
    rows.run(_zero_points, num_rows, out.size, (low, scale, most, out), SCALE=bits.CODECS[dtype][0])


def _encode(first, last, arguments):
    x, scale, zero_points, global_scale, group_rows, group_cols, out = arguments
    num_rows, size = x.shape[1], x.shape[2]
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        s = n // group_rows
        for g in range(scale.shape[2]):
            p = PREPARE(SCALE(scale[m, s, g]), global_scale[m])
            zero = ZERO(zero_points, m, s, g)
            for k in range(g * group_cols, min((g + 1) * group_cols, size)):
                out[m, n, k] = CODE(LOAD(x[m, n, k]), p, zero)


def _encode_packed(first, last, arguments):
    x, scale, zero_points, global_scale, group_rows, group_cols, out = arguments
    num_rows, size = x.shape[1], out.shape[2]
    half = group_cols // 2
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        s = n // group_rows
        for g in range(scale.shape[2]):
            p = PREPARE(SCALE(scale[m, s, g]), global_scale[m])
            zero = ZERO(zero_points, m, s, g)
            for i in range(g * half, min((g + 1) * half, size)):
                even = CODE(LOAD(x[m, n, 2 * i]), p, zero)
                odd = CODE(LOAD(x[m, n, 2 * i + 1]), p, zero)
                out[m, n, i] = np.uint8(even | np.uint8(odd << np.uint8(4)))


def encode(x, dtype, scale, scale_dtype, zero_points, global_scale, group_rows, group_cols, rule, out):
    """
    Fill ``out`` with the codes of `x` by the rule `rule` of `ENCODERS`.

    `scale_dtype` is "uint8" where the rule reads codes. `zero_points` (L, Nb, Kb) uint8 or None is used by int4 and
    uint8; None stands for 8 and 128.
    """
    chosen = ENCODERS[rule]
    arguments = x, scale, or_none(zero_points), global_scale, group_rows, group_cols, out
    rows.run(
        _encode_packed if chosen.packed else _encode,
        x.shape[0] * x.shape[1],
        x.size,
        arguments,
        LOAD=bits.CODECS[dtype][0],
        SCALE=_SCALE_CODECS[scale_dtype][0],
        PREPARE=chosen.prepare,
        CODE=chosen.code,
        ZERO=_zero_of(rule, zero_points is not None),
    )


def _decode_row(codes, scale, zero_points, global_scale, m, n, group_rows, group_cols, out):
    s, size = n // group_rows, out.size
    for g in range(scale.shape[2]):
        p = PREPARE(SCALE(scale[m, s, g]), global_scale[m])
        zero = ZERO(zero_points, m, s, g)
        for k in range(g * group_cols, min((g + 1) * group_cols, size)):
            out[k] = STORE(CODE(codes[m, n, k], p, zero))


def _decode_packed_row(codes, scale, zero_points, global_scale, m, n, group_rows, group_cols, out):
    s, size, half = n // group_rows, codes.shape[2], group_cols // 2
    for g in range(scale.shape[2]):
        p = PREPARE(SCALE(scale[m, s, g]), global_scale[m])
        zero = ZERO(zero_points, m, s, g)
        for i in range(g * half, min((g + 1) * half, size)):
            pair = codes[m, n, i]
            out[2 * i] = STORE(CODE(np.uint8(pair & np.uint8(15)), p, zero))
            out[2 * i + 1] = STORE(CODE(np.uint8(pair >> np.uint8(4)), p, zero))


@functools.cache
def decode_row(rule, scale_dtype, has_zero_points, dtype):
    """The compiled loop over row n of matrix m: codes to numbers of `dtype`, by the rule `rule` of `DECODERS`."""
    chosen = DECODERS[rule]
    return jit(
        STORE=bits.CODECS[dtype][1],
        SCALE=_SCALE_CODECS[scale_dtype][0],
        PREPARE=chosen.prepare,
        CODE=chosen.code,
        ZERO=_zero_of(rule, has_zero_points),
    )(_decode_packed_row if chosen.packed else _decode_row)


def _decode(first, last, arguments):
    codes, scale, zero_points, global_scale, group_rows, group_cols, out = arguments
    num_rows = out.shape[1]
    for r in range(first, last):
        m, n = r // num_rows, r % num_rows
        ROW(codes, scale, zero_points, global_scale, m, n, group_rows, group_cols, out[m, n])


def decode(codes, scale, scale_dtype, zero_points, global_scale, group_rows, group_cols, rule, dtype, out):
    """Fill ``out`` with the numbers of `codes` by the rule `rule` of `DECODERS`; arguments as in `encode`."""
    arguments = codes, scale, or_none(zero_points), global_scale, group_rows, group_cols, out
    row = decode_row(rule, scale_dtype, zero_points is not None, dtype)
    rows.run(_decode, out.shape[0] * out.shape[1], out.size, arguments, ROW=row)


def _quantise_rows(first, last, arguments):
    x, group_cols, across, scale, limits, numbers, factor = arguments
    worth = np.empty(group_cols, np.float32)  # of codes: `numbers` may be `x`, and then one loop is no vector code
    for r in range(first, last):
        limit = limits[r if limits.size > 1 else 0]
        for g in range(across):
            line = x[r, g * group_cols : (g + 1) * group_cols]
            target = numbers[r, g * group_cols : (g + 1) * group_cols]
            size = line.size
            if GIVEN:
                s = scale[0]
            else:
                largest = np.uint32(0)  # as integers they grow with their size
                for k in range(size):
                    found = np.uint32(np.float32(LOAD(line[k])).view(np.uint32) & np.uint32(0x7FFFFFFF))
                    largest = max(largest, np.uint32(found * np.uint32(found <= np.uint32(0x7F800000))))  # NaN counts 0
                s = RULE(np.float32(0), np.uint32(largest).view(np.float32), limit)
            p, q = PREPARE(s, limit), WORTH(s, np.float32(1))
            if factor.size > 0:
                factor[r, g], q = q, np.float32(1)
            for k in range(size):
                worth[k] = WORTH_OF_CODE(CODE(LOAD(line[k]), p, 0), q, 0)
            for k in range(size):
                target[k] = STORE(worth[k])


@jit(inline=True)
def _as_byte(number):
    return np.int8(np.int32(number))


def quantise_rows(x, dtype, scheme, scale_rule, code_rule, group_cols, scale, global_scale, numbers, factor):
    """
    Fill ``numbers`` with what the codes of rows `x` (R, K) are worth, times their scales; it may be `x`, or int8.

    Groups are `group_cols` of a row. With a `factor`, (R,) for groups of a whole row, else (R, groups or more), scales
    go there instead. Rules are names of `SCALES`, `ENCODERS` and (`scheme`) `DECODERS`. `scale` (1,) is given for all
    rows, or None; `global_scale` is (1,) or (R,) or None: it is in the scales of which the codes are stored, and not in
    numbers.
    """
    num_rows, size = x.shape
    cols = max(1, min(size, group_cols))
    rows.run(
        _quantise_rows,
        num_rows,
        x.size,
        (
            x,
            cols,
            max(1, -(-size // cols)) if factor.size else -(-size // cols),
            np.empty(0, np.float32) if scale is None else scale,
            np.full(1, np.inf, np.float32) if global_scale is None else global_scale,
            numbers,
            factor.reshape(num_rows, -1) if factor.size else factor.reshape(0, 0),
        ),
        LOAD=bits.CODECS[dtype][0],
        STORE=_as_byte if numbers.dtype == np.int8 else bits.CODECS[dtype][1],
        GIVEN=scale is not None,
        RULE=SCALES[scale_rule],
        PREPARE=ENCODERS[code_rule].prepare,
        CODE=ENCODERS[code_rule].code,
        WORTH=DECODERS[scheme].prepare,
        WORTH_OF_CODE=DECODERS[scheme].code,
    )


def _zero_of(rule, has_zero_points):
    if has_zero_points:
        return _stored
    return _half_of_256 if rule == "uint8" else _eight


def or_none(zero_points):
    """What stands for zero points that are not there."""
    return np.empty((0, 0, 0), np.uint8) if zero_points is None else zero_points
