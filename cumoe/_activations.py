"""The activations of MoE layers as functions of their own; `_act` has the one that takes a name."""

from cumoe import _act
from cumoe._arrays import Array


def silu_and_mul(x: Array, *, limit: float | None = None, out: Array | None = None) -> Array:
    """
    Multiply silu of the gates by the ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        All gates g along the last axis, then all ups u. Any strides.
    limit : float, optional
        Gates are cut above it, ups beyond it on both sides. No clamp if None.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype, or a parameter that is not a number.
    ValueError
        An odd last axis, a parameter out of range, or an `out` that does not fit.

    Notes
    -----
    ``silu(min(g, limit)) * clamp(u, -limit, limit)``, ``silu(g) = g / (1 + exp(-g))``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.silu_and_mul(np.array([[0.0, 20.0, 5.0, 3.0]], np.float32))
    array([[ 0., 60.]], dtype=float32)
    >>> cumoe.silu_and_mul(np.array([[0.0, 90.0, 5.0, -30.0]], np.float32), limit=20.0)
    array([[   0., -400.]], dtype=float32)
    """
    return _act.moe_activation(x, "silu", limit=limit, out=out)


def gelu_and_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Multiply gelu of the gates by the ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        All gates g along the last axis, then all ups u. Any strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An odd last axis, or an `out` that does not fit.

    Notes
    -----
    ``0.5 * g * (1 + erf(g / sqrt(2))) * u``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.gelu_and_mul(np.array([[-20.0, 0.0, 8.0, 1.0, 1.0, 2.0]], np.float32))
    array([[-0.,  0., 16.]], dtype=float32)
    """
    return _act.moe_activation(x, "gelu", out=out)


def gelu_tanh_and_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Multiply the tanh form of gelu of the gates by the ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        All gates g along the last axis, then all ups u. Any strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An odd last axis, or an `out` that does not fit.

    Notes
    -----
    ``0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g**3))) * u``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.gelu_tanh_and_mul(np.array([[-20.0, 0.0, 8.0, 1.0, 1.0, 2.0]], np.float32))
    array([[-0.,  0., 16.]], dtype=float32)
    """
    return _act.moe_activation(x, "gelu_tanh", out=out)


def swigluoai_and_mul(x: Array, *, alpha: float = 1.702, limit: float = 7.0, out: Array | None = None) -> Array:
    """
    Apply the gated activation of gpt-oss to alternating gates and ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        Gates g and ups u alternate along the last axis: g, u, g, u, ... Any strides.
    alpha : float, default 1.702
        Factor inside the logistic function.
    limit : float, default 7.0
        Gates are cut above it, ups beyond it on both sides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype, or a parameter that is not a number.
    ValueError
        An odd last axis, a parameter out of range, or an `out` that does not fit.

    Notes
    -----
    ``(clamp(u, -limit, limit) + 1) * g' / (1 + exp(-alpha * g'))``, ``g' = min(g, limit)``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.swigluoai_and_mul(np.array([[0.0, 5.0, 100.0, -1.0, 100.0, 9.0]], np.float32))
    array([[ 0.      ,  0.      , 55.999626]], dtype=float32)
    """
    return _act.moe_activation(x, "swigluoai", alpha=alpha, limit=limit, out=out)


def swiglustep_and_mul(x: Array, *, limit: float = 7.0, out: Array | None = None) -> Array:
    """
    Multiply silu of the gates, cut above a limit, by the clamped ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        All gates g along the last axis, then all ups u. Any strides.
    limit : float, default 7.0
        Values of silu are cut above it, ups beyond it on both sides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype, or a parameter that is not a number.
    ValueError
        An odd last axis, a parameter out of range, or an `out` that does not fit.

    Notes
    -----
    ``min(silu(g), limit) * clamp(u, -limit, limit)``: the limit comes after silu, unlike in `silu_and_mul`.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.swiglustep_and_mul(np.array([[0.0, 90.0, 5.0, -30.0]], np.float32))
    array([[  0., -49.]], dtype=float32)
    """
    return _act.moe_activation(x, "swiglustep", limit=limit, out=out)


def situ_and_mul(x: Array, *, beta: float, linear_beta: float | None = None, out: Array | None = None) -> Array:
    """
    Multiply a gate with soft bounds by the ups.

    Parameters
    ----------
    x : (..., 2I) array, float32, float16 or bfloat16
        All gates g along the last axis, then all ups u. Any strides.
    beta : float
        Soft bound of the gates.
    linear_beta : float, optional
        Soft bound of the ups; None leaves them as they are.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype, or a parameter that is not a number.
    ValueError
        An odd last axis, a parameter out of range, or an `out` that does not fit.

    Notes
    -----
    ``beta * tanh(g / beta) / (1 + exp(-g)) * linear_beta * tanh(u / linear_beta)``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.situ_and_mul(np.array([[0.0, 90.0, 5.0, -30.0]], np.float32), beta=4.0)
    array([[   0., -120.]], dtype=float32)
    """
    limit = _act.checked("situ", "limit", "linear_beta", linear_beta)
    return _act.moe_activation(x, "situ", beta=beta, limit=limit, out=out)


def silu_no_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Apply silu.

    Parameters
    ----------
    x : (..., I) array, float32, float16 or bfloat16
        Any shape and strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An `out` that does not fit.

    Notes
    -----
    ``x / (1 + exp(-x))``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.silu_no_mul(np.array([0.0, 20.0, 30.0], np.float32))
    array([ 0., 20., 30.], dtype=float32)
    """
    return _act.moe_activation(x, "silu_no_mul", out=out)


def gelu_no_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Apply gelu.

    Parameters
    ----------
    x : (..., I) array, float32, float16 or bfloat16
        Any shape and strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An `out` that does not fit.

    Notes
    -----
    ``0.5 * x * (1 + erf(x / sqrt(2)))``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.gelu_no_mul(np.array([0.0, 20.0, 30.0], np.float32))
    array([ 0., 20., 30.], dtype=float32)
    """
    return _act.moe_activation(x, "gelu_no_mul", out=out)


def gelu_tanh_no_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Apply the tanh form of gelu.

    Parameters
    ----------
    x : (..., I) array, float32, float16 or bfloat16
        Any shape and strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An `out` that does not fit.

    Notes
    -----
    ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.gelu_tanh_no_mul(np.array([0.0, 20.0, 30.0], np.float32))
    array([ 0., 20., 30.], dtype=float32)
    """
    return _act.moe_activation(x, "gelu_tanh_no_mul", out=out)


def relu2_no_mul(x: Array, *, out: Array | None = None) -> Array:
    """
    Square what is positive, and make the rest zero.

    Parameters
    ----------
    x : (..., I) array, float32, float16 or bfloat16
        Any shape and strides.
    out : (..., I) array, dtype of `x`, optional
        Written and returned if given. C-contiguous; must not share memory with `x`.

    Returns
    -------
    out : (..., I) array, dtype of `x`
        The activations, on the side and in the kind of `x`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        An `out` that does not fit.

    Notes
    -----
    ``max(x, 0)**2``.
    Computed in float32, rounded once; NaN stays NaN.

    Examples
    --------
    >>> cumoe.relu2_no_mul(np.array([1.0, 2.0, 3.0], np.float32))
    array([1., 4., 9.], dtype=float32)
    """
    return _act.moe_activation(x, "relu2_no_mul", out=out)
