"""
Gated activations: act(g, u) of each element, in float32, one rounding at the store.

`SCALAR` holds every activation as one function ``(g, u, alpha, beta, limit) -> float32`` of float32 numbers, for
the loop below and for the epilogue of grouped_gemm. ``limit`` = infinity means no clamp; a parameter that a formula
does not use is ignored. Clamps are comparisons written so that NaN stays NaN, and there is no branch on data.
"""

import numpy as np

from cumoe.cpu import bits, elementary, rows
from cumoe.cpu._jit import jit

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_LARGEST = np.float32(np.finfo(np.float32).max)
_SQRT_HALF = np.float32(0.7071067811865476)
# 0.5 (1 + tanh(z)) is the logistic function of 2 z, which has no cancellation for z < 0
_GELU_LINEAR = np.float32(2.0 * 0.7978845608028654)  # 2 sqrt(2 / pi)
_GELU_CUBIC = np.float32(2.0 * 0.7978845608028654 * 0.044715)


@jit(inline=True)
def _at_most(x, limit):
    return limit if x > limit else x


@jit(inline=True)
def _clamp(x, limit):
    x = limit if x > limit else x
    return -limit if x < -limit else x


@jit(inline=True)
def _silu(x):
    return x * elementary.sigmoid(x)


@jit(inline=True)
def _gelu(x):
    return _HALF * x * (_ONE + elementary.erf(x * _SQRT_HALF))


@jit(inline=True)
def _gelu_tanh(x):
    return x * elementary.sigmoid(x * elementary.multiply_add(x * x, _GELU_CUBIC, _GELU_LINEAR))


@jit(inline=True)
def _relu(x):
    return _ZERO if x < _ZERO else x


@jit(inline=True)
def silu(g, u, alpha, beta, limit):
    """Silu(min(g, limit)) * clamp(u, limit), where silu(x) = x * sigmoid(x)."""
    return _silu(_at_most(g, limit)) * _clamp(u, limit)


@jit(inline=True)
def gelu(g, u, alpha, beta, limit):
    """0.5 g (1 + erf(g / sqrt(2))) * u."""
    return _gelu(g) * u


@jit(inline=True)
def gelu_tanh(g, u, alpha, beta, limit):
    """0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g**3))) * u."""
    return _gelu_tanh(g) * u


@jit(inline=True)
def swigluoai(g, u, alpha, beta, limit):
    """G' sigmoid(alpha g') * (clamp(u, limit) + beta), where g' = min(g, limit)."""
    g = _at_most(g, limit)
    return (_clamp(u, limit) + beta) * (g * elementary.sigmoid(alpha * g))


@jit(inline=True)
def swiglustep(g, u, alpha, beta, limit):
    """Min(silu(g), limit) * clamp(u, limit)."""
    return _at_most(_silu(g), limit) * _clamp(u, limit)


@jit(inline=True)
def situ(g, u, alpha, beta, limit):
    """Beta tanh(g / beta) sigmoid(g) * limit tanh(u / limit); u itself for an infinite limit."""
    soft = limit * elementary.tanh(u / limit)
    u = u if limit > _LARGEST else soft
    return beta * elementary.tanh(g / beta) * elementary.sigmoid(g) * u


@jit(inline=True)
def reglu(g, u, alpha, beta, limit):
    """Max(g, 0) * u."""
    return _relu(g) * u


@jit(inline=True)
def relu2(g, u, alpha, beta, limit):
    """Max(g, 0)**2 * u."""
    r = _relu(g)
    return r * r * u


@jit(inline=True)
def identity(g, u, alpha, beta, limit):
    """G * u."""
    return g * u


@jit(inline=True)
def silu_no_mul(g, u, alpha, beta, limit):
    """Silu(g)."""
    return _silu(g)


@jit(inline=True)
def gelu_no_mul(g, u, alpha, beta, limit):
    """0.5 g (1 + erf(g / sqrt(2)))."""
    return _gelu(g)


@jit(inline=True)
def gelu_tanh_no_mul(g, u, alpha, beta, limit):
    """0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g**3)))."""
    return _gelu_tanh(g)


@jit(inline=True)
def relu_no_mul(g, u, alpha, beta, limit):
    """Max(g, 0)."""
    return _relu(g)


@jit(inline=True)
def relu2_no_mul(g, u, alpha, beta, limit):
    """Max(g, 0)**2."""
    r = _relu(g)
    return r * r


@jit(inline=True)
def identity_no_mul(g, u, alpha, beta, limit):
    """G."""
    return g


SCALAR = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "swigluoai": swigluoai,
    "swigluoai_uninterleave": swigluoai,
    "swiglustep": swiglustep,
    "situ": situ,
    "reglu": reglu,
    "relu": reglu,
    "relu2": relu2,
    "geglu": gelu,
    "identity": identity,
    "silu_no_mul": silu_no_mul,
    "gelu_no_mul": gelu_no_mul,
    "gelu_tanh_no_mul": gelu_tanh_no_mul,
    "gelu_pytorch_tanh_no_mul": gelu_tanh_no_mul,
    "relu_no_mul": relu_no_mul,
    "relu2_no_mul": relu2_no_mul,
    "identity_no_mul": identity_no_mul,
}


# constants of the templates below; rows.run(...) sets them
ACT = silu
LOAD, STORE = bits.CODECS["float32"]


def _halves(first, last, arguments):
    x, alpha, beta, limit, out = arguments
    size = out.shape[1]
    for r in range(first, last):
        for i in range(size):
            out[r, i] = STORE(ACT(LOAD(x[r, i]), LOAD(x[r, size + i]), alpha, beta, limit))


def _interleaved(first, last, arguments):
    x, alpha, beta, limit, out = arguments
    for r in range(first, last):
        for i in range(out.shape[1]):
            out[r, i] = STORE(ACT(LOAD(x[r, 2 * i]), LOAD(x[r, 2 * i + 1]), alpha, beta, limit))


def _alone(first, last, arguments):
    x, alpha, beta, limit, out = arguments
    for r in range(first, last):
        for i in range(out.shape[1]):
            g = LOAD(x[r, i])
            out[r, i] = STORE(ACT(g, g, alpha, beta, limit))


def moe_activation(x, activation, interleaved, dtype, alpha, beta, limit, out):
    """
    Fill ``out`` (R, I) from ``x`` (R, 2I), or from ``x`` (R, I) for a name that ends in ``_no_mul``.

    `dtype` names what the bits of both mean: float32, bfloat16 or float16.
    """
    load, store = bits.CODECS[dtype]
    template = _alone if activation.endswith("_no_mul") else _interleaved if interleaved else _halves
    arguments = x, np.float32(alpha), np.float32(beta), np.float32(limit), out
    rows.run(template, len(out), out.size, arguments, ACT=SCALAR[activation], LOAD=load, STORE=store)
