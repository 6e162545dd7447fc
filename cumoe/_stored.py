"""What readers and writers of checkpoint formats share: words of 32 bits, orders of groups, dtypes of scales."""

from collections.abc import Collection
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array, Side
from cumoe._quant_desc import GroupShape
from cumoe._schemes import Layout, Quantized, check_parts, scheme_of

WIDE_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")  # whose numbers float32 holds


class Parts(NamedTuple):
    """A `Quantized` whose arrays were taken in and fit together; its scales have as many axes as the operand."""

    side: Side
    values: Array
    scale: Array
    zero_points: Array
    global_scale: Array
    layout: Layout
    others: tuple[Array, ...]

    @property
    def xp(self) -> ModuleType:
        """The array module of the side."""
        return self.side.xp

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.layout.group[1]


def take_apart(quantized: Quantized, schemes: Collection[str], **others: Array) -> Parts:
    """Take in the arrays of an operand of one of the `schemes`, check that they fit, and take in `others` with them."""
    if not isinstance(quantized, Quantized):
        raise TypeError(f"quantized must be a Quantized, got {type(quantized).__name__}")
    names = ("values", "scale", "zero_points", "global_scale")
    inside = {name: getattr(quantized, name) for name in names}
    side, (values, scale, zero_points, global_scale, *others_inside) = _arrays.enter(**inside, **others)
    _check.choice("scheme", quantized.scheme, schemes)
    rule = scheme_of(quantized.scheme)
    _check.dtype("values", values, (rule.codes.name,))
    _check.given("scale", scale)
    at_least_two_axes("values", values, "(..., N, K)")
    columns = values.shape[-1] * (2 if rule.is_packed else 1)
    layout = Layout((*values.shape[:-1], columns), GroupShape(*quantized.group_shape))
    if quantized.scheme == "nvfp4":
        _check.given("global_scale", global_scale)
    check_parts(quantized.scheme, layout, scale, zero_points, global_scale)
    scale = scale.reshape(layout.scale_shape)
    return Parts(side, values, scale, zero_points, global_scale, layout, tuple(others_inside))


def check_rows(parts: Parts) -> None:
    """Raise ValueError unless each row is cut into groups of one size."""
    group, columns = parts.layout.group_shape, parts.layout.shape[-1]
    if group.row != 1 or columns == 0 or columns % parts.group:
        raise ValueError(f"group_shape must be (1, g), g a divisor of K = {columns}, got {tuple(group)}")


def at_least_two_axes(name: str, array: Array, letters: str) -> None:
    """Raise ValueError unless there is a matrix."""
    if array.ndim < 2:
        raise ValueError(f"{name} must have at least 2 axes {letters}, got shape {tuple(array.shape)}")


def multiple(name: str, letter: str, size: int, of: int) -> None:
    """Raise ValueError unless an axis of `name` can be cut into whole words."""
    if size % of:
        raise ValueError(f"{name} must have {letter} a multiple of {of}, got {size}")


def group_size(name: str, scale: Array, axis: int, columns: int) -> int:
    """Columns of a group, from how many scales there are along `axis`."""
    groups = scale.shape[axis]
    if groups == 0 or columns == 0 or columns % groups:
        raise ValueError(f"{name} must have a divisor of K = {columns} groups along axis {axis}, got {groups}")
    return int(columns // groups)


def check_order(xp: ModuleType, name: str, g_idx: Array, lead: tuple[int, ...], columns: int, group: int) -> None:
    """Check that column k is of group k // g; this waits for the device."""
    if g_idx is None:
        return
    _check.dtype(name, g_idx, ("int32", "int64"))
    _check.shape(name, g_idx, "(..., K)", (*lead, columns))
    if not bool((g_idx == xp.arange(columns) // group).all()):
        raise NotImplementedError(
            f"{name} must give k // {group} for column k: groups in the order of activations (act-order, desc_act) "
            "are not supported"
        )


def as_bytes(xp: ModuleType, words: Array) -> Array:
    """Words (..., n) as bytes (..., 4 n), the low one first."""
    return xp.ascontiguousarray(words).view(np.uint8)


def as_words(xp: ModuleType, codes: Array) -> Array:
    """Bytes (..., 4 n) as words (..., n) of int32."""
    words = xp.ascontiguousarray(codes).view(np.int32)
    return words.copy() if xp is np and not words.flags.aligned else words


def transposed(xp: ModuleType, array: Array) -> Array:
    """The last two axes changed, in C order; any dtype."""
    unsigned = array.view(f"u{array.dtype.itemsize}")  # CuPy cannot copy what it holds as a label only
    return xp.ascontiguousarray(unsigned.swapaxes(-1, -2)).view(array.dtype)


def repeated(xp: ModuleType, array: Array, times: int) -> Array:
    """Each column `times` times; any dtype."""
    return xp.repeat(array.view(f"u{array.dtype.itemsize}"), times, axis=-1).view(array.dtype)


def row_words_as_bytes(xp: ModuleType, words: Array) -> Array:
    """Words (..., n, m) that are packed along n as bytes (..., 4 n, m), the low one first."""
    *lead, rows, columns = words.shape
    split = as_bytes(xp, words).reshape(*lead, rows, columns, 4)
    return xp.ascontiguousarray(split.swapaxes(-1, -2)).reshape(*lead, 4 * rows, columns)


def row_bytes_as_words(xp: ModuleType, codes: Array) -> Array:
    """Bytes (..., n, m) as words (..., ceil(n / 4), m), filled up by zeros."""
    *lead, rows, columns = codes.shape
    num_words = -(-rows // 4)
    padded = xp.zeros((*lead, 4 * num_words, columns), np.uint8)
    padded[..., :rows, :] = codes
    split = padded.reshape(*lead, num_words, 4, columns).swapaxes(-1, -2)
    return as_words(xp, split).reshape(*lead, num_words, columns)


def widened(xp: ModuleType, scale: Array) -> Array:
    """Scales of a dtype of `WIDE_SCALES` as float32, exactly; float32 as it is."""
    name = scale.dtype.name
    if name == "float32":
        return scale
    if name == "float16":
        return scale.astype(np.float32)
    codes = _arrays.bits(scale).astype(np.uint32)
    if name == "bfloat16":
        return (codes << 16).view(np.float32)
    # the exponent alone: code 0 is 2**-127, which float32 holds below its normal numbers, 255 is NaN
    words = xp.where(codes == 0, 0x00400000, xp.where(codes == 255, 0x7FC00000, codes << 23))
    return words.astype(np.uint32).view(np.float32)


def narrowed(xp: ModuleType, scale: Array, dtype: str) -> Array:
    """Float32 scales as `dtype` of `WIDE_SCALES`, or ValueError if it cannot hold them: this waits for the device."""
    if dtype == "float32":
        return scale
    words = _arrays.bits(scale).view(np.uint32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            narrow = scale.astype(np.float16)
    elif dtype == "bfloat16":
        narrow = (words >> 16).astype(np.uint16).view(np.dtype(dtype))
    else:
        narrow = (words >> 23 & 0xFF).astype(np.uint8).view(np.dtype(dtype))
    if not bool((widened(xp, narrow).view(np.uint32) == words).all()):
        raise ValueError(f"scale must have numbers that {dtype} holds exactly; choose another scale_dtype")
    return narrow
