"""One grouping told in the words of other libraries: offsets, sizes and scales."""

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array


@_arrays.on_callers_stream
def grouped_mm_offsets(expert_first_token_offset: Array) -> Array:
    """
    Say where each group ends, as ``torch.nn.functional.grouped_mm`` wants it.

    Parameters
    ----------
    expert_first_token_offset : (E + 1,) array, int32 or int64
        Expert e has rows ``[offset[e], offset[e + 1])``; the first is 0.

    Returns
    -------
    offs : (E,) int32 array
        One past the last row of each expert.

    Raises
    ------
    TypeError
        Not an integer array.
    ValueError
        Not one axis with at least one element.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.grouped_mm_offsets(np.array([0, 2, 2, 5]))
    array([2, 2, 5], dtype=int32)
    """
    side, (offsets,) = _arrays.enter(expert_first_token_offset=expert_first_token_offset)
    _check_offsets(offsets)
    return side.leave(offsets[1:].astype(np.int32))


@_arrays.on_callers_stream
def ragged_dot_group_sizes(expert_first_token_offset: Array) -> Array:
    """
    Say how large each group is, as ``jax.lax.ragged_dot`` wants it.

    Parameters
    ----------
    expert_first_token_offset : (E + 1,) array, int32 or int64
        Expert e has rows ``[offset[e], offset[e + 1])``; the first is 0.

    Returns
    -------
    group_sizes : (E,) int32 array
        Rows of each expert.

    Raises
    ------
    TypeError
        Not an integer array.
    ValueError
        Not one axis with at least one element.

    See Also
    --------
    first_token_offset : The way back.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.ragged_dot_group_sizes(np.array([0, 2, 2, 5]))
    array([2, 0, 3], dtype=int32)
    """
    side, (offsets,) = _arrays.enter(expert_first_token_offset=expert_first_token_offset)
    _check_offsets(offsets)
    return side.leave((offsets[1:] - offsets[:-1]).astype(np.int32))


@_arrays.on_callers_stream
def first_token_offset(group_sizes: Array) -> Array:
    """
    Say where each group starts, from the sizes of the groups.

    Parameters
    ----------
    group_sizes : (E,) array, int32 or int64
        Rows of each expert.

    Returns
    -------
    expert_first_token_offset : (E + 1,) int64 array
        Expert e has rows ``[offset[e], offset[e + 1])``.

    Raises
    ------
    TypeError
        Not an integer array.
    ValueError
        Not one axis.

    See Also
    --------
    ragged_dot_group_sizes : The way back.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.first_token_offset(np.array([2, 0, 3]))
    array([0, 2, 2, 5])
    """
    side, (sizes,) = _arrays.enter(group_sizes=group_sizes)
    _check_counts("group_sizes", sizes, "(E,)")
    offsets = side.xp.zeros(sizes.size + 1, np.int64)
    offsets[1:] = side.xp.cumsum(sizes, dtype=np.int64)
    return side.leave(offsets)


@_arrays.on_callers_stream
def aligned_end_offsets(expert_num_tokens: Array, alignment: int = 128) -> Array:
    """
    Say where the tokens of each expert end in the rows of `moe_permute_aligned`.

    Parameters
    ----------
    expert_num_tokens : (E_l,) array, int32 or int64
        Rows of each expert that are not padding.
    alignment : int, default 128
        Rows of a block.

    Returns
    -------
    end_offsets : (E_l,) int32 array
        One past the last row of each expert that is not padding; the next expert starts at the next
        multiple of `alignment`.

    Raises
    ------
    TypeError
        Not an integer array.
    ValueError
        Not one axis, or an alignment below 1.

    Notes
    -----
    The form in which newer DeepGEMM takes the contiguous-grouped layout, instead of ``m_indices``. The
    call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.aligned_end_offsets(np.array([3, 0, 5, 1]), 4)
    array([ 3,  4,  9, 13], dtype=int32)
    """
    side, (counts,) = _arrays.enter(expert_num_tokens=expert_num_tokens)
    _check_counts("expert_num_tokens", counts, "(E_l,)")
    alignment = _check.integer("alignment", alignment, 1, 2**31 - 1)
    counts = counts.astype(np.int64)
    padded = -(-counts // alignment) * alignment
    return side.leave((side.xp.cumsum(padded) - padded + counts).astype(np.int32))


@_arrays.on_callers_stream
def tma_aligned_scale(scale: Array, *, pack_ue8m0: bool = False) -> Array:
    """
    Lay scales column by column, as the tensor memory accelerator loads them.

    Parameters
    ----------
    scale : (M, K / group) or (E, M, K / group) array, float32 or float8_e8m0fnu
        Scales of rows.
    pack_ue8m0 : bool, default False
        Keep the exponents only, four neighbours of a row in an int32, the first in its low byte. The
        scales must be powers of two; other bits are dropped.

    Returns
    -------
    aligned : array, float32, or int32 with `pack_ue8m0`
        Of the shape of `scale`, with ``ceil(K / group / 4)`` columns if packed. The axis M is contiguous
        in memory, and columns are a multiple of 16 bytes apart; what lies between is zero.

    Raises
    ------
    TypeError
        A dtype outside the list above, or float8_e8m0fnu without `pack_ue8m0`.
    ValueError
        Not 2 or 3 axes.

    Notes
    -----
    The layout of DeepGEMM on SM90 (float32) and SM100 (packed). The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> scale = np.array([[1.0, 2.0], [4.0, 0.5], [8.0, 1.0]], "float32")
    >>> aligned = cumoe.tma_aligned_scale(scale)
    >>> bool((aligned == scale).all()), aligned.strides
    (True, (4, 16))
    >>> [hex(word) for word in cumoe.tma_aligned_scale(scale, pack_ue8m0=True)[:, 0]]
    ['0x807f', '0x7e81', '0x7f82']
    """
    side, (scale,) = _arrays.enter(scale=scale)
    xp = side.xp
    _check.dtype("scale", scale, ("float32", "float8_e8m0fnu") if pack_ue8m0 else ("float32",))
    if scale.ndim not in (2, 3):
        raise ValueError(f"scale must have 2 or 3 axes (M, K / group), got shape {tuple(scale.shape)}")
    if pack_ue8m0:
        codes = _arrays.bits(scale)
        if codes.dtype == np.float32:
            codes = ((codes.view(np.uint32) >> 23) & 0xFF).astype(np.uint8)
        *rows, columns = codes.shape
        padded = xp.zeros((*rows, -(-columns // 4) * 4), np.uint8)
        padded[..., :columns] = codes
        scale = padded.view(np.int32)
    *batch, rows_per_batch, columns = scale.shape
    memory = xp.zeros((*batch, columns, -(-rows_per_batch // 4) * 4), scale.dtype)
    aligned = memory[..., :rows_per_batch].swapaxes(-1, -2)
    aligned[...] = scale
    return side.leave(aligned)


def _check_offsets(offsets: Array) -> None:
    _check_counts("expert_first_token_offset", offsets, "(E + 1,)")
    if offsets.size == 0:
        raise ValueError("expert_first_token_offset must have shape (E + 1,), got (0,)")


def _check_counts(name: str, counts: Array, letters: str) -> None:
    _check.ndim(name, counts, letters, 1)
    _check.dtype(name, counts, ("int32", "int64"))
