"""
Small number formats and their quantisers, exactly: what each code is worth, and which code each number gets.

An operand is (..., N, K); one scale serves a group of `rows` x `cols` of its last two axes, -1 for a whole axis, and
the groups at the ends may be smaller. Scales have as many axes as the operand, one entry a group. Codes are worked on
unpacked here, one a byte; `pack` is how two of four bits share one.

Arithmetic. Operands are float32, float16 or bfloat16 and finite; they become float32, which is exact. A rule marked
*float32* rounds to float32 after every operation that it shows, so that its bits are defined. Everything else is exact
(float64 holds it). `nearest` takes the nearest code, the even one of two, and the largest beyond the range; the sign of
a number that becomes zero is kept where the format has a negative zero.

Scales, from ``a = max |x|``, ``hi = max(x, 0)``, ``lo = min(x, 0)`` of the group, float32:

===================== ==========================================================================================
fp8, tensor or token  ``max(min(a, scale_ub) / 448, 1 / (448 * 512))``
fp8, other groups     ``max(a, 1e-10) / 448``
fp8, use_ue8m0        the power of two at or above that
int8                  ``max(a, 1e-10) / 127``
int4                  ``max(max(hi, 1e-10) / 7, lo / -8)``, zero point 8
int4, zero points     ``max(hi / 2 - lo / 2, 0.5e-10) / 7.5``, zero point ``-lo / s`` to the nearest, within 0..15
uint8                 ``max(a, 1e-10) / 127``, zero point 128
uint8, zero points    ``max(hi / 2 - lo / 2, 0.5e-10) / 127.5``, zero point ``-lo / s`` to the nearest, within 0..255
mxfp4                 ``2**e``, e = (exponent of a, with 0x200000 added to its bits) - 2, at least -127
mxfp8                 ``2**e``, the smallest with ``a <= 448 * 2**e``, e at least -127 (exact)
nvfp4                 e4m3 of ``min(gs * a / 6, 448)``, where gs, one for each matrix, is ``2688 / max(a, 1e-10)``
===================== ==========================================================================================

The scales of int4 and uint8 are stored in the dtype of the operand, rounded to the nearest and at least its smallest
positive number; the codes are those of the stored scale. Codes, float32 before the rounding:

============================ ===================================================================================
fp8, dynamic scale           `nearest` of ``x / s``
fp8, static (given) scale    `nearest` of ``x * (1 / s)``
int8, static scale           ``x / s``, ties to even
int8, dynamic                the same per tensor; ties away from zero per token; truncated in other groups
int4, uint8                  ``x / s``, ties to even, plus the zero point
mxfp4, mxfp8                 `nearest` of ``x / 2**e``
nvfp4                        `nearest` of ``x * (gs / s)``; 0 for gs / s if s = 0
============================ ===================================================================================

Integers are cut to -128..127, 0..15 and 0..255. A code is worth, float32: ``code * s``; int4 and uint8
``(code - zero point) * s``; nvfp4 ``code * (s / gs)``.
"""

from typing import Any

import ml_dtypes
import numpy as np

Array = Any


def float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """Values of the codes 0, 1, ... without a sign: subnormals, then ``(1 + m) 2**(e - bias)``."""
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))


_E4M3 = float_values(4, 3, 7)[:-1]  # 0, 2**-9, ..., 448; the last code is NaN
_E2M1 = float_values(2, 1, 1)  # 0, .5, 1, 1.5, 2, 3, 4, 6

# value of every code
E4M3 = np.concatenate([_E4M3, [np.nan], -_E4M3, [np.nan]])
E2M1 = np.concatenate([_E2M1, -_E2M1])
E8M0 = np.concatenate([2.0 ** np.arange(-127.0, 128.0), [np.nan]])

LARGEST_CODE = {"int4": 15, "uint8": 255}  # of the schemes with a zero point; half of one more stands for zero


def nearest(values: Array, table: Array) -> Array:
    """Code of the entry of `table`, ascending from 0, that is nearest to ``|value|``: even at ties, the last beyond."""
    middle = (table[1:] + table[:-1]) / 2
    with np.errstate(invalid="ignore"):  # signalling NaNs
        size = np.abs(values.astype(np.float64))
    code = np.searchsorted(middle, size, side="left")  # how many middles lie below
    tie = size == np.append(middle, np.inf)[code]
    return np.minimum(code + (tie & (code % 2 == 1)), len(table) - 1).astype(np.uint8)


def e4m3(values: Array) -> Array:
    """Nearest e4m3 code, 448 beyond it; NaN for NaN."""
    code = nearest(values, _E4M3) | (np.signbit(values).astype(np.uint8) << 7)
    return np.where(np.isnan(values), np.uint8(0x7F), code)


def e2m1(values: Array) -> Array:
    """Nearest e2m1 code, 6 beyond it; 0 for NaN."""
    code = nearest(values, _E2M1) | (np.signbit(values).astype(np.uint8) << 3)
    return np.where(np.isnan(values), np.uint8(0), code)


def integers(values: Array, rounding: str, low: int, high: int) -> Array:
    """Round "even", "away" or "truncate", then cut to the range; 0 for NaN."""
    values = np.where(np.isnan(values), 0, values.astype(np.float64))
    away = np.sign(values) * np.floor(np.abs(values) + 0.5)
    rounded = {"even": np.rint(values), "away": away, "truncate": np.trunc(values)}[rounding]
    return np.clip(rounded, low, high).astype(np.int64)


# ---- groups ----


def num_groups(size: int, group: int) -> int:
    """Groups along an axis; the last may be smaller, and -1 is one group, of an empty axis too."""
    return 1 if group == -1 else -(-size // group)


def spread(scale: Array, shape: tuple[int, ...], rows: int, cols: int) -> Array:
    """Repeat the entry of each group for each of its elements."""
    rows, cols = (shape[-2] if rows == -1 else rows), (shape[-1] if cols == -1 else cols)
    return scale.repeat(rows, axis=-2)[..., : shape[-2], :].repeat(cols, axis=-1)[..., : shape[-1]]


def extremes(x: Array, rows: int, cols: int) -> tuple[Array, Array]:
    """``min(x, 0)`` and ``max(x, 0)`` of each group, float32."""
    *lead, n, k = x.shape
    down, across = num_groups(n, rows), num_groups(k, cols)
    rows, cols = (max(n, 1) if rows == -1 else rows), (max(k, 1) if cols == -1 else cols)
    padded = np.zeros((*lead, down * rows, across * cols), np.float32)
    padded[..., :n, :k] = x
    groups = padded.reshape(*lead, down, rows, across, cols)
    return groups.min(axis=(-3, -1), initial=0), groups.max(axis=(-3, -1), initial=0)


def absmax(low: Array, high: Array) -> Array:
    """``max |x|``, never the negative zero."""
    return np.maximum(high, -low) + np.float32(0)


# ---- scales ----


def power_of_two(s: Array) -> Array:
    """The smallest power of two that is not below a positive float32."""
    mantissa, exponent = np.frexp(s)
    return np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)


def fp8_scale(low: Array, high: Array, tensor_or_token: bool, scale_ub: float, use_ue8m0: bool) -> Array:
    """Scale of an fp8 group."""
    size = absmax(low, high)
    if tensor_or_token:
        smallest = np.float32(1) / np.float32(448 * 512)
        s = np.maximum(np.minimum(size, np.float32(scale_ub)) / np.float32(448), smallest)
    else:
        s = np.maximum(size, np.float32(1e-10)) / np.float32(448)
    return power_of_two(s) if use_ue8m0 else s


def int8_scale(low: Array, high: Array) -> Array:
    """Scale of an int8 group."""
    return np.maximum(absmax(low, high), np.float32(1e-10)) / np.float32(127)


def unsigned_scale(low: Array, high: Array, scheme: str, zero_points: bool, dtype: np.dtype) -> Array:
    """Scale of an int4 or uint8 group, as `dtype` stores it."""
    if zero_points:
        half = np.maximum(high * np.float32(0.5) - low * np.float32(0.5), np.float32(0.5e-10))
        s = half / np.float32(LARGEST_CODE[scheme] / 2)
    elif scheme == "int4":
        s = np.maximum(np.maximum(high, np.float32(1e-10)) / np.float32(7), low / np.float32(-8))
    else:
        s = int8_scale(low, high)
    return np.maximum(s.astype(dtype), ml_dtypes.finfo(dtype).smallest_subnormal)


def zero_point(low: Array, scale: Array, scheme: str) -> Array:
    """Zero point of an int4 or uint8 group."""
    return integers(-low / scale.astype(np.float32), "even", 0, LARGEST_CODE[scheme]).astype(np.uint8)


def mxfp4_scale(low: Array, high: Array) -> Array:
    """The e8m0 code of an mxfp4 group."""
    raised = absmax(low, high).view(np.uint32) + np.uint32(0x200000)
    exponent = (raised >> 23).astype(np.int64) - 127  # -127 for zero and the smallest numbers, as it should be
    return (np.maximum(exponent - 2, -127) + 127).astype(np.uint8)


def mxfp8_scale(low: Array, high: Array) -> Array:
    """The e8m0 code of an mxfp8 group."""
    size = absmax(low, high).astype(np.float64)
    code = np.searchsorted(448 * E8M0[:-1], size, side="left")  # the first that is not below
    return code.astype(np.uint8)


def nvfp4_global_scale(x: Array) -> Array:
    """``2688 / max(a, 1e-10)`` of each matrix: the largest block scale becomes 448."""
    low, high = extremes(x, -1, -1)
    return np.float32(448 * 6) / np.maximum(absmax(low, high), np.float32(1e-10))[..., 0, 0]


def nvfp4_scale(low: Array, high: Array, global_scale: Array) -> Array:
    """The e4m3 code of an nvfp4 group."""
    with np.errstate(over="ignore"):
        return e4m3(global_scale[..., None, None] * absmax(low, high) / np.float32(6))


# ---- codes of numbers, numbers of codes; each array is spread already ----


def encode_fp8(x: Array, s: Array, static: bool) -> Array:
    """e4m3 codes; a static scale is inverted first."""
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        return e4m3(x * (np.float32(1) / s) if static else x / s)


def encode_int8(x: Array, s: Array, rounding: str) -> Array:
    """int8 codes."""
    with np.errstate(all="ignore"):
        return integers(x.astype(np.float32) / s, rounding, -128, 127).astype(np.int8)


def encode_unsigned(x: Array, s: Array, zero_point: Array, scheme: str) -> Array:
    """int4 or uint8 codes."""
    with np.errstate(all="ignore"):
        ratio = x.astype(np.float32) / s.astype(np.float32)
    return np.clip(integers(ratio, "even", -999, 999) + zero_point, 0, LARGEST_CODE[scheme]).astype(np.uint8)


def encode_mx(x: Array, s: Array, scheme: str) -> Array:
    """e2m1 or e4m3 codes of numbers whose scales are e8m0 codes."""
    exact = x.astype(np.float64) / E8M0[s]
    return e2m1(exact) if scheme == "mxfp4" else e4m3(exact)


def encode_nvfp4(x: Array, s: Array, global_scale: Array) -> Array:
    """e2m1 codes of numbers whose scales are e4m3 codes."""
    with np.errstate(all="ignore"):
        factor = global_scale[..., None, None] / E4M3[s].astype(np.float32)
        return e2m1(x.astype(np.float32) * np.where(E4M3[s] == 0, np.float32(0), factor))


def decode(codes: Array, s: Array, scheme: str, zero_point: Array = None, global_scale: Array = None) -> Array:
    """Numbers of codes, float32."""
    with np.errstate(all="ignore"):
        if scheme == "int8":
            return codes.astype(np.float32) * s
        if scheme in LARGEST_CODE:
            return (codes.astype(np.float32) - zero_point.astype(np.float32)) * s.astype(np.float32)
        value = (E4M3 if scheme in ("fp8", "mxfp8") else E2M1)[codes].astype(np.float32)
        if scheme == "fp8":
            return value * s
        if scheme == "nvfp4":
            return value * (E4M3[s].astype(np.float32) / global_scale[..., None, None])
        return value * E8M0[s].astype(np.float32)


# ---- storage ----


def pack(codes: Array, axis: int) -> Array:
    """Two codes of four bits in each byte along `axis`, the even one in the low bits."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint8)
    return np.moveaxis(codes[..., 0::2] | codes[..., 1::2] << 4, -1, axis)


def unpack(packed: Array, axis: int) -> Array:
    """The codes of `pack`."""
    packed = np.moveaxis(packed, axis, -1)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return np.moveaxis(codes, -1, axis)


def swizzle(scales: Array) -> Array:
    """
    Element by element: (M, K), padded by zeros to multiples of 128 and 4, in the order of Blackwell's tensor cores.

    Blocks of 128 rows and 4 columns follow each other along K; in a block, rows r, r + 32, r + 64 and r + 96 stand
    side by side, four columns each, for r = 0, ..., 31.
    """
    m, k = scales.shape
    down, across = -(-m // 128), -(-k // 4)
    out = np.zeros(down * across * 512, scales.dtype)
    for r in range(m):
        for c in range(k):
            block = (r // 128) * across + c // 4
            out[block * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scales[r, c]
    return out.reshape(down * 128, across * 4)
