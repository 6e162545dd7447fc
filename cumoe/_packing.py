"""How codes and scales lie in memory: two codes of four bits a byte, and scales in blocks of 128 x 4."""

from types import ModuleType

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array

_NIBBLES = ("uint8", "int8", "uint4", "int4")
_SCALES = ("uint8", "float8_e4m3fn", "float8_e8m0fnu")


@_arrays.on_callers_stream
def pack_int4(codes: Array, axis: int = -1) -> Array:
    """
    Put two codes of four bits into each byte.

    Parameters
    ----------
    codes : array, uint8, int8, uint4 or int4
        Codes, of which the low four bits count.
    axis : int, default -1
        Axis along which two neighbours share a byte; its length must be even. Weights are packed along
        the last axis, K, zero points along the one before it, N.

    Returns
    -------
    packed : array, uint8
        Half as long along `axis`; the code of the even place is in the low four bits.

    Raises
    ------
    TypeError
        A dtype outside the list above, or an axis that is not an int.
    ValueError
        An axis that the array does not have, or one of odd length.

    See Also
    --------
    unpack_int4 : The way back.

    Notes
    -----
    Any codes of four bits are packed so, those of float4_e2m1fn too. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.pack_int4(np.array([[1, 2, 3, 15]], np.uint8))
    array([[ 33, 243]], dtype=uint8)
    """
    side, (codes,) = _arrays.enter(codes=codes)
    _check.dtype("codes", codes, _NIBBLES)
    axis = _check_axis("codes", codes, axis)
    if codes.shape[axis] % 2:
        raise ValueError(f"codes must have an even length along axis {axis}, got shape {tuple(codes.shape)}")
    return side.leave(packed(side.xp, _arrays.bits(codes).view(np.uint8), axis))


@_arrays.on_callers_stream
def unpack_int4(packed: Array, axis: int = -1) -> Array:
    """
    Give each of two codes that share a byte a byte of its own.

    Parameters
    ----------
    packed : array, uint8
        Two codes a byte, the one of the even place in the low four bits.
    axis : int, default -1
        Axis along which they were packed.

    Returns
    -------
    codes : array, uint8
        Codes 0..15, twice as many along `axis`.

    Raises
    ------
    TypeError
        Not uint8, or an axis that is not an int.
    ValueError
        An axis that the array does not have.

    See Also
    --------
    pack_int4 : The way there.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.unpack_int4(np.array([[33, 243]], np.uint8))
    array([[ 1,  2,  3, 15]], dtype=uint8)
    """
    side, (packed,) = _arrays.enter(packed=packed)
    _check.dtype("packed", packed, ("uint8",))
    axis = _check_axis("packed", packed, axis)
    return side.leave(unpacked(side.xp, packed, axis))


@_arrays.on_callers_stream
def swizzle_scales(scale: Array) -> Array:
    """
    Order scales in blocks of 128 rows and 4 columns, as Blackwell's tensor cores read them.

    Parameters
    ----------
    scale : (..., M, K / group) array, uint8, float8_e4m3fn or float8_e8m0fnu
        One scale for each group of each row.

    Returns
    -------
    swizzled : array, dtype of `scale`
        Rows and columns are multiples of 128 and 4, filled up by zeros; C-contiguous. Its shape only
        says how large it is: element (m, k) of a matrix is not at [m, k].

    Raises
    ------
    TypeError
        A dtype outside the list above.
    ValueError
        Fewer than 2 axes.

    See Also
    --------
    unswizzle_scales : The way back.

    Notes
    -----
    A padded matrix, seen as (M / 128, 4, 32, K' / 4, 4), is stored in the order (M / 128, K' / 4, 32, 4, 4),
    K' columns in all: each block of 128 rows and 4 columns is 512 bytes, rows r, r + 32, r + 64 and r + 96
    side by side. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> scale = np.arange(256, dtype=np.uint8).reshape(64, 4)
    >>> swizzled = cumoe.swizzle_scales(scale)
    >>> swizzled.shape, swizzled.ravel()[:24]
    ((128, 4), array([  0,   1,   2,   3, 128, 129, 130, 131,   0,   0,   0,   0,   0,
             0,   0,   0,   4,   5,   6,   7, 132, 133, 134, 135], dtype=uint8))
    """
    side, (scale,) = _arrays.enter(scale=scale)
    _check_scales("scale", scale)
    *lead, num_rows, num_cols = scale.shape
    rows, columns = swizzled_sizes(num_rows, num_cols)
    padded = side.xp.zeros((*lead, rows, columns), np.uint8)
    padded[..., :num_rows, :num_cols] = _arrays.bits(scale)
    blocks = padded.reshape(*lead, rows // 128, 4, 32, columns // 4, 4)
    swizzled = side.xp.ascontiguousarray(side.xp.moveaxis(blocks, (-2, -3, -4), (-4, -3, -2)))
    return side.leave(swizzled.reshape(padded.shape).view(scale.dtype))


@_arrays.on_callers_stream
def unswizzle_scales(scale: Array, num_rows: int, num_cols: int) -> Array:
    """
    Bring scales in the order of Blackwell's tensor cores back into rows and columns.

    Parameters
    ----------
    scale : (..., M, K / group) array, uint8, float8_e4m3fn or float8_e8m0fnu
        What `swizzle_scales` gives; M and K / group are multiples of 128 and 4.
    num_rows, num_cols : int
        Rows and columns that there are without those that fill up.

    Returns
    -------
    scale : (..., num_rows, num_cols) array, dtype of `scale`
        Element (m, k) is the scale of group k of row m.

    Raises
    ------
    TypeError
        A dtype outside the list above, or a number that is not an int.
    ValueError
        A shape that does not fit the numbers.

    See Also
    --------
    swizzle_scales : The way there.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> scale = np.arange(256, dtype=np.uint8).reshape(64, 4)
    >>> bool((cumoe.unswizzle_scales(cumoe.swizzle_scales(scale), 64, 4) == scale).all())
    True
    """
    side, (scale,) = _arrays.enter(scale=scale)
    _check_scales("scale", scale)
    num_rows, num_cols = _check.integer("num_rows", num_rows, 0), _check.integer("num_cols", num_cols, 0)
    letters = "(..., 128 ceil(num_rows / 128), 4 ceil(num_cols / 4))"
    _check.shape("scale", scale, letters, (*scale.shape[:-2], *swizzled_sizes(num_rows, num_cols)))
    return side.leave(unswizzled(side.xp, scale, num_rows, num_cols))


def packed(xp: ModuleType, codes: Array, axis: int) -> Array:
    """Two uint8 codes a byte along `axis`."""
    codes = xp.moveaxis(codes, axis, -1)
    pairs = (codes[..., 0::2] & 15) | ((codes[..., 1::2] & 15) << 4)
    return xp.ascontiguousarray(xp.moveaxis(pairs, -1, axis))


def unpacked(xp: ModuleType, pairs: Array, axis: int) -> Array:
    """The codes of `packed`, one a byte."""
    pairs = xp.moveaxis(pairs, axis, -1)
    codes = xp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])
    return xp.ascontiguousarray(xp.moveaxis(codes, -1, axis))


def swizzled_sizes(num_rows: int, num_cols: int) -> tuple[int, int]:
    """Rows and columns of scales in blocks of 128 x 4, filled up."""
    return -(-num_rows // 128) * 128, -(-num_cols // 4) * 4


def unswizzled(xp: ModuleType, scale: Array, num_rows: int, num_cols: int) -> Array:
    """Scales in blocks of 128 x 4, of the sizes above, by row and column; new memory."""
    *lead, down, across = scale.shape
    blocks = _arrays.bits(scale).reshape(*lead, down // 128, across // 4, 32, 4, 4)
    rows = xp.moveaxis(blocks, (-4, -3, -2), (-2, -3, -4)).reshape(scale.shape)
    return xp.ascontiguousarray(rows[..., :num_rows, :num_cols]).view(scale.dtype)


def _check_axis(name: str, array: Array, axis: int) -> int:
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least 1 axis, got shape ()")
    return _check.integer("axis", axis, -array.ndim, array.ndim - 1)


def _check_scales(name: str, scale: Array) -> None:
    _check.dtype(name, scale, _SCALES)
    if scale.ndim < 2:
        raise ValueError(f"{name} must have at least 2 axes (..., M, K / group), got shape {tuple(scale.shape)}")
