"""The weights of GPTQ and AWQ checkpoints: integers in words of 32 bits, (K, N), to codes (N, K) and back."""

from types import ModuleType

from cumoe import _arrays, _check, _packing, _stored
from cumoe._arrays import Array
from cumoe._quant_desc import GroupShape
from cumoe._schemes import DTYPES, Quantized

_SCHEME_OF_BITS = {4: "int4", 8: "uint8"}
_GPTQ_FORMATS = ("gptq", "gptq_v2")


@_arrays.on_callers_stream
def from_gptq(
    qweight: Array,
    scales: Array,
    qzeros: Array | None = None,
    g_idx: Array | None = None,
    *,
    bits: int = 4,
    checkpoint_format: str = "gptq",
) -> Quantized:
    """
    Read a weight of a GPTQ checkpoint.

    Parameters
    ----------
    qweight : (..., K * bits / 32, N) array, int32
        Codes, those of 32 / bits neighbours along K in a word, the first in its low bits.
    scales : (..., K / g, N) array, float32, float16 or bfloat16
        Scale of each group of g rows.
    qzeros : (..., K / g, N * bits / 32) array, int32, optional
        Codes of zero, packed along N, the first in the low bits. None stands for 8, or 128 with 8 bits.
    g_idx : (..., K) array, int32 or int64, optional
        Group of each k. It must be k // g.
    bits : {4, 8}, default 4
        Bits of a code.
    checkpoint_format : {"gptq", "gptq_v2"}, default "gptq"
        Whether the codes of zero are stored minus one, or as they are.

    Returns
    -------
    quantized : Quantized
        Scheme ``"int4"`` or ``"uint8"`` with groups (1, g), the scales in their dtype.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, K or N that do not fill words, or an option outside the lists above.
    NotImplementedError
        Groups in the order of activations (act-order, ``desc_act``).

    See Also
    --------
    to_gptq : The way back.
    halve_groups : Brings groups to a size that kernels have, such as those of a checkpoint with one for each row.

    Notes
    -----
    Minus one counts modulo 16, or 256: a stored 15 stands for 0. Nothing is rounded, and `to_gptq` gives the same
    bits again. The call reads `g_idx`, and so waits for the device, if that is given, and otherwise does not.

    References
    ----------
    .. [1] AutoGPTQ, ``auto_gptq/nn_modules/qlinear``; GPTQModel, ``gptqmodel/utils/model.py``
       (``convert_gptq_v1_to_v2_format``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> qweight = np.full((4, 8), 0x76543210, np.int32)
    >>> scales = np.ones((1, 8), np.float32)
    >>> qzeros = np.full((1, 1), 0x77777777, np.int32)
    >>> quantized = cumoe.from_gptq(qweight, scales, qzeros)
    >>> quantized.scheme, quantized.group_shape
    ('int4', GroupShape(row=1, col=32))
    >>> cumoe.dequantize(quantized)[0, :8]
    array([-8., -7., -6., -5., -4., -3., -2., -1.], dtype=float32)
    """
    side, (qweight, scales, qzeros, g_idx) = _arrays.enter(qweight=qweight, scales=scales, qzeros=qzeros, g_idx=g_idx)
    _check.choice("bits", bits, tuple(_SCHEME_OF_BITS))
    _check.choice("checkpoint_format", checkpoint_format, _GPTQ_FORMATS)
    _check.dtype("qweight", qweight, ("int32",))
    _stored.at_least_two_axes("qweight", qweight, f"(..., K / {32 // bits}, N)")
    *lead, num_words, n = qweight.shape
    group = _check_grouped(scales, tuple(lead), num_words * (32 // bits), n)
    if qzeros is not None:
        _check_qzeros(qzeros, scales, 32 // bits)
    _stored.check_order(side.xp, "g_idx", g_idx, tuple(lead), num_words * (32 // bits), group)

    xp = side.xp
    values = _stored.as_bytes(xp, _stored.transposed(xp, qweight))
    zero_points = None
    if qzeros is not None:
        zero_points = _stored.transposed(xp, _stored.as_bytes(xp, qzeros))
        if checkpoint_format == "gptq":
            zero_points = _stepped(zero_points, bits, 1)
        zero_points = side.leave(zero_points)
    scale = side.leave(_stored.transposed(xp, scales))
    return Quantized(side.leave(values), scale, _SCHEME_OF_BITS[bits], GroupShape(1, group), zero_points)


@_arrays.on_callers_stream
def to_gptq(quantized: Quantized, *, checkpoint_format: str = "gptq") -> tuple[Array, Array, Array]:
    """
    Write a weight as GPTQ checkpoints have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"int4"`` or ``"uint8"`` with groups (1, g) that divide K.
    checkpoint_format : {"gptq", "gptq_v2"}, default "gptq"
        Whether the codes of zero are stored minus one, or as they are.

    Returns
    -------
    qweight : (..., K * bits / 32, N) array, int32
        Codes, packed along K.
    scales : (..., K / g, N) array, dtype of the scales
        Scale of each group.
    qzeros : (..., K / g, N * bits / 32) array, int32, or None
        Codes of zero, packed along N; None if the operand has none.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme, a shape that does not fit, or K or N that do not fill words.

    See Also
    --------
    from_gptq : The way there.

    Notes
    -----
    Nothing is rounded. Where a loader insists on `qzeros` of a symmetric weight, these are 0x77777777 in all words
    (0x88888888 of ``"gptq_v2"``), with 8 bits 0x7F7F7F7F (0x80808080); its ``g_idx`` is ``arange(K) // g``. The
    call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.arange(-8, 24, dtype="float32")[None], "int4", (1, 32))
    >>> qweight, scales, qzeros = cumoe.to_gptq(quantized)
    >>> qweight.shape, scales.shape, qzeros
    ((4, 1), (1, 1), None)
    """
    _check.choice("checkpoint_format", checkpoint_format, _GPTQ_FORMATS)
    parts = _stored.take_apart(quantized, tuple(_SCHEME_OF_BITS.values()))
    xp, bits = parts.xp, 4 if quantized.scheme == "int4" else 8
    _stored.check_rows(parts)
    _stored.multiple("values", "K", parts.layout.shape[-1], 32 // bits)
    qzeros = None
    if parts.zero_points is not None:
        _stored.multiple("zero_points", "N", parts.layout.shape[-2], 32 // bits)
        stored = parts.zero_points
        if checkpoint_format == "gptq":
            stored = _stepped(stored, bits, -1)
        qzeros = parts.side.leave(_stored.as_words(xp, _stored.transposed(xp, stored)))
    qweight = _stored.transposed(xp, _stored.as_words(xp, parts.values))
    return parts.side.leave(qweight), parts.side.leave(_stored.transposed(xp, parts.scale)), qzeros


@_arrays.on_callers_stream
def from_awq(qweight: Array, scales: Array, qzeros: Array | None = None) -> Quantized:
    """
    Read a weight of an AWQ checkpoint.

    Parameters
    ----------
    qweight : (..., K, N / 8) array, int32
        Codes of four bits, those of columns 0, 2, 4, 6, 1, 3, 5, 7 of eight neighbours along N in a word, the
        first in its low bits.
    scales : (..., K / g, N) array, float32, float16 or bfloat16
        Scale of each group of g rows.
    qzeros : (..., K / g, N / 8) array, int32, optional
        Codes of zero, packed likewise. None stands for 8.

    Returns
    -------
    quantized : Quantized
        Scheme ``"int4"`` with groups (1, g), the scales in their dtype.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, or an odd K.

    See Also
    --------
    to_awq : The way back.
    halve_groups : Brings groups to a size that kernels have.

    Notes
    -----
    The layout of AutoAWQ's GEMM kernels; those of its GEMV kernels have another. Nothing is rounded, and `to_awq`
    gives the same bits again. The call does not wait for the device.

    References
    ----------
    .. [1] AutoAWQ, ``awq/utils/packing_utils.py``; vLLM,
       ``model_executor/layers/quantization/moe_wna16.py`` (``convert_awq_tensor``).

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> qweight = np.full((32, 1), 0x75316420, np.int32)
    >>> quantized = cumoe.from_awq(qweight, np.ones((1, 8), np.float32))
    >>> cumoe.dequantize(quantized)[:, 0]
    array([-8., -7., -6., -5., -4., -3., -2., -1.], dtype=float32)
    """
    side, (qweight, scales, qzeros) = _arrays.enter(qweight=qweight, scales=scales, qzeros=qzeros)
    _check.dtype("qweight", qweight, ("int32",))
    _stored.at_least_two_axes("qweight", qweight, "(..., K, N / 8)")
    *lead, k, num_words = qweight.shape
    group = _check_grouped(scales, tuple(lead), k, 8 * num_words)
    if qzeros is not None:
        _check_qzeros(qzeros, scales, 8)
    if k % 2:
        raise ValueError(f"qweight must have an even K, got shape {tuple(qweight.shape)}")

    xp = side.xp
    values = _packing.packed(xp, _in_order(xp, qweight).swapaxes(-1, -2), -1)
    zero_points = None
    if qzeros is not None:
        zero_points = side.leave(_packing.packed(xp, _in_order(xp, qzeros).swapaxes(-1, -2), -2))
    scale = side.leave(_stored.transposed(xp, scales))
    return Quantized(side.leave(values), scale, "int4", GroupShape(1, group), zero_points)


@_arrays.on_callers_stream
def to_awq(quantized: Quantized) -> tuple[Array, Array, Array]:
    """
    Write a weight as AWQ checkpoints have it.

    Parameters
    ----------
    quantized : Quantized
        Scheme ``"int4"`` with groups (1, g) that divide K, N a multiple of 8.

    Returns
    -------
    qweight : (..., K, N / 8) array, int32
        Codes, packed along N.
    scales : (..., K / g, N) array, dtype of the scales
        Scale of each group.
    qzeros : (..., K / g, N / 8) array, int32, or None
        Codes of zero, packed likewise; None if the operand has none.

    Raises
    ------
    TypeError
        Not a `Quantized`, or a part of it that has the wrong dtype.
    ValueError
        Another scheme, a shape that does not fit, or N that does not fill words.

    See Also
    --------
    from_awq : The way there.

    Notes
    -----
    Nothing is rounded. Where a loader insists on `qzeros` of a symmetric weight, these are 0x88888888 in all words.
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.ones((8, 32), "float32"), "int4", (1, 32))
    >>> qweight, scales, qzeros = cumoe.to_awq(quantized)
    >>> qweight.shape, scales.shape, hex(qweight[0, 0])
    ((32, 1), (1, 8), '-0x1')
    """
    parts = _stored.take_apart(quantized, ("int4",))
    xp = parts.xp
    _stored.check_rows(parts)
    _stored.multiple("values", "N", parts.layout.shape[-2], 8)
    qzeros = None
    if parts.zero_points is not None:
        codes = _packing.unpacked(xp, parts.zero_points, -2).swapaxes(-1, -2)
        qzeros = parts.side.leave(_interleaved(xp, codes))
    qweight = _interleaved(xp, _packing.unpacked(xp, parts.values, -1).swapaxes(-1, -2))
    return parts.side.leave(qweight), parts.side.leave(_stored.transposed(xp, parts.scale)), qzeros


def _check_grouped(scales: Array, lead: tuple[int, ...], k: int, n: int) -> int:
    """Check scales (..., K / g, N); return g."""
    _check.dtype("scales", scales, DTYPES)
    _stored.at_least_two_axes("scales", scales, "(..., K / g, N)")
    _check.shape("scales", scales, "(..., K / g, N)", (*lead, scales.shape[-2], n))
    return _stored.group_size("scales", scales, -2, k)


def _check_qzeros(qzeros: Array, scales: Array, per_word: int) -> None:
    *lead, n = scales.shape
    _stored.multiple("qzeros", "N", n, per_word)
    _check.dtype("qzeros", qzeros, ("int32",))
    _check.shape("qzeros", qzeros, f"(..., K / g, N / {per_word})", (*lead, n // per_word))


def _stepped(codes: Array, bits: int, by: int) -> Array:
    """Add 1 or -1 to each code of a byte, modulo its bits."""
    if bits == 8:
        return codes + (by & 0xFF)
    step = by & 0xF
    return (codes + step & 0x0F) | ((codes & 0xF0) + (step << 4) & 0xF0)


def _in_order(xp: ModuleType, words: Array) -> Array:
    """Codes (..., n), one a byte, of words (..., n / 8): column 2 q + h of a word is in its place 4 h + q."""
    codes = _packing.unpacked(xp, _stored.as_bytes(xp, words), -1)
    places = codes.reshape(*words.shape, 2, 4)
    return places.swapaxes(-1, -2).reshape(codes.shape)


def _interleaved(xp: ModuleType, codes: Array) -> Array:
    """Words (..., n / 8) of codes (..., n), one a byte."""
    *lead, n = codes.shape
    places = codes.reshape(*lead, n // 8, 4, 2).swapaxes(-1, -2).reshape(*lead, n)
    return _stored.as_words(xp, _packing.packed(xp, places, -1))
