"""Scales that checkpoints have and kernels do not: one for each shard, of groups that are cut, of two levels."""

import ml_dtypes
import numpy as np

from cumoe import _arrays, _check, _stored
from cumoe._arrays import Array
from cumoe._formats import dequantize, quantize
from cumoe._quant_desc import FLOAT8_E4M3FN, GroupShape
from cumoe._schemes import DTYPES, Quantized


@_arrays.on_callers_stream
def merge_w13_scales(w13_weight: Array, w13_weight_scale: Array) -> Quantized:
    """
    Give the gate and the up projection of each expert one scale, the larger of their two.

    Parameters
    ----------
    w13_weight : (..., 2I, H) array, float8_e4m3fn
        Codes of the gate rows, then those of the up rows.
    w13_weight_scale : (..., 2) array, float32
        Scale of the gate, then that of the up projection.

    Returns
    -------
    quantized : Quantized
        Scheme ``"fp8"``, one scale for each matrix, (..., 1, 1).

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, or an odd number of rows.

    See Also
    --------
    from_compressed_tensors_fp8 : Reads a weight that has one scale.

    Notes
    -----
    The numbers ``code * s`` are rounded to float32 and quantised again with the larger s, which leaves the codes of
    its half as they are. vLLM does the same with numbers rounded to float16. Scratch: four bytes a code. The call
    does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``model_executor/layers/quantization/fp8.py`` (``process_weights_after_loading``).

    Examples
    --------
    >>> import cumoe, ml_dtypes, numpy as np
    >>> w13 = np.array([[[64.0], [64.0]]], ml_dtypes.float8_e4m3fn)
    >>> merged = cumoe.merge_w13_scales(w13, np.array([[0.5, 2.0]], np.float32))
    >>> merged.values.astype("float32").ravel(), merged.scale.ravel()
    (array([16., 64.], dtype=float32), array([2.], dtype=float32))
    """
    side, (weight, scale) = _arrays.enter(w13_weight=w13_weight, w13_weight_scale=w13_weight_scale)
    _check.dtype("w13_weight", weight, ("float8_e4m3fn",))
    _check.dtype("w13_weight_scale", scale, ("float32",))
    _stored.at_least_two_axes("w13_weight", weight, "(..., 2I, H)")
    *lead, rows, columns = weight.shape
    if rows % 2:
        raise ValueError(f"w13_weight must have an even number of rows 2I, got shape {tuple(weight.shape)}")
    _check.shape("w13_weight_scale", scale, "(..., 2)", (*lead, 2))
    halves = _arrays.bits(weight).reshape(*lead, 2, rows // 2, columns).view(FLOAT8_E4M3FN)
    numbers = dequantize(Quantized(halves, scale, "fp8", GroupShape.PER_TENSOR))
    largest = scale.max(axis=-1, keepdims=True)[..., None]
    merged = quantize(numbers.reshape(weight.shape), "fp8", scale=largest)
    return merged._replace(values=side.leave(merged.values), scale=side.leave(merged.scale))


@_arrays.on_callers_stream
def halve_groups(quantized: Quantized, *sizes: int) -> Quantized:
    """
    Halve the groups of a weight until they divide some sizes, and repeat their scales.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"int4"`` or ``"uint8"`` with groups (1, g) that divide K.
    *sizes : int
        What g must divide: columns of a shard, or the size of a group that there is a kernel for.

    Returns
    -------
    quantized : Quantized
        The same numbers with groups (1, g / 2), (1, g / 4) and so on; codes without a copy.

    Raises
    ------
    TypeError
        Not a `Quantized`, a part of it that has the wrong dtype, or a size that is not an int.
    ValueError
        Another scheme, a shape that does not fit, or groups that would be smaller than 32.

    See Also
    --------
    from_gptq : Reads such weights.

    Notes
    -----
    A shard of a tensor-parallel layer may end inside a group; halved groups end with it. vLLM takes the sizes of
    both weights, H and I of a rank, so that they share one group size. The call does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``model_executor/layers/quantization/moe_wna16.py`` (``group_size_div_factor``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> w2 = cumoe.quantize(np.ones((4, 384), "float32"), "int4", (1, 128))
    >>> halved = cumoe.halve_groups(w2, 384 // 2)
    >>> halved.group_shape, halved.scale.shape
    (GroupShape(row=1, col=64), (4, 6))
    """
    parts = _stored.take_apart(quantized, ("int4", "uint8"))
    _stored.check_rows(parts)
    sizes = tuple(_check.integer("sizes", size, 1) for size in sizes)
    group, times = parts.group, 1
    while any(size % group for size in sizes):
        if group % 2 or group < 64:
            wanted = f"{parts.group} / 2**n >= 32 of which all are multiples"
            raise ValueError(f"sizes must have a group size {wanted}, got {sizes}")
        group, times = group // 2, 2 * times
    if times == 1:
        return quantized
    repeated = (
        None if array is None else parts.side.leave(_stored.repeated(parts.xp, array, times))
        for array in (parts.scale, parts.zero_points)
    )
    scale, zero_points = repeated
    return quantized._replace(scale=scale, zero_points=zero_points, group_shape=GroupShape(1, group))


@_arrays.on_callers_stream
def w4a8_scales(scale: Array) -> tuple[Array, Array]:
    """
    Split the group scales of int4 weights in two levels, for activations in fp8.

    Parameters
    ----------
    scale : (..., N, K / g) array, bfloat16, float16 or float32
        Scale of each group.

    Returns
    -------
    group_scale : (..., N, K / g) array, float8_e4m3fn
        Scale of each group, a part of the next.
    channel_scale : (..., N, 1) array, float32
        Scale of each row: the alphas of `int4_w4afp8_moe_quant_config`.

    Raises
    ------
    TypeError
        A dtype outside the list above.
    ValueError
        Fewer than 2 axes.

    See Also
    --------
    int4_w4afp8_moe_quant_config : The configuration that takes both.

    Notes
    -----
    `scale` is quantised to fp8 row by row, as `quantize` does; the codes are divided by 8 and rounded again, the
    scales of the rows are multiplied by 8. So a code times its group scale, 8 * 56 at most, stays within fp8. Group
    scales more than 2**11 below the largest of their row lose further digits. The call does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``model_executor/layers/quantization/utils/quant_utils.py`` (``convert_bf16_scales_to_fp8``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> group_scale, channel_scale = cumoe.w4a8_scales(np.array([[4.48, 2.24]], "float32"))
    >>> group_scale.astype("float32"), channel_scale
    (array([[56., 28.]], dtype=float32), array([[0.08]], dtype=float32))
    """
    side, (scale,) = _arrays.enter(scale=scale)
    _check.dtype("scale", scale, DTYPES)
    _stored.at_least_two_axes("scale", scale, "(..., N, K / g)")
    codes, rows, *_ = quantize(scale, "fp8", (1, -1))
    with np.errstate(invalid="ignore"):  # two of the codes are NaN
        numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    eighths = side.xp.asarray((numbers / 8).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    group_scale = eighths[_arrays.bits(codes)].view(FLOAT8_E4M3FN)
    return side.leave(group_scale), side.leave(rows * np.float32(8))
