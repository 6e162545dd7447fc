"""The integer weights of compressed-tensors checkpoints: words of 32 bits along K to codes and back."""

from cumoe import _arrays, _check, _stored
from cumoe._arrays import Array
from cumoe._quant_desc import GroupShape
from cumoe._schemes import DTYPES, Quantized

_SCHEME_OF_BITS = {4: "int4", 8: "uint8"}


@_arrays.on_callers_stream
def from_compressed_tensors_packed(
    weight_packed: Array,
    weight_scale: Array,
    weight_zero_point: Array | None = None,
    weight_g_idx: Array | None = None,
    *,
    bits: int = 4,
) -> Quantized:
    """
    Read a weight of a compressed-tensors checkpoint in the format pack-quantized.

    Parameters
    ----------
    weight_packed : (..., N, K * bits / 32) array, int32
        Codes, numbers plus 8, or plus 128 with 8 bits; those of 32 / bits neighbours along K in a word, the
        first in its low bits.
    weight_scale : (..., N, K / g) array, float32, float16 or bfloat16
        Scale of each group; one column if each row is a group.
    weight_zero_point : (..., ceil(N * bits / 32), K / g) array, int32, optional
        Codes of zero, plus 8 or 128 likewise, packed along N. None stands for 8, or 128.
    weight_g_idx : (..., K) array, int32 or int64, optional
        Group of each k. It must be k // g.
    bits : {4, 8}, default 4
        Bits of a code.

    Returns
    -------
    quantized : Quantized
        Scheme ``"int4"`` or ``"uint8"`` with groups (1, g). Codes and scales are those given, without a copy if
        they are C-contiguous.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, or an odd N with zero points of four bits.
    NotImplementedError
        Groups in the order of activations (``actorder``).

    See Also
    --------
    to_compressed_tensors_packed : The way back.
    halve_groups : Brings groups to a size that kernels have, such as those of a checkpoint with one for each row.

    Notes
    -----
    ``weight_shape`` of the checkpoint is not needed: words are full. Nothing is rounded, and
    `to_compressed_tensors_packed` gives the same bits again. The call reads `weight_g_idx`, and so waits for the
    device, if that is given, and otherwise does not.

    References
    ----------
    .. [1] compressed-tensors, ``compressors/pack_quantized`` (``pack_to_int32``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> packed = np.array([[0x76543210] * 4], np.int32)
    >>> quantized = cumoe.from_compressed_tensors_packed(packed, np.ones((1, 1), np.float32))
    >>> cumoe.dequantize(quantized)[0, :8]
    array([-8., -7., -6., -5., -4., -3., -2., -1.], dtype=float32)
    """
    side, (packed, scale, zeros, g_idx) = _arrays.enter(
        weight_packed=weight_packed,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        weight_g_idx=weight_g_idx,
    )
    _check.choice("bits", bits, tuple(_SCHEME_OF_BITS))
    _check.dtype("weight_packed", packed, ("int32",))
    _stored.at_least_two_axes("weight_packed", packed, f"(..., N, K / {32 // bits})")
    *lead, n, num_words = packed.shape
    k = num_words * (32 // bits)
    _check.dtype("weight_scale", scale, DTYPES)
    _stored.at_least_two_axes("weight_scale", scale, "(..., N, K / g)")
    _check.shape("weight_scale", scale, "(..., N, K / g)", (*lead, n, scale.shape[-1]))
    group = _stored.group_size("weight_scale", scale, -1, k)
    if zeros is not None:
        _check.dtype("weight_zero_point", zeros, ("int32",))
        letters, rows = f"(..., ceil(N / {32 // bits}), K / g)", -(-n * bits // 32)
        _check.shape("weight_zero_point", zeros, letters, (*lead, rows, scale.shape[-1]))
        _stored.multiple("weight_zero_point", "N", n, 8 // bits)
    _stored.check_order(side.xp, "weight_g_idx", g_idx, tuple(lead), k, group)

    xp, zero_points = side.xp, None
    if zeros is not None:
        rows = n * bits // 8
        zero_points = side.leave(xp.ascontiguousarray(_stored.row_words_as_bytes(xp, zeros)[..., :rows, :]))
    values = side.leave(_stored.as_bytes(xp, packed))
    return Quantized(values, side.leave(scale), _SCHEME_OF_BITS[bits], GroupShape(1, group), zero_points)


@_arrays.on_callers_stream
def to_compressed_tensors_packed(quantized: Quantized) -> tuple[Array, Array, Array]:
    """
    Write a weight as compressed-tensors checkpoints in the format pack-quantized have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"int4"`` or ``"uint8"`` with groups (1, g) that divide K.

    Returns
    -------
    weight_packed : (..., N, K * bits / 32) array, int32
        Codes, packed along K.
    weight_scale : (..., N, K / g) array, dtype of the scales
        Scale of each group.
    weight_zero_point : (..., ceil(N * bits / 32), K / g) array, int32, or None
        Codes of zero, packed along N, the last word filled up by zeros; None if the operand has none.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme, a shape that does not fit, or K that does not fill words.

    See Also
    --------
    from_compressed_tensors_packed : The way there.

    Notes
    -----
    Nothing is rounded. A checkpoint has ``weight_shape`` too, which is (N, K). The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.arange(-8, 24, dtype="float32")[None], "int4", (1, 32))
    >>> weight_packed, weight_scale, weight_zero_point = cumoe.to_compressed_tensors_packed(quantized)
    >>> weight_packed.shape, weight_scale.shape, weight_zero_point
    ((1, 4), (1, 1), None)
    """
    parts = _stored.take_apart(quantized, tuple(_SCHEME_OF_BITS.values()))
    xp, per_word = parts.xp, 8 if quantized.scheme == "int4" else 4
    _stored.check_rows(parts)
    _stored.multiple("values", "K", parts.layout.shape[-1], per_word)
    zeros = None
    if parts.zero_points is not None:
        zeros = parts.side.leave(_stored.row_bytes_as_words(xp, parts.zero_points))
    return parts.side.leave(_stored.as_words(xp, parts.values)), parts.side.leave(parts.scale), zeros
