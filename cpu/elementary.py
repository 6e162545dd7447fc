"""
exp, tanh, erf and the logistic function of one float32, built so that a plain loop over them is vector code.

There is no branch, no table and no call: one polynomial (for exp(r) - 1), shifts, selects, and for two of
them one division. tests/test_elementary.py measures the errors and says how large they may be.

All four know infinities, NaN comes out as NaN, and -0.0 keeps its sign where the function is odd.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cumoe.cpu._jit import jit

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two steps: 355 / 512 has so few bits that n * _LN2_HIGH is exact for every n that occurs
_LN2_HIGH = np.float32(355.0 / 512.0)
_LN2_LOW = np.float32(-2.1219444005469057e-4)
# added to a small number, 1.5 * 2**23 leaves the nearest integer in the low bits of the sum
_ROUND = np.float32(12582912.0)
_ROUND_BITS = np.int32(0x4B400000)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_SIGN = np.uint32(0x80000000)
_SIZE = np.uint32(0x7FFFFFFF)

# (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2: minimax in the relative error of exp(r) - 1, 0.22 * 2**-24
_Q0 = np.float32(0.499999981498)
_Q1 = np.float32(0.166665434239)
_Q2 = np.float32(0.0416672006667)
_Q3 = np.float32(0.00836654717168)
_Q4 = np.float32(0.00138825189658)

# -log(erfc(a)) / a - 1 for 0 <= a <= 4: minimax in the relative error of erf(a), 0.07 * 2**-24
_E0 = np.float32(0.12837917161)
_E1 = np.float32(0.636619381956)
_E2 = np.float32(0.102777830624)
_E3 = np.float32(-0.0191530643662)
_E4 = np.float32(-0.000160395169578)
_E5 = np.float32(0.00166702653816)
_E6 = np.float32(-0.000632836340494)
_E7 = np.float32(0.000117641125235)
_E8 = np.float32(-9.25624868533e-6)


@intrinsic
def multiply_add(typingctx, a, b, c):
    """Give a * b + c, with one rounding where the CPU has such an instruction and with two where it has not."""

    def emit(context, builder, signature, arguments):
        name = "llvm.fmuladd.f32"
        kind = ir.FloatType()
        declared = builder.module.globals.get(name)
        if declared is None:
            declared = ir.Function(builder.module, ir.FunctionType(kind, (kind, kind, kind)), name)
        return builder.call(declared, arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


@jit(inline=True)
def _power_of_two(n):
    """2**n for an int32 n in -126..127, from the exponent bits alone."""
    return np.int32(np.int32(n + np.int32(127)) << np.int32(23)).view(np.float32)


@jit(inline=True)
def _reduce(x):
    """Integer n nearest to x / ln(2) and exp(x - n ln(2)) - 1, for |x| < 2**15; NaN in the second for NaN."""
    shifted = multiply_add(x, _LOG2_E, _ROUND)
    n = np.float32(shifted - _ROUND)
    r = multiply_add(n, -_LN2_LOW, multiply_add(n, -_LN2_HIGH, x))
    q = multiply_add(r, _Q4, _Q3)
    q = multiply_add(r, q, _Q2)
    q = multiply_add(r, q, _Q1)
    q = multiply_add(r, q, _Q0)
    return np.int32(np.float32(shifted).view(np.int32) - _ROUND_BITS), multiply_add(np.float32(r * r), q, r)


@jit(inline=True)
def _expm1(x):
    """exp(x) - 1 for x in -80..80, without cancellation near 0."""
    n, e = _reduce(x)
    scale = _power_of_two(n)
    return multiply_add(scale, e, np.float32(scale - _ONE))


@jit(inline=True)
def _with_sign_of(value, x):
    """The magnitude of `value` with the sign bit of x."""
    size = np.uint32(np.float32(value).view(np.uint32) & _SIZE)
    return np.uint32(size | np.uint32(np.float32(x).view(np.uint32) & _SIGN)).view(np.float32)


@jit(inline=True)
def _magnitude(x):
    return np.uint32(np.float32(x).view(np.uint32) & _SIZE).view(np.float32)


@jit(inline=True)
def exp(x):
    """exp(x); subnormal results are kept, and become zero only on a thread that flushes them."""
    # the comparisons are written so that NaN stays
    x = np.float32(89.0) if x > np.float32(89.0) else x  # beyond the largest finite result
    x = np.float32(-104.0) if x < np.float32(-104.0) else x  # below half of the smallest one
    n, e = _reduce(x)
    half = np.int32(n >> np.int32(1))  # 2**n in two factors: n reaches -150 and 128
    return np.float32(np.float32(np.float32(e + _ONE) * _power_of_two(half)) * _power_of_two(np.int32(n - half)))


@jit(inline=True)
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return np.float32(_ONE / np.float32(_ONE + exp(np.float32(-x))))


@jit(inline=True)
def tanh(x):
    """tanh(a) = e / (e + 2) with e = exp(2 a) - 1 and a = |x|."""
    a = _magnitude(x)
    a = np.float32(10.0) if a > np.float32(10.0) else a  # 1 to float32 from 9.02 on
    e = _expm1(np.float32(a + a))
    return _with_sign_of(np.float32(e / np.float32(e + _TWO)), x)


@jit(inline=True)
def erf(x):
    """erf(a) = 1 - exp(-a - a R(a)) with a = |x|: R is smooth, and exp(.) - 1 loses nothing near 0."""
    a = _magnitude(x)
    a = np.float32(4.0) if a > np.float32(4.0) else a  # 1 to float32 from 3.83 on
    r = multiply_add(a, _E8, _E7)
    r = multiply_add(a, r, _E6)
    r = multiply_add(a, r, _E5)
    r = multiply_add(a, r, _E4)
    r = multiply_add(a, r, _E3)
    r = multiply_add(a, r, _E2)
    r = multiply_add(a, r, _E1)
    r = multiply_add(a, r, _E0)
    return _with_sign_of(_expm1(np.float32(-multiply_add(a, r, a))), x)
