"""
Scores of a router in float32: softmax, sigmoid and sqrt(softplus), for one logit and for a row.

One number gets the same bits alone and in a row. Rows are scored by loops that are small enough to become
vector code. A score that is not finite counts as 0.
"""

import math

import numpy as np

from cumoe.cpu._jit import jit
from cumoe.cpu.elementary import exp, sigmoid

SOFTMAX, SIGMOID, SQRTSOFTPLUS = 0, 1, 2
CODES = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}

_INFINITY, _NAN = np.float32(np.inf), np.float32(np.nan)
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_LN2_HIGH = np.float32(0.693359375)  # 9 bits, so that k * _LN2_HIGH is exact
_LN2_LOW = np.float32(-2.1219444005469057e-4)
_L3, _L5, _L7, _L9 = np.float32(2 / 3), np.float32(2 / 5), np.float32(2 / 7), np.float32(2 / 9)
_SOFTPLUS_IS_X = np.float32(20)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY_BITS = np.int32(0x7F800000)


@jit()
def log1p(t):
    """Return log(1 + t) of a t >= 0, within 1.7 units in the last place."""
    u = np.float32(_ONE + t)
    lost = np.float32(t - np.float32(u - _ONE))  # what rounding took from u, exactly
    bits = u.view(np.int32)
    k = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> np.int32(23))
    m = np.int32(bits - np.int32(k << np.int32(23))).view(np.float32)  # u = m * 2**k, sqrt(1/2) <= m < sqrt(2)
    f = np.float32(m - _ONE)
    s = f / (_TWO + f)
    z = s * s
    series = z * (_L3 + z * (_L5 + z * (_L7 + z * _L9)))
    half_square = _HALF * f * f
    scale = np.float32(k)
    # log(m) = f - (half_square - s * (half_square + series)): f is exact, the rest is small
    small = half_square - (s * (half_square + series) + (lost / u + scale * _LN2_LOW))
    return np.float32(scale * _LN2_HIGH + (f - small))


@jit()
def _exp_for_softplus(x):
    return exp(x if x < _SOFTPLUS_IS_X else _SOFTPLUS_IS_X)


@jit()
def _sqrt_softplus(x, t):
    """Finish from t = _exp_for_softplus(x); softplus(x) is x itself above 20, where log1p(t) stays at 20."""
    y = log1p(t)
    y = np.sqrt(y if y > x else x)
    return y if y < _INFINITY else _ZERO


@jit()
def _sigmoid_or_zero(x):
    y = sigmoid(x)
    return _ZERO if math.isnan(y) else y


@jit()
def score(x, top, scoring):
    """Score one logit; for softmax `top` is the greatest of its row, and the division is still to do."""
    if scoring == SOFTMAX:
        y = exp(x - top)
        return _ZERO if math.isnan(y) else y
    if scoring == SIGMOID:
        return _sigmoid_or_zero(x)
    return _sqrt_softplus(x, _exp_for_softplus(x))


@jit()
def score_row(x, top, scoring, out):
    """Score every element of `x`, like `score`."""
    if scoring == SOFTMAX:
        for e in range(x.size):
            y = exp(x[e] - top)
            out[e] = _ZERO if math.isnan(y) else y
    elif scoring == SIGMOID:
        for e in range(x.size):
            out[e] = _sigmoid_or_zero(x[e])
    else:
        for e in range(x.size):
            out[e] = _exp_for_softplus(x[e])
        for e in range(x.size):
            out[e] = _sqrt_softplus(x[e], out[e])


@jit()
def _ordered(bits):
    """Turn the bits of a float32 into an integer that grows with it, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@jit()
def softmax_top(x):
    """Return the greatest element, or NaN where no softmax exists: a NaN, a +inf, or nothing but -inf."""
    top, bottom = ~_MAGNITUDE, _MAGNITUDE
    for e in range(x.size):
        size = _ordered(np.float32(x[e]).view(np.int32))
        top = size if size > top else top
        bottom = size if size < bottom else bottom
    if top >= _INFINITY_BITS or top == ~_INFINITY_BITS or bottom < ~_INFINITY_BITS:  # NaNs lie beyond both infinities
        return _NAN
    return np.int32(_ordered(np.int32(top))).view(np.float32)


@jit()
def total(x):
    """Sum a row, in one order: four sums side by side, which do not wait for each other."""
    a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
    rest = x.size % 4
    for e in range(0, x.size - rest, 4):
        a += x[e]
        b += x[e + 1]
        c += x[e + 2]
        d += x[e + 3]
    for e in range(x.size - rest, x.size):
        a += x[e]
    return (a + b) + (c + d)
