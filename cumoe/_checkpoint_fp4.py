"""Weights of float4_e2m1fn: NVFP4 of compressed-tensors and ModelOpt, MXFP4 of gpt-oss."""

from types import ModuleType

import numpy as np

from cumoe import _arrays, _check, _packing, _stored
from cumoe._arrays import Array, Side
from cumoe._quant_desc import GroupShape
from cumoe._schemes import Quantized


@_arrays.on_callers_stream
def from_compressed_tensors_nvfp4(weight_packed: Array, weight_scale: Array, weight_global_scale: Array) -> Quantized:
    """
    Read a weight of a compressed-tensors checkpoint in the format nvfp4-pack-quantized.

    Parameters
    ----------
    weight_packed : (..., N, K / 2) array, uint8
        Codes of float4_e2m1fn, two a byte along K, the even k in the low bits.
    weight_scale : (..., N, K / 16) array, float8_e4m3fn
        Scale of each group of 16.
    weight_global_scale : (..., 1) or (...) array, float32
        What the block scales of a matrix are divided by.

    Returns
    -------
    quantized : Quantized
        Scheme ``"nvfp4"``, all parts without a copy.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_compressed_tensors_nvfp4 : The way back.
    from_modelopt_nvfp4 : The same weights with the inverse of the global scale.

    Notes
    -----
    The call does not wait for the device.

    References
    ----------
    .. [1] compressed-tensors, ``compressors/nvfp4`` (``pack_fp4_to_uint8``) and
       ``quantization/lifecycle/forward.py`` (``scale / global_scale``).

    Examples
    --------
    >>> import cumoe, ml_dtypes, numpy as np
    >>> packed, scale = np.full((1, 8), 0x72, np.uint8), np.ones((1, 1), ml_dtypes.float8_e4m3fn)
    >>> quantized = cumoe.from_compressed_tensors_nvfp4(packed, scale, np.array([2.0], np.float32))
    >>> cumoe.dequantize(quantized)[0, :2]
    array([0.5, 3. ], dtype=float32)
    """
    side, (packed, scale, global_scale) = _arrays.enter(
        weight_packed=weight_packed, weight_scale=weight_scale, weight_global_scale=weight_global_scale
    )
    n, blocks = _check_codes("weight_packed", packed)
    _check.dtype("weight_scale", scale, ("float8_e4m3fn",))
    _check.shape("weight_scale", scale, "(..., N, K / 16)", (*packed.shape[:-2], n, blocks))
    global_scale = _one_a_matrix("weight_global_scale", global_scale, packed.shape[:-2])
    return _nvfp4(side, packed, scale, global_scale)


@_arrays.on_callers_stream
def to_compressed_tensors_nvfp4(quantized: Quantized) -> tuple[Array, Array, Array]:
    """
    Write a weight as compressed-tensors checkpoints in the format nvfp4-pack-quantized have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"nvfp4"``.

    Returns
    -------
    weight_packed : (..., N, K / 2) array, uint8
        Codes.
    weight_scale : (..., N, K / 16) array, float8_e4m3fn
        Scale of each group.
    weight_global_scale : (..., 1) array, float32
        What the block scales of a matrix are divided by.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme, or a shape that does not fit.

    See Also
    --------
    from_compressed_tensors_nvfp4 : The way there.

    Notes
    -----
    Nothing is rounded or copied. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.ones((2, 16), "float32"), "nvfp4")
    >>> weight_packed, weight_scale, weight_global_scale = cumoe.to_compressed_tensors_nvfp4(quantized)
    >>> weight_packed.shape, weight_scale.shape, weight_global_scale
    ((2, 8), (2, 1), array([2688.], dtype=float32))
    """
    parts = _stored.take_apart(quantized, ("nvfp4",))
    global_scale = parts.global_scale.reshape(*parts.layout.shape[:-2], 1)
    return parts.side.leave(parts.values), parts.side.leave(parts.scale), parts.side.leave(global_scale)


@_arrays.on_callers_stream
def from_modelopt_nvfp4(
    weight: Array, weight_scale: Array, weight_scale_2: Array, *, is_scale_swizzled: bool = False
) -> Quantized:
    """
    Read a weight of a ModelOpt checkpoint in NVFP4.

    Parameters
    ----------
    weight : (..., N, K / 2) array, uint8
        Codes of float4_e2m1fn, two a byte along K, the even k in the low bits.
    weight_scale : (..., N, K / 16) array, float8_e4m3fn
        Scale of each group of 16.
    weight_scale_2 : (...) or (..., 1) array, float32
        What the block scales of a matrix are multiplied by.
    is_scale_swizzled : bool, default False
        Whether `weight_scale` is in the order of `swizzle_scales`, its axes filled up to multiples of 128 and 4.

    Returns
    -------
    quantized : Quantized
        Scheme ``"nvfp4"``, its `global_scale` the reciprocal of `weight_scale_2`, rounded to float32.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_modelopt_nvfp4 : The way back.
    from_compressed_tensors_nvfp4 : The same weights with the inverse of the global scale.

    Notes
    -----
    The reciprocal of a float32 does not always give that float32 again. It does where the leading digits of
    `weight_scale_2`, as a power of two times 1 to 2, are below the square root of 2; of those above, more than
    every fourth has no float32 whose reciprocal it is (17 % of all). What is lost is one unit in the last place
    of `weight_scale_2`, never of `global_scale`: reading what `to_modelopt_nvfp4` writes always gives the same
    operand again, bit for bit. Keep `weight_scale_2` and hand it to `to_modelopt_nvfp4` to write the very file.
    Numbers below 2**-126 or beyond 2**126 are outside this. The call does not wait for the device.

    References
    ----------
    .. [1] TensorRT Model Optimizer, ``modelopt/torch/quantization/qtensor/nvfp4_tensor.py``
       (``get_weights_scaling_factor_2``).

    Examples
    --------
    >>> import cumoe, ml_dtypes, numpy as np
    >>> weight, scale = np.full((1, 8), 0x72, np.uint8), np.ones((1, 1), ml_dtypes.float8_e4m3fn)
    >>> quantized = cumoe.from_modelopt_nvfp4(weight, scale, np.array(0.5, np.float32))
    >>> cumoe.dequantize(quantized)[0, :2]
    array([0.5, 3. ], dtype=float32)
    """
    side, (weight, scale, scale_2) = _arrays.enter(
        weight=weight, weight_scale=weight_scale, weight_scale_2=weight_scale_2
    )
    n, blocks = _check_codes("weight", weight)
    _check.dtype("weight_scale", scale, ("float8_e4m3fn",))
    rows, columns, letters = n, blocks, "(..., N, K / 16)"
    if is_scale_swizzled:
        letters = "(..., 128 ceil(N / 128), 4 ceil(K / 64))"
        rows, columns = _packing.swizzled_sizes(n, blocks)
    _check.shape("weight_scale", scale, letters, (*weight.shape[:-2], rows, columns))
    scale_2 = _one_a_matrix("weight_scale_2", scale_2, weight.shape[:-2])
    if is_scale_swizzled:
        scale = _packing.unswizzled(side.xp, scale, n, blocks)
    return _nvfp4(side, weight, scale, _reciprocal(side.xp, scale_2))


@_arrays.on_callers_stream
def to_modelopt_nvfp4(
    quantized: Quantized,
    *,
    weight_scale_2: Array | None = None,
    is_scale_swizzled: bool = False,
    allow_rounding: bool = False,
) -> tuple[Array, Array, Array]:
    """
    Write a weight as ModelOpt checkpoints in NVFP4 have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"nvfp4"``.
    weight_scale_2 : (...) or (..., 1) array, float32, optional
        What `from_modelopt_nvfp4` was given, to be written again. Default: the reciprocal of `global_scale`.
    is_scale_swizzled : bool, default False
        Write `weight_scale` in the order of `swizzle_scales`.
    allow_rounding : bool, default False
        Write a `weight_scale_2` even if its reciprocal is not exactly `global_scale`.

    Returns
    -------
    weight : (..., N, K / 2) array, uint8
        Codes.
    weight_scale : (..., N, K / 16) array, float8_e4m3fn
        Scale of each group.
    weight_scale_2 : (...) array, float32
        What the block scales of a matrix are multiplied by.

    Raises
    ------
    TypeError
        Not a `Quantized`, arrays of two libraries, or a part that has the wrong dtype.
    ValueError
        Another scheme, a shape that does not fit, or a `weight_scale_2` that would be read back as another
        `global_scale`.

    See Also
    --------
    from_modelopt_nvfp4 : The way there.

    Notes
    -----
    An operand that `from_modelopt_nvfp4` gave is written without loss: reading the result gives the same bits. The
    global scales of others, of `quantize` say, are often (17 %) no float32's reciprocal; with `allow_rounding` the
    numbers then change by one unit in the last place of a float32. The call reads the global scales, and so waits
    for the device, unless `allow_rounding`.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.full((2, 16), 2688.0, "float32"), "nvfp4")
    >>> weight, weight_scale, weight_scale_2 = cumoe.to_modelopt_nvfp4(quantized)
    >>> weight.shape, weight_scale.shape, weight_scale_2
    ((2, 8), (2, 1), array(1., dtype=float32))
    """
    parts = _stored.take_apart(quantized, ("nvfp4",), weight_scale_2=weight_scale_2)
    xp, lead = parts.xp, parts.layout.shape[:-2]
    global_scale, (scale_2,) = parts.global_scale.reshape(lead), parts.others
    if scale_2 is None:
        scale_2 = _reciprocal(xp, global_scale)
    else:
        scale_2 = _one_a_matrix("weight_scale_2", scale_2, lead)
    if not (allow_rounding or bool((_reciprocal(xp, scale_2) == global_scale).all())):
        given = "the given weight_scale_2" if weight_scale_2 is not None else "any float32"
        raise ValueError(f"global_scale must be the reciprocal of {given} to be written exactly; or set allow_rounding")
    scale = _packing.swizzle_scales(parts.scale) if is_scale_swizzled else parts.scale
    return parts.side.leave(parts.values), parts.side.leave(scale), parts.side.leave(scale_2)


@_arrays.on_callers_stream
def from_gpt_oss_mxfp4(blocks: Array, scales: Array) -> Quantized:
    """
    Read a weight of a gpt-oss checkpoint in MXFP4.

    Parameters
    ----------
    blocks : (..., N, K / 32, 16) array, uint8
        Codes of float4_e2m1fn, two a byte along K, the even k in the low bits.
    scales : (..., N, K / 32) array, uint8
        Exponent of each group of 32, plus 127.

    Returns
    -------
    quantized : Quantized
        Scheme ``"mxfp4"``; both parts without a copy if `blocks` is C-contiguous.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit.

    See Also
    --------
    to_gpt_oss_mxfp4 : The way back.

    Notes
    -----
    The rows of ``gate_up_proj`` stay as they are, gate and up in turn: that is the order that the activation
    ``"swigluoai"`` takes. The call does not wait for the device.

    References
    ----------
    .. [1] gpt-oss, ``gpt_oss/torch/weights.py``; transformers, ``integrations/mxfp4.py``
       (``convert_moe_packed_tensors``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> blocks, scales = np.full((1, 1, 16), 0x72, np.uint8), np.array([[128]], np.uint8)
    >>> cumoe.dequantize(cumoe.from_gpt_oss_mxfp4(blocks, scales))[0, :2]
    array([ 2., 12.], dtype=float32)
    """
    side, (blocks, scales) = _arrays.enter(blocks=blocks, scales=scales)
    _check.dtype("blocks", blocks, ("uint8",))
    _check.dtype("scales", scales, ("uint8",))
    if blocks.ndim < 3:
        raise ValueError(f"blocks must have at least 3 axes (..., N, K / 32, 16), got shape {tuple(blocks.shape)}")
    _check.shape("blocks", blocks, "(..., N, K / 32, 16)", (*blocks.shape[:-1], 16))
    _check.shape("scales", scales, "(..., N, K / 32)", tuple(blocks.shape[:-1]))
    values = blocks.reshape(*blocks.shape[:-2], 16 * blocks.shape[-2])
    return Quantized(side.leave(values), side.leave(scales), "mxfp4", GroupShape(1, 32))


@_arrays.on_callers_stream
def to_gpt_oss_mxfp4(quantized: Quantized) -> tuple[Array, Array]:
    """
    Write a weight as gpt-oss checkpoints in MXFP4 have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"mxfp4"``, K a multiple of 32.

    Returns
    -------
    blocks : (..., N, K / 32, 16) array, uint8
        Codes.
    scales : (..., N, K / 32) array, uint8
        Exponent of each group, plus 127.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme, a shape that does not fit, or a group that is not full.

    See Also
    --------
    from_gpt_oss_mxfp4 : The way there.

    Notes
    -----
    Nothing is rounded. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> blocks, scales = cumoe.to_gpt_oss_mxfp4(cumoe.quantize(np.ones((3, 64), "float32"), "mxfp4"))
    >>> blocks.shape, scales.shape
    ((3, 2, 16), (3, 2))
    """
    parts = _stored.take_apart(quantized, ("mxfp4",))
    _stored.multiple("values", "K", parts.layout.shape[-1], 32)
    *rows, half = parts.values.shape
    blocks, scales = parts.values.reshape(*rows, half // 16, 16), parts.scale.view(np.uint8)
    return parts.side.leave(blocks), parts.side.leave(scales)


def _check_codes(name: str, codes: Array) -> tuple[int, int]:
    """Check packed codes (..., N, K / 2); return N and how many groups of 16 a row has."""
    _check.dtype(name, codes, ("uint8",))
    _stored.at_least_two_axes(name, codes, "(..., N, K / 2)")
    return int(codes.shape[-2]), -(-codes.shape[-1] // 8)


def _one_a_matrix(name: str, array: Array, lead: tuple[int, ...]) -> Array:
    """Check float32 numbers, one for each matrix; as (...)."""
    _check.dtype(name, array, ("float32",))
    if tuple(array.shape) != (*lead, 1):
        _check.shape(name, array, "(...)", tuple(lead))
    return array.reshape(lead)


def _reciprocal(xp: ModuleType, numbers: Array) -> Array:
    """1 / x in float32; 0 and infinity of each other."""
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        return (1 / numbers.reshape(-1)).reshape(numbers.shape)


def _nvfp4(side: Side, values: Array, scale: Array, global_scale: Array) -> Quantized:
    parts = side.leave(values), side.leave(scale)
    return Quantized(*parts, "nvfp4", GroupShape(1, 16), global_scale=side.leave(global_scale))
