"""
Rules of the quantisers, one number at a time: scale of a group, code of a number, number of a code.

They are those of `cumoe.reference.formats`, with the same float32 operations in the same order, so that the bits are
the same. `SCALES`, `ENCODERS` and `DECODERS` name them for the loops of `formats`.
"""

from typing import NamedTuple

import numpy as np

from cumoe.cpu import bits
from cumoe.cpu._jit import jit

_FLOOR = np.float32(1e-10)
_448, _127, _8, _7, _6 = (np.float32(number) for number in (448, 127, 8, 7, 6))
_SMALLEST_FP8_SCALE = np.float32(1) / np.float32(448 * 512)
_ROUND = np.float32(1.5 * 2.0**23)  # adding it leaves the nearest integer, ties to even, in the low bits
_ROUND_BITS = np.int32(_ROUND.view(np.int32))


# ---- scale of a group from its extremes; `limit` is a number that the rule may need ----


@jit(inline=True)
def _absmax(low, high):
    return -low if -low > high else high  # never -0: some rules read its bits


@jit(inline=True)
def _at_least(x, smallest):
    return x if x > smallest else smallest


@jit(inline=True)
def fp8_scale(low, high, limit):
    """One scale for a tensor or a token; `limit` is scale_ub."""
    absmax = _absmax(low, high)
    return _at_least((limit if absmax > limit else absmax) / _448, _SMALLEST_FP8_SCALE)


@jit(inline=True)
def fp8_group_scale(low, high, limit):
    """One scale for a group of an fp8 operand."""
    return _at_least(_absmax(low, high), _FLOOR) / _448


@jit(inline=True)
def _power_of_two(s):
    u = np.float32(s).view(np.uint32)
    return np.uint32(np.uint32(u + np.uint32(0x007FFFFF)) & np.uint32(0xFF800000)).view(np.float32)


@jit(inline=True)
def _fp8_ue8m0_scale(low, high, limit):
    return _power_of_two(fp8_scale(low, high, limit))


@jit(inline=True)
def _fp8_group_ue8m0_scale(low, high, limit):
    return _power_of_two(fp8_group_scale(low, high, limit))


@jit(inline=True)
def int8_scale(low, high, limit):
    """One scale for a group of an int8 operand."""
    return _at_least(_absmax(low, high), _FLOOR) / _127


@jit(inline=True)
def int4_scale(low, high, limit):
    """All 16 codes, zero point 8; `limit` is the smallest number of the stored dtype."""
    return _at_least(_at_least(_at_least(high, _FLOOR) / _7, low / -_8), limit)


@jit(inline=True)
def uint8_scale(low, high, limit):
    """Zero point 128; `limit` as for int4."""
    return _at_least(int8_scale(low, high, limit), limit)


@jit(inline=True)
def _half_width(low, high):  # which cannot overflow
    return _at_least(high * np.float32(0.5) - low * np.float32(0.5), np.float32(0.5e-10))


@jit(inline=True)
def _int4_zero_points_scale(low, high, limit):
    return _at_least(_half_width(low, high) / np.float32(7.5), limit)


@jit(inline=True)
def _uint8_zero_points_scale(low, high, limit):
    return _at_least(_half_width(low, high) / np.float32(127.5), limit)


@jit(inline=True)
def mxfp4_scale(low, high, limit):
    """The e8m0 code of a group."""
    raised = np.uint32(np.float32(_absmax(low, high)).view(np.uint32) + np.uint32(0x200000))
    field = np.int32(raised >> np.uint32(23))
    return np.uint8(field - 2 if field > 2 else 0)


@jit(inline=True)
def mxfp8_scale(low, high, limit):
    """The e8m0 code of a group: 448 is ``1.75 * 2**8``, so that a mantissa above 1.75 needs one more."""
    u = np.float32(_absmax(low, high)).view(np.uint32)
    field = np.int32(np.uint32(u + np.uint32(0x001FFFFF)) >> np.uint32(23))
    return np.uint8(field - 8 if field > 8 else 0)


@jit(inline=True)
def nvfp4_scale(low, high, limit):
    """The e4m3 code of a group; `limit` is the global scale."""
    return bits.float8_e4m3fn_from_float32(limit * _absmax(low, high) / _6)


@jit(inline=True)
def nvfp4_global_scale(low, high, limit):
    """The number that makes the largest block scale 448."""
    return np.float32(448 * 6) / _at_least(_absmax(low, high), _FLOOR)


# ---- what a scale becomes once for its group: (scale, global scale) -> float32 ----


@jit(inline=True)
def _same(s, global_scale):
    return s


@jit(inline=True)
def _inverse(s, global_scale):
    return np.float32(1) / s


@jit(inline=True)
def _e8m0(code, global_scale):
    return bits.float32_from_float8_e8m0fnu(code)


@jit(inline=True)
def _inverse_e8m0(code, global_scale):
    # 2**(127 - code), exactly; NaN stays NaN
    u = np.uint32(code)
    return bits.float32_from_float8_e8m0fnu(np.uint32(255) if u == np.uint32(255) else np.uint32(np.uint32(254) - u))


@jit(inline=True)
def _nvfp4(code, global_scale):
    return bits.float32_from_float8_e4m3fn(code) / global_scale


@jit(inline=True)
def _inverse_nvfp4(code, global_scale):
    s = bits.float32_from_float8_e4m3fn(code)
    factor = global_scale / s
    return np.float32(0) if s == np.float32(0) else factor


# ---- code of a number: (number, what the scale became, zero point) -> code; and back ----


@jit(inline=True)
def _cut(y, low, high):
    y = np.float32(0) if y != y else y  # noqa: PLR0124  only NaN differs from itself
    y = high if y > high else y
    return low if y < low else y


@jit(inline=True)
def _nearest_integer(y):
    return np.int32(np.int32(np.float32(y + _ROUND).view(np.int32)) - _ROUND_BITS)


@jit(inline=True)
def _e4m3_quotient(x, p, zero):
    return bits.float8_e4m3fn_from_float32(x / p)


@jit(inline=True)
def _e4m3_product(x, p, zero):
    return bits.float8_e4m3fn_from_float32(x * p)


@jit(inline=True)
def _e2m1_product(x, p, zero):
    return bits.float4_e2m1fn_from_float32(x * p)


@jit(inline=True)
def _int8_even(x, p, zero):
    return np.int8(_nearest_integer(_cut(x / p, -np.float32(128), _127)))


@jit(inline=True)
def _int8_away(x, p, zero):
    y = _cut(x / p, -np.float32(128), _127)
    whole = np.int32(y)
    rest = np.float32(y - np.float32(whole))
    up, down = np.int32(rest >= np.float32(0.5)), np.int32(rest <= -np.float32(0.5))
    return np.int8(whole + up - down)


@jit(inline=True)
def _int8_truncate(x, p, zero):
    return np.int8(np.int32(_cut(x / p, -np.float32(128), _127)))


@jit(inline=True)
def _unsigned(x, p, zero, most):
    edge = np.float32(most + 1)
    q = np.int32(_nearest_integer(_cut(x / p, -edge, edge)) + np.int32(zero))
    return np.uint8(min(max(q, np.int32(0)), np.int32(most)))


@jit(inline=True)
def _int4(x, p, zero):
    return _unsigned(x, p, zero, 15)


@jit(inline=True)
def _uint8(x, p, zero):
    return _unsigned(x, p, zero, 255)


@jit(inline=True)
def zero_point(low, s, most):
    """The code of zero, 0..most, so that ``low`` is near code 0."""
    return np.uint8(_nearest_integer(_cut(-low / s, np.float32(0), np.float32(most))))


@jit(inline=True)
def _from_e4m3(code, p, zero):
    return bits.float32_from_float8_e4m3fn(code) * p


@jit(inline=True)
def _from_e2m1(code, p, zero):
    return bits.float32_from_float4_e2m1fn(code) * p


@jit(inline=True)
def _from_int8(code, p, zero):
    return np.float32(code) * p


@jit(inline=True)
def _from_unsigned(code, p, zero):
    return np.float32(np.int32(code) - np.int32(zero)) * p


SCALES = {
    "fp8": fp8_scale,
    "fp8_ue8m0": _fp8_ue8m0_scale,
    "fp8_group": fp8_group_scale,
    "fp8_group_ue8m0": _fp8_group_ue8m0_scale,
    "int8": int8_scale,
    "int4": int4_scale,
    "int4_zero_points": _int4_zero_points_scale,
    "uint8": uint8_scale,
    "uint8_zero_points": _uint8_zero_points_scale,
    "mxfp4": mxfp4_scale,
    "mxfp8": mxfp8_scale,
    "nvfp4": nvfp4_scale,
    "nvfp4_global": nvfp4_global_scale,
}


class Rule(NamedTuple):
    """How numbers become codes (`prepare` the scale, `code` each number), and codes numbers."""

    prepare: object
    code: object
    packed: bool = False


ENCODERS = {
    "fp8": Rule(_same, _e4m3_quotient),
    "fp8_static": Rule(_inverse, _e4m3_product),
    "int8_even": Rule(_same, _int8_even),
    "int8_away": Rule(_same, _int8_away),
    "int8_truncate": Rule(_same, _int8_truncate),
    "int4": Rule(_same, _int4, True),
    "uint8": Rule(_same, _uint8),
    "mxfp4": Rule(_inverse_e8m0, _e2m1_product, True),
    "mxfp8": Rule(_inverse_e8m0, _e4m3_product),
    "nvfp4": Rule(_inverse_nvfp4, _e2m1_product, True),
}

DECODERS = {
    "fp8": Rule(_same, _from_e4m3),
    "int8": Rule(_same, _from_int8),
    "int4": Rule(_same, _from_unsigned, True),
    "uint8": Rule(_same, _from_unsigned),
    "mxfp4": Rule(_e8m0, _from_e2m1, True),
    "mxfp8": Rule(_e8m0, _from_e4m3),
    "nvfp4": Rule(_nvfp4, _from_e2m1, True),
}
