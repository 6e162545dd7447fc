"""Weights of one byte a number: int8 and float8_e4m3fn of compressed-tensors, and DeepSeek's blocks."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from cumoe import _arrays, _check, _stored
from cumoe._arrays import Array, Side
from cumoe._quant_desc import GroupShape
from cumoe._schemes import DTYPES, SCHEMES, Layout, Quantized, group_shape_of


@_arrays.on_callers_stream
def from_compressed_tensors_int8(
    weight: Array,
    weight_scale: Array,
    group_shape: Sequence[int] | None = None,
    *,
    weight_zero_point: Array | None = None,
) -> Quantized:
    """
    Read a weight of a compressed-tensors checkpoint in the format int-quantized.

    Parameters
    ----------
    weight : (..., N, K) array, int8
        Codes.
    weight_scale : (..., N, 1), (..., 1) or (..., Nb, Kb) array, float32, float16 or bfloat16
        Scale of each row, of each matrix, or of each group; ``(...)`` for a matrix will do.
    group_shape : (int, int), optional
        Rows and columns that share a scale. Default: a row, (1, -1), if `weight_scale` has as many axes as
        `weight`, or else a matrix, (-1, -1).
    weight_zero_point : array, int8, optional
        Codes of zero, of the shape of `weight_scale`. None stands for 0.

    Returns
    -------
    quantized : Quantized
        Scheme ``"int8"``, codes without a copy; with zero points ``"uint8"``, codes and zero points plus 128. Scales
        in float32, which is exact.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_compressed_tensors_int8 : The way back.

    Notes
    -----
    The layer takes zero points of rows, or of groups along a row. The call does not wait for the device.

    References
    ----------
    .. [1] compressed-tensors, ``compressors/naive_quantized`` (``IntQuantizationCompressor``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> weight, scale = np.array([[1, -2], [3, 4]], np.int8), np.array([[0.5], [0.25]], np.float32)
    >>> cumoe.dequantize(cumoe.from_compressed_tensors_int8(weight, scale))
    array([[ 0.5 , -1.  ],
           [ 0.75,  1.  ]], dtype=float32)
    >>> zeros = np.array([[1], [-4]], np.int8)
    >>> cumoe.dequantize(cumoe.from_compressed_tensors_int8(weight, scale, weight_zero_point=zeros))
    array([[ 0.  , -1.5 ],
           [ 1.75,  2.  ]], dtype=float32)
    """
    side, (weight, weight_scale, zeros) = _arrays.enter(
        weight=weight, weight_scale=weight_scale, weight_zero_point=weight_zero_point
    )
    read = _read(side, "int8", weight, "weight_scale", weight_scale, group_shape)
    if zeros is None:
        return read
    _check.dtype("weight_zero_point", zeros, ("int8",))
    _check.shape("weight_zero_point", zeros, "of weight_scale", tuple(weight_scale.shape))
    zeros = _flipped(side.xp, zeros).reshape(read.scale.shape)
    values = side.leave(_flipped(side.xp, weight))
    return read._replace(values=values, scheme="uint8", zero_points=side.leave(zeros))


@_arrays.on_callers_stream
def to_compressed_tensors_int8(quantized: Quantized, *, scale_dtype: str = "float32") -> tuple[Array, Array, Array]:
    """
    Write a weight as compressed-tensors checkpoints in the format int-quantized have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"int8"`` or ``"uint8"``.
    scale_dtype : {"float32", "float16", "bfloat16"}, default "float32"
        Dtype of the scales that are written.

    Returns
    -------
    weight : (..., N, K) array, int8
        Codes.
    weight_scale : (..., 1) or (..., Nb, Kb) array
        Scale of each matrix, or of each group.
    weight_zero_point : array, int8, or None
        Codes of zero, of the shape of `weight_scale`; None if the operand has none.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme or dtype, a shape that does not fit, or scales that `scale_dtype` cannot hold exactly.

    See Also
    --------
    from_compressed_tensors_int8 : The way there.

    Notes
    -----
    Nothing is rounded. Codes of ``"uint8"`` are written less 128; without zero points they are read back as ``"int8"``,
    the same numbers. The call reads the scales, and so waits for the device, unless `scale_dtype` is float32.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.array([[1.27, -0.5]], "float32"), "int8")
    >>> cumoe.to_compressed_tensors_int8(quantized)
    (array([[127, -50]], dtype=int8), array([[0.01]], dtype=float32), None)
    """
    weight, weight_scale, zeros = _write(quantized, ("int8", "uint8"), scale_dtype, DTYPES)
    return weight, weight_scale, zeros


@_arrays.on_callers_stream
def from_compressed_tensors_fp8(
    weight: Array, weight_scale: Array, group_shape: Sequence[int] | None = None
) -> Quantized:
    """
    Read a weight of a compressed-tensors checkpoint in the format float-quantized.

    Parameters
    ----------
    weight : (..., N, K) array, float8_e4m3fn
        Codes.
    weight_scale : (..., N, 1), (..., 1) or (..., Nb, Kb) array, float32, float16 or bfloat16
        Scale of each row, of each matrix, or of each block; ``(...)`` for a matrix will do.
    group_shape : (int, int), optional
        Rows and columns that share a scale, (128, 128) for ``block_structure`` [128, 128]. Default: a row,
        (1, -1), if `weight_scale` has as many axes as `weight`, or else a matrix, (-1, -1).

    Returns
    -------
    quantized : Quantized
        Scheme ``"fp8"``; codes without a copy, scales in float32, which is exact.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_compressed_tensors_fp8 : The way back.
    merge_w13_scales : One scale for a gate and an up projection that have one each.

    Notes
    -----
    The call does not wait for the device.

    References
    ----------
    .. [1] compressed-tensors, ``compressors/naive_quantized`` (``FloatQuantizationCompressor``).

    Examples
    --------
    >>> import cumoe, ml_dtypes, numpy as np
    >>> weight = np.array([[1, -2], [3, 448]], ml_dtypes.float8_e4m3fn)
    >>> cumoe.dequantize(cumoe.from_compressed_tensors_fp8(weight, np.array([0.5], np.float32)))
    array([[  0.5,  -1. ],
           [  1.5, 224. ]], dtype=float32)
    """
    side, (weight, weight_scale) = _arrays.enter(weight=weight, weight_scale=weight_scale)
    return _read(side, "fp8", weight, "weight_scale", weight_scale, group_shape)


@_arrays.on_callers_stream
def to_compressed_tensors_fp8(quantized: Quantized, *, scale_dtype: str = "float32") -> tuple[Array, Array]:
    """
    Write a weight as compressed-tensors checkpoints in the format float-quantized have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"fp8"``.
    scale_dtype : {"float32", "float16", "bfloat16"}, default "float32"
        Dtype of the scales that are written.

    Returns
    -------
    weight : (..., N, K) array, float8_e4m3fn
        Codes.
    weight_scale : (..., 1) or (..., Nb, Kb) array
        Scale of each matrix, or of each row or block.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme or dtype, a shape that does not fit, or scales that `scale_dtype` cannot hold exactly.

    See Also
    --------
    from_compressed_tensors_fp8 : The way there.

    Notes
    -----
    Nothing is rounded. The call reads the scales, and so waits for the device, unless `scale_dtype` is float32.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.array([[448.0, -2.0]], "float32"), "fp8")
    >>> weight, weight_scale = cumoe.to_compressed_tensors_fp8(quantized)
    >>> weight.dtype, weight_scale
    (dtype(float8_e4m3fn), array([1.], dtype=float32))
    """
    return _write(quantized, ("fp8",), scale_dtype, DTYPES)[:2]


@_arrays.on_callers_stream
def from_deepseek_fp8(
    weight: Array, weight_scale_inv: Array, *, weight_block_size: Sequence[int] = (128, 128)
) -> Quantized:
    """
    Read a weight of a checkpoint in DeepSeek's block format.

    Parameters
    ----------
    weight : (..., N, K) array, float8_e4m3fn
        Codes.
    weight_scale_inv : (..., ceil(N / 128), ceil(K / 128)) array
        What the codes of each block are multiplied by, despite its name: float32, float16 or bfloat16, or
        float8_e8m0fnu or uint8, an exponent alone (ue8m0).
    weight_block_size : (int, int), default (128, 128)
        Rows and columns of a block.

    Returns
    -------
    quantized : Quantized
        Scheme ``"fp8"``; codes without a copy, scales in float32, which is exact.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_deepseek_fp8 : The way back.

    Notes
    -----
    An exponent of code 0 is 2**-127, and 255 is not a number, as the format says; vLLM makes 0 and infinity of them.
    The call does not wait for the device.

    References
    ----------
    .. [1] DeepSeek-V3, ``inference/kernel.py`` (``weight_dequant``).
    .. [2] vLLM, ``model_executor/layers/quantization/utils/fp8_utils.py`` (``_upcast_e8m0_to_fp32``).

    Examples
    --------
    >>> import cumoe, ml_dtypes, numpy as np
    >>> weight = np.ones((130, 2), ml_dtypes.float8_e4m3fn)
    >>> quantized = cumoe.from_deepseek_fp8(weight, np.array([[126], [129]], np.uint8))
    >>> cumoe.dequantize(quantized)[126:, 0]
    array([0.5, 0.5, 4. , 4. ], dtype=float32)
    """
    side, (weight, weight_scale_inv) = _arrays.enter(weight=weight, weight_scale_inv=weight_scale_inv)
    return _read(side, "fp8", weight, "weight_scale_inv", weight_scale_inv, weight_block_size, _stored.WIDE_SCALES)


@_arrays.on_callers_stream
def to_deepseek_fp8(quantized: Quantized, *, scale_dtype: str = "float32") -> tuple[Array, Array]:
    """
    Write a weight as checkpoints in DeepSeek's block format have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"fp8"`` with groups of a block.
    scale_dtype : {"float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"}, default "float32"
        Dtype of the scales that are written; the last two are an exponent alone.

    Returns
    -------
    weight : (..., N, K) array, float8_e4m3fn
        Codes.
    weight_scale_inv : (..., Nb, Kb) array
        What the codes of each block are multiplied by.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme or dtype, no blocks, a shape that does not fit, or scales that `scale_dtype` cannot hold
        exactly.

    See Also
    --------
    from_deepseek_fp8 : The way there.

    Notes
    -----
    Nothing is rounded. The call reads the scales, and so waits for the device, unless `scale_dtype` is float32.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.full((2, 2), 448.0, "float32"), "fp8", (128, 128), use_ue8m0=True)
    >>> weight, weight_scale_inv = cumoe.to_deepseek_fp8(quantized, scale_dtype="uint8")
    >>> weight_scale_inv
    array([[127]], dtype=uint8)
    """
    if isinstance(quantized, Quantized) and min(quantized.group_shape) < 1:
        raise ValueError(f"group_shape must be a block, two sizes >= 1, got {tuple(quantized.group_shape)}")
    return _write(quantized, ("fp8",), scale_dtype, _stored.WIDE_SCALES)[:2]


def _read(
    side: Side,
    scheme: str,
    weight: Array,
    name: str,
    scale: Array,
    group_shape: Sequence[int] | None,
    scale_dtypes: tuple[str, ...] = DTYPES,
) -> Quantized:
    _check.dtype("weight", weight, (SCHEMES[scheme].codes.name,))
    _check.dtype(name, scale, scale_dtypes)
    _stored.at_least_two_axes("weight", weight, "(..., N, K)")
    if group_shape is not None:
        shape = group_shape_of(scheme, group_shape)
    else:
        shape = GroupShape.PER_TOKEN if scale.ndim == weight.ndim else GroupShape.PER_TENSOR
    layout, lead = Layout(tuple(weight.shape), shape), tuple(weight.shape[:-2])
    if not shape.is_per_tensor():
        letters = "(..., N, 1)" if shape.is_per_token() else "(..., Nb, Kb)"
        _check.shape(name, scale, letters, layout.scale_shape)
    elif tuple(scale.shape) not in (lead, layout.scale_shape):
        _check.shape(name, scale, "(..., 1)", (*lead, 1))
    if scale.dtype.name != "float32" or tuple(scale.shape) != layout.scale_shape:
        scale = _stored.widened(side.xp, scale.reshape(layout.scale_shape))
    return Quantized(side.leave(weight), side.leave(scale), scheme, shape)


def _write(
    quantized: Quantized, schemes: tuple[str, ...], scale_dtype: str, dtypes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points, those of a matrix as (..., 1)."""
    _check.choice("scale_dtype", scale_dtype, dtypes)
    parts = _stored.take_apart(quantized, schemes)
    values, zeros, leave = parts.values, parts.zero_points, parts.side.leave
    scale = _stored.narrowed(parts.xp, _stored.widened(parts.xp, parts.scale), scale_dtype)
    shape = (*scale.shape[:-2], 1) if parts.layout.group_shape.is_per_tensor() else scale.shape
    if quantized.scheme == "uint8":
        values = _flipped(parts.xp, values)
        zeros = None if zeros is None else leave(_flipped(parts.xp, zeros).reshape(shape))
    return leave(values), leave(scale.reshape(shape)), zeros


def _flipped(xp: ModuleType, codes: Array) -> Array:
    """Codes of int8 as those of uint8, 128 more, or the way back: the sign bit changes."""
    other = np.uint8 if codes.dtype == np.int8 else np.int8
    return (xp.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(0x80)).view(other)
