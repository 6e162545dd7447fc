"""Numbers to codes of a small format and scales, and back."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cumoe import _arrays, _check, _packing
from cumoe._arrays import Array
from cumoe._quant_desc import DType, GroupShape, dtype_name
from cumoe._schemes import (
    DTYPES,
    Layout,
    Quantized,
    Scheme,
    check_even,
    check_options,
    check_parts,
    code_rule,
    group_shape_of,
    refuse,
    scale_rule,
    scheme_of,
)

_LARGEST = float(np.finfo(np.float32).max)


@_arrays.on_callers_stream
def quantize(
    x: Array,
    scheme: str,
    group_shape: Sequence[int] | None = None,
    *,
    scale: Array | None = None,
    zero_points: bool | Array = False,
    global_scale: Array | None = None,
    scale_ub: float | None = None,
    use_ue8m0: bool = False,
) -> Quantized:
    """
    Turn numbers into codes of a small format and scales.

    Parameters
    ----------
    x : (..., N, K) array, float32, float16 or bfloat16
        Finite numbers: tokens (T, K), a weight (N, K) or those of all experts (E, N, K). Any strides.
    scheme : {"fp8", "int8", "int4", "uint8", "mxfp4", "mxfp8", "nvfp4"}
        Number format of the codes and of the scales.
    group_shape : (int, int), optional
        Rows and columns that share a scale, -1 for a whole axis; groups at the ends may be smaller.
        ``"fp8"``, ``"int8"`` and ``"uint8"``: (-1, -1), a matrix, (1, -1), a row, or any other block.
        ``"int4"``: (1, 32), (1, 64) or (1, 128). ``"mxfp4"``, ``"mxfp8"``: (1, 32). ``"nvfp4"``: (1, 16).
        Default: (-1, -1) for ``"fp8"``, (1, -1) for ``"int8"``, (1, 128) for ``"int4"`` and ``"uint8"``.
    scale : (..., Nb, Kb) array, optional
        Static scales, positive: one for each group, float32; for ``"int4"`` and ``"uint8"`` also float16 or
        bfloat16; uint8 or float8_e8m0fnu for the mx schemes; float8_e4m3fn for ``"nvfp4"``. Axes of length 1
        at the end may be left out. Computed from `x` if None; handed back without a copy if given, as are the
        next two.
    zero_points : bool or uint8 array, default False
        ``"int4"``, (..., N/2, Kb), and ``"uint8"``, (..., Nb, Kb), only. True computes the code of zero of each
        group; False stands for 8 and 128.
    global_scale : (...) float32 array, optional
        ``"nvfp4"`` only: a number for each matrix that its block scales are multiplied by. Computed from
        `x` if None.
    scale_ub : float, optional
        ``"fp8"`` with a scale for each row only: numbers beyond it are cut off.
    use_ue8m0 : bool, default False
        ``"fp8"`` only: raise each scale to a power of two.

    Returns
    -------
    quantized : Quantized
        Codes, scales and what else `dequantize` needs.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        An unknown scheme, a shape that does not fit, an option that the scheme does not have, or an odd
        K, or N with zero points, where two codes share a byte.

    See Also
    --------
    dequantize : The way back.

    Notes
    -----
    The bits are defined: `cumoe.reference.formats` has every rule, and the call equals it bit for bit, on the
    CPU and on the GPU. The call does not wait for the device. In short, with a the largest ``|x|`` of a group:

    ====== ======================================================================================
    fp8    ``s = max(a / 448, 1 / (448 * 512))`` for a matrix or a row, ``max(a, 1e-10) / 448`` for
           other groups; e4m3 of ``x / s``, or of ``x * (1 / s)`` for a static scale
    int8   ``s = max(a, 1e-10) / 127``; ``x / s`` with ties to even for a matrix and for any static
           scale, ties away from zero for a row, truncated for other groups
    int4   zero point 8 and ``s = max(max(x) / 7, min(x) / -8)``, or ``s = (max(x) - min(x)) / 15`` of
           numbers and 0, in the dtype of `x`; ``x / s`` with ties to even, plus the zero point
    uint8  zero point 128 and ``s = max(a, 1e-10) / 127``, or ``s = (max(x) - min(x)) / 255`` as for int4
    mxfp4  e2m1 of ``x / 2**e``, ``e = floor(log2(a rounded to two bits)) - 2``
    mxfp8  e4m3 of ``x / 2**e``, ``e = ceil(log2(a / 448))``
    nvfp4  s = e4m3 of ``gs * a / 6``; e2m1 of ``x * (gs / s)``; ``gs = 448 * 6 / max(a, 1e-10)`` of the
           matrix
    ====== ======================================================================================

    Floats take the nearest code, the even one at ties, and the largest beyond it. Where `x` is not finite,
    its group means nothing.

    References
    ----------
    .. [1] Open Compute Project, Microscaling Formats (MX) Specification, 2023.
    .. [2] vLLM, ``model_executor/layers/quantization``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[1.0, -2.0, 12.7, 0.25]], "float32")
    >>> values, scale, *_ = cumoe.quantize(x, "int8")
    >>> values, scale
    (array([[ 10, -20, 127,   3]], dtype=int8), array([[0.1]], dtype=float32))
    >>> cumoe.quantize(x, "mxfp4").values
    array([[161,   7]], dtype=uint8)
    """
    is_flag = isinstance(zero_points, bool | np.bool_)
    find_zeros = is_flag and bool(zero_points)
    side, (x, scale, given, global_scale) = _arrays.enter(
        x=x, scale=scale, zero_points=None if is_flag else zero_points, global_scale=global_scale
    )
    rule, shape = scheme_of(scheme), group_shape_of(scheme, group_shape)
    check_options(
        scheme, shape, scale is not None, find_zeros or given is not None, global_scale is not None, scale_ub, use_ue8m0
    )
    _check.dtype("x", x, DTYPES)
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 axes (..., N, K), got shape {tuple(x.shape)}")
    layout = Layout(tuple(x.shape), shape)
    check_even("x", layout, scheme, find_zeros or given is not None)
    check_parts(scheme, layout, scale, given, global_scale)

    xp, room = side.xp, _arrays.room(side.xp, "formats")
    dtype, given_scale = x.dtype.name, scale
    inside = _arrays.bits(x).reshape(layout.flat)
    if scheme == "nvfp4" and global_scale is None:
        whole = layout._replace(group_shape=GroupShape.PER_TENSOR)
        low, high = _extremes(xp, room, inside, dtype, whole)
        largest = xp.empty(whole.groups, np.float32)
        room.scales(low, high, _each(xp, layout, 1.0), "nvfp4_global", "float32", largest)
        global_scale = largest.reshape(layout.shape[:-2])
    if scale is None or find_zeros:
        low, high = _extremes(xp, room, inside, dtype, layout)
    if scale is None:
        scale = _empty(xp, layout.scale_shape, x.dtype if rule.largest_code else np.dtype(rule.scales[0]))
        limit: Any = 1.0
        if scheme == "fp8":
            limit = math.inf if scale_ub is None or scale_ub > _LARGEST else float(scale_ub)
        elif rule.largest_code:
            limit = float(ml_dtypes.finfo(x.dtype).smallest_subnormal)
        limits = _each(xp, layout, limit if global_scale is None else global_scale)
        name = scale_rule(scheme, shape, find_zeros or given is not None, use_ue8m0)
        room.scales(low, high, limits, name, _stored_as(scale), _arrays.bits(scale).reshape(layout.groups))
    stored = _arrays.bits(scale).reshape(layout.groups)
    zeros = _one_a_byte(xp, given, layout, rule)
    if find_zeros:
        zeros = xp.empty(layout.groups, np.uint8)
        room.zero_points(low, stored, _stored_as(scale), rule.largest_code, zeros)
        if rule.is_packed:
            given = _packing.packed(xp, zeros, -2).reshape(layout.packed_shape)
        else:
            given = zeros.reshape(layout.scale_shape)
    values = _empty(xp, (*layout.shape[:-1], layout.shape[-1] // (2 if rule.is_packed else 1)), rule.codes)
    room.encode(
        inside,
        dtype,
        stored,
        _stored_as(scale),
        zeros,
        _each(xp, layout, 1.0 if global_scale is None else global_scale),
        *layout.group,
        code_rule(scheme, shape, given_scale is not None),
        _arrays.bits(values).reshape(*layout.flat[:2], values.shape[-1]),
    )
    parts = (None if part is None else side.leave(part) for part in (given, global_scale))
    return Quantized(side.leave(values), side.leave(scale.reshape(layout.scale_shape)), scheme, shape, *parts)


@_arrays.on_callers_stream
def dequantize(quantized: Quantized, dtype: DType = "float32") -> Array:
    """
    Turn codes and scales into the numbers that they stand for.

    Parameters
    ----------
    quantized : Quantized
        What `quantize` gives, or arrays of a checkpoint put into one. A `zero_points` of None stands for 8, or
        128 of ``"uint8"``.
    dtype : dtype or str, default "float32"
        float32, float16 or bfloat16.

    Returns
    -------
    x : (..., N, K) array of `dtype`
        The numbers.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        An unknown scheme or dtype, or a shape that does not fit.

    See Also
    --------
    quantize : The way there.

    Notes
    -----
    ``code * s``; ``(code - zero point) * s`` for ``"int4"`` and ``"uint8"``, ``code * (s / gs)`` for
    ``"nvfp4"``: every operation rounded to float32, and the result once more to `dtype`. With the same scales,
    `quantize` gives the same codes again, unless a number overflows `dtype` or falls into its subnormal range,
    or `dtype` is bfloat16, whose 8 bits are too few for ``"uint8"`` with zero points. The call does not wait
    for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[1.0, -2.0, 12.7, 0.26]], "float32")
    >>> cumoe.dequantize(cumoe.quantize(x, "mxfp4"))
    array([[ 1., -2., 12.,  0.]], dtype=float32)
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(f"quantized must be a Quantized, got {type(quantized).__name__}")
    side, (values, scale, zero_points, global_scale) = _arrays.enter(
        values=quantized.values,
        scale=quantized.scale,
        zero_points=quantized.zero_points,
        global_scale=quantized.global_scale,
    )
    scheme = quantized.scheme
    rule, shape = scheme_of(scheme), group_shape_of(scheme, quantized.group_shape)
    name = dtype_name(dtype)
    _check.choice("dtype", name, DTYPES)
    _check.dtype("values", values, (rule.codes.name,))
    _check.given("scale", scale)
    refuse("zero_points", zero_points is not None and not rule.largest_code, f"for {scheme!r}")
    refuse("global_scale", global_scale is not None and scheme != "nvfp4", f"for {scheme!r}")
    if scheme == "nvfp4":
        _check.given("global_scale", global_scale)
    if values.ndim < 2:
        raise ValueError(f"values must have at least 2 axes (..., N, K), got shape {tuple(values.shape)}")
    layout = Layout((*values.shape[:-1], values.shape[-1] * (2 if rule.is_packed else 1)), shape)
    check_even("values", layout, scheme, zero_points is not None)
    check_parts(scheme, layout, scale, zero_points, global_scale)

    xp = side.xp
    out = xp.empty(layout.shape, np.dtype(name))
    _arrays.room(xp, "formats").decode(
        _arrays.bits(values).reshape(*layout.flat[:2], values.shape[-1]),
        _arrays.bits(scale).reshape(layout.groups),
        _stored_as(scale),
        _one_a_byte(xp, zero_points, layout, rule),
        _each(xp, layout, 1.0 if global_scale is None else global_scale),
        *layout.group,
        scheme,
        name,
        _arrays.bits(out).reshape(layout.flat),
    )
    return side.leave(out)


def _empty(xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array of any dtype; the float8 family is only a label to CuPy."""
    return xp.empty(shape, np.uint8).view(dtype) if dtype.itemsize == 1 else xp.empty(shape, dtype)


def _one_a_byte(xp: ModuleType, zero_points: Array, layout: Layout, rule: Scheme) -> Array:
    """Zero points as the rooms read them; None stays None."""
    if zero_points is None:
        return None
    one_a_byte = _packing.unpacked(xp, zero_points, -2) if rule.is_packed else _arrays.bits(zero_points)
    return one_a_byte.reshape(layout.groups)


def _stored_as(scale: Array) -> str:
    """What the rooms call the dtype of scales: codes are uint8 to them."""
    return scale.dtype.name if scale.dtype.name in DTYPES else "uint8"


def _each(xp: ModuleType, layout: Layout, number: Any) -> Array:
    """One float32 for each matrix, from a number or an array of them."""
    if isinstance(number, float | int):
        return xp.full(layout.matrices, number, np.float32)
    return _arrays.bits(number).reshape(layout.matrices)


def _extremes(xp: ModuleType, room: ModuleType, x: Array, dtype: str, layout: Layout) -> tuple[Array, Array]:
    low, high = xp.empty(layout.groups, np.float32), xp.empty(layout.groups, np.float32)
    room.extremes(x, dtype, *layout.group, low, high)
    return low, high
