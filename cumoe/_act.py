"""Activations between the two products: which there are, their parameters, and one call for all of them."""

import math
import numbers
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array
from cumoe.reference.act import ACTIVATIONS, Activation

DTYPES = ("float32", "float16", "bfloat16")

# what a parameter is where a formula has none
_NEUTRAL = {"alpha": 1.0, "beta": 0.0, "limit": math.inf}

# parameter -> field of FusedMoEQuantConfig, field of FusedMoEConfig
_FIELDS = {
    "alpha": ("gemm1_alpha", "swiglu_alpha"),
    "beta": ("gemm1_beta", "swiglu_beta"),
    "limit": ("gemm1_clamp_limit", "swiglu_limit"),
}
_SITU_FIELDS = {
    "alpha": ("gemm1_alpha", ""),
    "beta": ("gemm1_beta", "activation_situ_beta"),
    "limit": ("gemm1_clamp_limit", "activation_situ_linear_beta"),
}


def is_gated(activation: str) -> bool:
    """Whether w13 holds gate and up rows for this activation; names in ``_no_mul`` have no gate."""
    return _rule(activation).is_gated


def is_interleaved(activation: str) -> bool:
    """Whether gate and up rows of w13 alternate; otherwise all gate rows come first."""
    return _rule(activation).interleaved


def parameters(activation: str, quant_config: Any = None, moe_config: Any = None) -> tuple[float, float, float]:
    """
    Return alpha, beta and limit of an activation; an infinite limit is none.

    Each is looked for by itself: in `quant_config`, then in `moe_config`, then in the activation's own
    defaults. One that the formula does not use must be absent or neutral: it would be lost silently.
    """
    _rule(activation)
    found = []
    for parameter, (quant_field, moe_field) in (_SITU_FIELDS if activation == "situ" else _FIELDS).items():
        label, given = f"quant_config.{quant_field}", getattr(quant_config, quant_field, None)
        if given is None and moe_field:
            label, given = f"moe_config.{moe_field}", getattr(moe_config, moe_field, None)
        if given is None:
            label = parameter
        fix = f"set quant_config.{quant_field} or moe_config.{moe_field}"
        found.append(checked(activation, parameter, label, given, fix))
    return found[0], found[1], found[2]


def moe_activation(
    x: Array,
    activation: str,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    out: Array | None = None,
) -> Array:
    """
    Apply an activation of MoE layers, by its name.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        Gates g and ups u along the last axis: all gates first, or g, u, g, u, ... for ``"swigluoai"``.
        For a name that ends in ``_no_mul``: (..., I), gates only. Any strides.
    activation : str
        One of the names below.
    alpha, beta, limit : float, optional
        Parameters of the formula; its own defaults if None. Giving one that the formula does not use
        is an error.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        A dtype that is not listed, or a parameter that is not a number.
    ValueError
        An unknown name, an odd last axis, a parameter that is missing, out of range or not used, or an
        `out` that does not fit.

    Notes
    -----
    Computed in float32 and rounded once; NaN stays NaN. ``sigmoid(x) = 1 / (1 + exp(-x))``,
    ``silu(x) = x sigmoid(x)``, ``cap(x) = min(x, limit)``, ``clamp(x) = min(max(x, -limit), limit)``:

    ============================ ====================================================================
    silu                         ``silu(cap(g)) clamp(u)``, no limit by default
    gelu, geglu                  ``0.5 g (1 + erf(g / sqrt(2))) u``
    gelu_tanh, gelu_pytorch_tanh ``0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g**3))) u``
    swigluoai                    ``cap(g) sigmoid(alpha cap(g)) (clamp(u) + beta)``, g and u alternate,
                                 alpha = 1.702, beta = 1, limit = 7
    swigluoai_uninterleave       the same with all g first; limit must be given
    swiglustep                   ``cap(silu(g)) clamp(u)``, limit = 7
    situ                         ``beta tanh(g / beta) sigmoid(g) u``; beta must be given; with a limit,
                                 ``limit tanh(u / limit)`` in place of u
    relu, reglu                  ``max(g, 0) u``
    relu2                        ``max(g, 0)**2 u``
    identity                     ``g u``
    ============================ ====================================================================

    With ``_no_mul`` the names silu, gelu, gelu_tanh, gelu_pytorch_tanh, relu, relu2 and identity are the
    same formulas without u, without clamps.

    References
    ----------
    .. [1] Shazeer, GLU Variants Improve Transformer, 2020.

    Examples
    --------
    >>> x = np.array([[-1.0, 2.0, 3.0, 10.0]], np.float32)
    >>> cumoe.moe_activation(x, "relu")
    array([[ 0., 20.]], dtype=float32)
    >>> cumoe.moe_activation(x, "relu2_no_mul")
    array([[  0.,   4.,   9., 100.]], dtype=float32)
    """
    chosen = (
        checked(activation, "alpha", "alpha", alpha),
        checked(activation, "beta", "beta", beta),
        checked(activation, "limit", "limit", limit),
    )
    return apply(x, activation, *chosen, out)


@_arrays.on_callers_stream
def apply(x: Array, activation: str, alpha: float, beta: float, limit: float, out: Array | None) -> Array:
    """Check the arrays and run one activation; the parameters are checked already."""
    side, (x, out) = _arrays.enter(x=x, out=out)
    rule, letters = ACTIVATIONS[activation], "(..., I)"
    _check.dtype("x", x, DTYPES)
    if x.ndim < 1:
        raise ValueError(f"x must have at least 1 axis {'(..., 2I)' if rule.is_gated else letters}, got shape ()")
    width = x.shape[-1]
    if rule.is_gated and width % 2:
        raise ValueError(f"x must have an even last axis (..., 2I) for {activation!r}, got shape {tuple(x.shape)}")
    shape = (*x.shape[:-1], width // 2 if rule.is_gated else width)
    if out is None:
        out = side.xp.empty(shape, x.dtype)
    else:
        _check.output("out", out, letters, shape, x.dtype.name, x=x)
    if out.size:
        num_rows = math.prod(shape[:-1])
        _arrays.room(side.xp, "act").moe_activation(
            _arrays.bits(x).reshape(num_rows, width),
            activation,
            rule.interleaved,
            x.dtype.name,
            alpha,
            beta,
            limit,
            _arrays.bits(out).reshape(num_rows, shape[-1]),
        )
    return side.leave(out)


def checked(activation: str, name: str, label: str, given: Any, fix: str = "") -> float:
    """Return a parameter that the caller knows as `label`; its default if None was given."""
    rule = _rule(activation)
    if given is None:
        default: float | None = getattr(rule, name)
        if default is None:
            raise ValueError(f"{label} must be given for {activation!r}, got None" + (f"; {fix}" if fix else ""))
        return default
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{label} must be a number, got {type(given).__name__}")
    value = float(given)
    if name not in rule.takes:
        if value != _NEUTRAL[name]:
            raise ValueError(f"{label} must be None for {activation!r}, which does not use it, got {value}")
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)  # as the kernels take it
    if (name == "limit" or rule.soft) and not single > 0:
        raise ValueError(f"{label} must be > 0, got {value}")
    if name != "limit" and not np.isfinite(single):
        raise ValueError(f"{label} must be finite in float32, got {value}")
    return value


def _rule(activation: str) -> Activation:
    _check.choice("activation", activation, tuple(ACTIVATIONS))
    return ACTIVATIONS[activation]
