"""
Activations between the two products: ``a = A(g) * B(u)`` of a gate g and an up u, or ``a = A(g)`` alone.

`ACTIVATIONS` holds the formula of each name in float64, what it takes, and how far a float32 computation
may be from it.

The bound. A computation has g' and u' with ``|g' - g| <= e_g`` and ``|u' - u| <= e_u`` and evaluates both
factors in float32. A factor F of x, with slope S >= sup |F'| and a size s >= |F| that rounding is
relative to, is then off by at most

    dF = S e + UNITS (s + S e) + TINY (1 + s)

and the product by

    dA |B| + |A| dB + dA dB + UNITS (|A| + dA) (|B| + dB) + FLUSH

UNITS is 16 float32 roundings. The worst factor, gelu, needs about 6: three for erf, two for the sum 1 + erf,
one for the product; the rest is room for a GPU's exp (2 ulp, and 1.2 ulp more for each unit of its argument,
but there the logistic function falls faster than that grows) and for approximate division. The size is that
of the argument and not of the result, because 1 + erf cancels for g < 0. Parameters are rounded to float32
too (1.702 is none), which moves an argument by less than one of the 16. TINY and FLUSH let every subnormal
count as zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cumoe.reference.rounding import FLUSH

UNITS = 16 * 2.0**-24
_LARGEST = float(np.finfo(np.float32).max)

Array = Any  # float64 NumPy array
Formula = Callable[[Array, float, float, float], Array]  # of g or u, alpha, beta, limit


def _constant(slope: float) -> Callable[[Array], Array]:
    return lambda reach: np.full_like(reach, slope)


class Factor(NamedTuple):
    """A(g) or B(u): the formula, its size s, and its slope S as a function of the largest argument; S >= 1."""

    value: Formula
    size: Formula
    slope: Callable[[Array], Array] = _constant(1.0)

    def bounded(self, x: Array, e: Array, tiny: float, *parameters: float) -> tuple[Array, Array]:
        """|F(x)| and dF."""
        reach = np.abs(x) + e
        moved = np.where(e == 0, 0.0, self.slope(reach) * e)
        size = self.size(x, *parameters) + moved
        error = moved + UNITS * size + tiny * (1 + size)
        return np.abs(self.value(x, *parameters)), np.where((e > 0) & (reach > _LARGEST), np.inf, error)


@dataclass(frozen=True)
class Activation:
    """One activation: its factors, the parameters that it takes and their defaults, and the layout of g and u."""

    gate: Factor
    up: Factor | None  # None: not gated
    takes: tuple[str, ...] = ()
    alpha: float | None = 1.0  # None: must be given
    beta: float | None = 0.0
    limit: float | None = math.inf
    interleaved: bool = False  # g and u alternate; else all g, then all u
    soft: bool = False  # divides by beta and limit, and multiplies what may have underflown by them

    @property
    def is_gated(self) -> bool:
        """Takes a gate and an up."""
        return self.up is not None

    def parameters(
        self, alpha: float | None = None, beta: float | None = None, limit: float | None = None
    ) -> tuple[float, float, float]:
        """Return what is given, and the default where it is None."""
        chosen = []
        for name, given in (("alpha", alpha), ("beta", beta), ("limit", limit)):
            value = getattr(self, name) if given is None else given
            if value is None:
                raise ValueError(f"{name} must be given for this activation, got None")
            chosen.append(float(value))
        return chosen[0], chosen[1], chosen[2]

    def value(self, g: Array, u: Array | None, alpha: float, beta: float, limit: float) -> Array:
        """``A(g) * B(u)``."""
        with np.errstate(all="ignore"):
            a = self.gate.value(_float64(g), alpha, beta, limit)
            return a if self.up is None else a * self.up.value(_float64(u), alpha, beta, limit)

    def error(
        self, g: Array, u: Array | None, e_g: Array, e_u: Array | None, alpha: float, beta: float, limit: float
    ) -> Array:
        """
        Bound on ``|float32 activation of g', u' - value(g, u)|``; inf where float32 may overflow on the way.

        Where `value` is not finite there is no bound: inf or NaN.
        """
        scale = beta + (limit if math.isfinite(limit) else 0.0) if self.soft else 0.0
        tiny = 4 * FLUSH * (1 + scale)
        with np.errstate(all="ignore"):
            a, d_a = self.gate.bounded(_float64(g), _float64(e_g), tiny, alpha, beta, limit)
            if self.up is None:
                return np.where(a + d_a > _LARGEST, np.inf, d_a)
            b, d_b = self.up.bounded(_float64(u), _float64(e_u), tiny, alpha, beta, limit)
            error = d_a * b + a * d_b + d_a * d_b + UNITS * (a + d_a) * (b + d_b) + FLUSH
            largest = np.maximum(a + d_a, 1) * np.maximum(b + d_b, 1)
            return np.where(largest > _LARGEST, np.inf, error)


def split(h: Array, name: str) -> tuple[Array, Array | None]:
    """Gate and up of the last axis of `h`, as the activation `name` stores them; (h, None) without a gate."""
    rule = ACTIVATIONS[name]
    if not rule.is_gated:
        return h, None
    if rule.interleaved:
        return h[..., 0::2], h[..., 1::2]
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


def is_gated(name: str) -> bool:
    """Whether the activation `name` takes a gate and an up; names in ``_no_mul`` do not."""
    return ACTIVATIONS[name].is_gated


def _float64(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


# ---- formulas of one number ----

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _gelu(x: Array) -> Array:
    return 0.5 * x * _erfc(-x / math.sqrt(2))  # 1 + erf(z) = erfc(-z), without cancellation


def _gelu_tanh(x: Array) -> Array:
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * _sigmoid(2 * z)  # 0.5 (1 + tanh(z)) = sigmoid(2 z), without cancellation


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _relu2(x: Array) -> Array:
    return np.maximum(x, 0) ** 2


def _same(x: Array) -> Array:
    return x


def _clamp(x: Array, limit: float) -> Array:
    return np.minimum(np.maximum(x, -limit), limit)  # NaN stays


# ---- factors ----


def _plain(formula: Callable[[Array], Array]) -> Formula:
    return lambda x, alpha, beta, limit: formula(x)


def _capped_size(x: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.abs(np.minimum(x, limit))


def _silu_capped(g: Array, alpha: float, beta: float, limit: float) -> Array:
    return _silu(np.minimum(g, limit))


def _clamped(u: Array, alpha: float, beta: float, limit: float) -> Array:
    return _clamp(u, limit)


def _clamped_size(u: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.abs(_clamp(u, limit))


def _swigluoai(g: Array, alpha: float, beta: float, limit: float) -> Array:
    g = np.minimum(g, limit)
    return g * _sigmoid(alpha * g)


def _swigluoai_up(u: Array, alpha: float, beta: float, limit: float) -> Array:
    return _clamp(u, limit) + beta


def _swigluoai_up_size(u: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.abs(_clamp(u, limit)) + abs(beta)


def _swiglustep(g: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.minimum(_silu(g), limit)


def _swiglustep_size(g: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.abs(np.minimum(g, 4 * limit))  # silu(g) >= g / 2 > limit beyond: the minimum is the limit itself


def _situ(g: Array, alpha: float, beta: float, limit: float) -> Array:
    return beta * np.tanh(g / beta) * _sigmoid(g)


def _situ_size(g: Array, alpha: float, beta: float, limit: float) -> Array:
    return np.minimum(np.abs(g), beta)


def _situ_up(u: Array, alpha: float, beta: float, limit: float) -> Array:
    return limit * np.tanh(u / limit) if math.isfinite(limit) else u


# sup |A'|: silu 1.0998, and so g sigmoid(alpha g), its scaled copy; gelu and gelu_tanh 1.1290.
# The derivative of beta tanh(g / beta) sigmoid(g) is at most silu's for g > 0, and for g < 0 a difference
# of two terms below 0.5.
_SILU = _constant(1.1)
_GELU = _constant(1.13)

_SIZE = _plain(np.abs)
_UP = Factor(_plain(_same), _SIZE)
_UP_CLAMPED = Factor(_clamped, _clamped_size)
_GATE_SILU = Factor(_plain(_silu), _SIZE, _SILU)
_GATE_GELU = Factor(_plain(_gelu), _SIZE, _GELU)
_GATE_GELU_TANH = Factor(_plain(_gelu_tanh), _SIZE, _GELU)
_GATE_RELU = Factor(_plain(_relu), _plain(_relu))
_GATE_RELU2 = Factor(_plain(_relu2), _plain(_relu2), lambda reach: np.maximum(2 * reach, 1))
_SWIGLUOAI = Factor(_swigluoai, _capped_size, _SILU), Factor(_swigluoai_up, _swigluoai_up_size)
_SWIGLU_TAKES = ("alpha", "beta", "limit")

# name -> formula; a parameter outside `takes` is not used
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(Factor(_silu_capped, _capped_size, _SILU), _UP_CLAMPED, ("limit",)),
    "gelu": Activation(_GATE_GELU, _UP),
    "gelu_tanh": Activation(_GATE_GELU_TANH, _UP),
    "swigluoai": Activation(*_SWIGLUOAI, _SWIGLU_TAKES, 1.702, 1.0, 7.0, interleaved=True),
    "swigluoai_uninterleave": Activation(*_SWIGLUOAI, _SWIGLU_TAKES, 1.702, 1.0, None),
    "swiglustep": Activation(Factor(_swiglustep, _swiglustep_size, _SILU), _UP_CLAMPED, ("limit",), limit=7.0),
    # beta bounds the gate softly, limit the up; an infinite limit leaves u as it is
    "situ": Activation(
        Factor(_situ, _situ_size, _SILU), Factor(_situ_up, _clamped_size), ("beta", "limit"), beta=None, soft=True
    ),
    "reglu": Activation(_GATE_RELU, _UP),
    "relu2": Activation(_GATE_RELU2, _UP),
    "identity": Activation(_UP, _UP),
    "silu_no_mul": Activation(_GATE_SILU, None),
    "gelu_no_mul": Activation(_GATE_GELU, None),
    "gelu_tanh_no_mul": Activation(_GATE_GELU_TANH, None),
    "relu_no_mul": Activation(_GATE_RELU, None),
    "relu2_no_mul": Activation(_GATE_RELU2, None),
    "identity_no_mul": Activation(_UP, None),
}
ACTIVATIONS["geglu"] = ACTIVATIONS["gelu"]
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_tanh"]
ACTIVATIONS["gelu_pytorch_tanh_no_mul"] = ACTIVATIONS["gelu_tanh_no_mul"]
ACTIVATIONS["relu"] = ACTIVATIONS["reglu"]
