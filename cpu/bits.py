"""
Small floats as kernels hold them: one code in, one float32 out, and back.

`bfloat16` and `float16` arrive as uint16 because Numba knows neither, the formats of 8 and 4 bits as uint8.
Every function is branch-free integer arithmetic and selects, so that a loop that calls it on consecutive
elements becomes vector code. Encoding rounds to nearest, ties to even; infinities, signed zeros, subnormals
and NaNs (sign and leading payload bits, always quiet) are kept. The formats without infinities saturate.
"""

import numpy as np

from cumoe.cpu._jit import jit


@jit(inline=True)
def float32_from_float32(value):
    """Nothing to do: lets one template serve all three dtypes."""
    return value


@jit(inline=True)
def float32_from_bfloat16(code):
    """The value of a bfloat16 code."""
    return np.uint32(np.uint32(code) << np.uint32(16)).view(np.float32)


@jit(inline=True)
def bfloat16_from_float32(value):
    """The nearest bfloat16 code."""
    u = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1))
    nearest = np.uint32(np.uint32(u + np.uint32(0x7FFF)) + odd)
    quiet = np.uint32(u | np.uint32(0x00400000))
    is_nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(quiet if is_nan else nearest) >> np.uint32(16))


@jit(inline=True)
def float32_from_float16(code):
    """The value of a float16 code."""
    sign = np.uint32(np.uint32(np.uint32(code) & np.uint32(0x8000)) << np.uint32(16))
    size = np.uint32(np.uint32(code) & np.uint32(0x7FFF))
    # exponent bias 15 -> 127; infinity and NaN (31 -> 255) need the same step once more
    step = np.uint32(112 << 23)
    normal = np.uint32(np.uint32(size << np.uint32(13)) + step)
    special = np.uint32(normal + step)
    # a subnormal is an integer times 2**-24
    small = np.float32(np.float32(np.int32(size)) * np.float32(2.0**-24)).view(np.uint32)
    finite = np.uint32(small if size < np.uint32(0x0400) else normal)
    return np.uint32(sign | np.uint32(special if size >= np.uint32(0x7C00) else finite)).view(np.float32)


@jit(inline=True)
def float16_from_float32(value):
    """The nearest float16 code."""
    u = np.float32(value).view(np.uint32)
    sign = np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(u & np.uint32(0x7FFFFFFF))
    rebased = np.uint32(size - np.uint32(112 << 23))
    odd = np.uint32(np.uint32(rebased >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(rebased + np.uint32(0x0FFF)) + odd) >> np.uint32(13))
    # below 2**-14 one float16 step is 2**-24, which is also the step of float32 at 0.5:
    # the addition rounds, and the low bits of the sum are the code
    shifted = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32)
    small = np.uint32(shifted - np.uint32(0x3F000000))
    finite = np.uint32(small if size < np.uint32(0x38800000) else normal)
    # from 65520 on `normal` has already carried into infinity; from 65536 on it would run past it
    finite = np.uint32(finite if size < np.uint32(0x47800000) else np.uint32(0x7C00))
    payload = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(0x01FF))
    nan = np.uint32(np.uint32(0x7E00) | payload)
    return np.uint16(sign | np.uint32(nan if size > np.uint32(0x7F800000) else finite))


@jit(inline=True)
def float32_from_float8_e4m3fn(code):
    """The value of an e4m3 code."""
    sign = np.uint32(np.uint32(np.uint32(code) & np.uint32(0x80)) << np.uint32(24))
    size = np.uint32(np.uint32(code) & np.uint32(0x7F))
    normal = np.uint32(np.uint32(size << np.uint32(20)) + np.uint32(120 << 23))  # exponent bias 7 -> 127
    small = np.float32(np.float32(np.int32(size)) * np.float32(2.0**-9)).view(np.uint32)
    finite = np.uint32(small if size < np.uint32(0x08) else normal)
    return np.uint32(sign | np.uint32(np.uint32(0x7FC00000) if size == np.uint32(0x7F) else finite)).view(np.float32)


@jit(inline=True)
def float8_e4m3fn_from_float32(value):
    """The nearest e4m3 code, 448 for everything beyond it; 0x7F for NaN."""
    u = np.float32(value).view(np.uint32)
    sign = np.uint32(np.uint32(u >> np.uint32(24)) & np.uint32(0x80))
    size = np.uint32(u & np.uint32(0x7FFFFFFF))
    is_nan = size > np.uint32(0x7F800000)
    size = np.uint32(size if size < np.uint32(0x43E00000) else np.uint32(0x43E00000))
    rebased = np.uint32(size - np.uint32(120 << 23))
    odd = np.uint32(np.uint32(rebased >> np.uint32(20)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(rebased + np.uint32(0x0007FFFF)) + odd) >> np.uint32(20))
    # below 2**-6 one step is 2**-9, which is also the step of float32 at 2**14: the addition rounds
    shifted = np.float32(size.view(np.float32) + np.float32(2.0**14)).view(np.uint32)
    small = np.uint32(shifted - np.uint32(141 << 23))
    code = np.uint32(sign | np.uint32(small if size < np.uint32(0x3C800000) else normal))
    return np.uint8(np.uint32(0x7F) if is_nan else code)


@jit(inline=True)
def float32_from_float8_e8m0fnu(code):
    """The value of an e8m0 code, ``2**(code - 127)``; 255 is NaN."""
    u = np.uint32(code)
    power = np.uint32(np.uint32(0x00400000) if u == np.uint32(0) else np.uint32(u << np.uint32(23)))
    return np.uint32(np.uint32(0x7FC00000) if u == np.uint32(255) else power).view(np.float32)


@jit(inline=True)
def float32_from_float4_e2m1fn(code):
    """The value of an e2m1 code, which is the low four bits."""
    sign = np.uint32(np.uint32(np.uint32(code) & np.uint32(0x8)) << np.uint32(28))
    size = np.uint32(np.uint32(code) & np.uint32(0x7))
    normal = np.uint32(np.uint32(size << np.uint32(22)) + np.uint32(126 << 23))  # exponent bias 1 -> 127
    small = np.float32(np.float32(np.int32(size)) * np.float32(0.5)).view(np.uint32)
    return np.uint32(sign | np.uint32(small if size < np.uint32(0x2) else normal)).view(np.float32)


@jit(inline=True)
def float4_e2m1fn_from_float32(value):
    """The nearest e2m1 code, 6 for everything beyond it; 0 for NaN, which the format lacks."""
    u = np.float32(value).view(np.uint32)
    sign = np.uint32(np.uint32(u >> np.uint32(28)) & np.uint32(0x8))
    size = np.uint32(u & np.uint32(0x7FFFFFFF))
    is_nan = size > np.uint32(0x7F800000)
    size = np.uint32(size if size < np.uint32(0x40C00000) else np.uint32(0x40C00000))
    rebased = np.uint32(size - np.uint32(126 << 23))
    odd = np.uint32(np.uint32(rebased >> np.uint32(22)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(rebased + np.uint32(0x001FFFFF)) + odd) >> np.uint32(22))
    # below 1 one step is 0.5, which is also the step of float32 at 2**22: the addition rounds
    shifted = np.float32(size.view(np.float32) + np.float32(2.0**22)).view(np.uint32)
    small = np.uint32(shifted - np.uint32(149 << 23))
    code = np.uint32(sign | np.uint32(small if size < np.uint32(0x3F800000) else normal))
    return np.uint8(np.uint32(0) if is_nan else code)


# dtype name -> (code to float32, float32 to code), for templates specialised through jit(load=, store=)
CODECS = {
    "float32": (float32_from_float32, float32_from_float32),
    "bfloat16": (float32_from_bfloat16, bfloat16_from_float32),
    "float16": (float32_from_float16, float16_from_float32),
}
