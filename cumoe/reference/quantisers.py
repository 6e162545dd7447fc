"""
The quantisers in one piece: an operand to codes as they are stored, scales, zero points and global scale, and back.

Scales are float32, the dtype of the operand (int4, uint8), or uint8 codes of e8m0 and e4m3. Codes and zero points of
four bits come packed, two a byte. The rules are in `formats`.
"""

from typing import Any, NamedTuple

import numpy as np

from cumoe.reference import formats

Array = Any


class Parts(NamedTuple):
    """What is stored."""

    values: Array
    scale: Array
    zero_points: Array = None
    global_scale: Array = None


def quantize(
    x: Array,
    scheme: str,
    rows: int,
    cols: int,
    *,
    scale: Array = None,
    zero_points: bool | Array = False,
    global_scale: Array = None,
    scale_ub: float = np.inf,
    use_ue8m0: bool = False,
) -> Parts:
    """Codes and scales of `x`; a given scale is static."""
    low, high = formats.extremes(x, rows, cols)
    is_static, by_row = scale is not None, cols == -1
    if scheme == "nvfp4" and global_scale is None:
        global_scale = formats.nvfp4_global_scale(x)
    if scale is None:
        scale = {
            "fp8": lambda: formats.fp8_scale(low, high, by_row, scale_ub, use_ue8m0),
            "int8": lambda: formats.int8_scale(low, high),
            "int4": lambda: formats.unsigned_scale(low, high, scheme, zero_points is not False, x.dtype),
            "uint8": lambda: formats.unsigned_scale(low, high, scheme, zero_points is not False, x.dtype),
            "mxfp4": lambda: formats.mxfp4_scale(low, high),
            "mxfp8": lambda: formats.mxfp8_scale(low, high),
            "nvfp4": lambda: formats.nvfp4_scale(low, high, global_scale),
        }[scheme]()
    s = formats.spread(scale, x.shape, rows, cols)
    if scheme == "fp8":
        return Parts(formats.encode_fp8(x, s, is_static), scale)
    if scheme == "int8":
        dynamic = "even" if rows == -1 else "away" if by_row else "truncate"
        return Parts(formats.encode_int8(x, s, "even" if is_static else dynamic), scale)
    if scheme == "mxfp8":
        return Parts(formats.encode_mx(x, s, scheme), scale)
    if scheme == "mxfp4":
        return Parts(formats.pack(formats.encode_mx(x, s, scheme), -1), scale)
    if scheme == "nvfp4":
        return Parts(formats.pack(formats.encode_nvfp4(x, s, global_scale), -1), scale, None, global_scale)
    packs = scheme == "int4"
    if zero_points is False:
        codes = formats.encode_unsigned(x, s, np.uint8(8 if packs else 128), scheme)
        return Parts(formats.pack(codes, -1) if packs else codes, scale)
    if zero_points is True:
        zeros = formats.zero_point(low, scale, scheme)
    else:
        zeros = formats.unpack(zero_points, -2) if packs else zero_points
    codes = formats.encode_unsigned(x, s, formats.spread(zeros, x.shape, rows, cols), scheme)
    return Parts(*(formats.pack(codes, -1), scale, formats.pack(zeros, -2)) if packs else (codes, scale, zeros))


def dequantize(parts: Parts, scheme: str, rows: int, cols: int) -> Array:
    """Numbers of what is stored, float32."""
    codes = formats.unpack(parts.values, -1) if scheme in ("int4", "mxfp4", "nvfp4") else parts.values
    zeros = np.full(parts.scale.shape, 8 if scheme == "int4" else 128, np.uint8)
    if parts.zero_points is not None:
        zeros = formats.unpack(parts.zero_points, -2) if scheme == "int4" else parts.zero_points
    s, zeros = (formats.spread(one, codes.shape, rows, cols) for one in (parts.scale, zeros))
    return formats.decode(codes, s, scheme, zeros, parts.global_scale)
