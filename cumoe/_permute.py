"""Tokens copied into rows sorted by expert: dense (grouped GEMM) and aligned (contiguous-grouped) forms."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array


@_arrays.on_callers_stream
def moe_permute(
    hidden_states: Array,
    a1q_scale: Array | None,
    topk_ids: Array,
    num_experts: int,
    num_local_experts: int | None = None,
    expert_map: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array | None, Array, Array, Array]:
    """
    Copy each token once per choice into rows sorted by expert.

    Parameters
    ----------
    hidden_states : (T, H) array of any number type
        Tokens, also quantised ones.
    a1q_scale : array, or None
        Scales of the tokens. With 2 axes and T rows it is permuted like the tokens; a scale of one
        element or of one axis is handed back as it is.
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. A pair whose id is outside 0..E-1 is skipped.
    num_experts : int
        E, the number of experts that ids count over.
    num_local_experts : int, optional
        E_l, the experts of this rank; default E.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it; such pairs are skipped.
    out : (T*k, H) array, dtype of `hidden_states`, optional
        Receives the rows; must not share memory with the inputs.

    Returns
    -------
    permuted_hidden_states : (T*k, H) array, dtype of `hidden_states`
        The rows of local expert 0, then those of expert 1, and so on; pairs ascending within an expert.
        Rows that no pair fills, at the end, are zero, or left as they are in `out`.
    permuted_scale : array, or None
        Scale of each row; zero in rows that no pair fills.
    expert_first_token_offset : (E_l + 1,) int64 array
        Expert e has rows ``[offset[e], offset[e + 1])``.
    inv_permuted_idx : (T, k) int32 array
        Row of each pair, -1 if it is skipped.
    permuted_idx : (T*k,) int32 array
        Pair t * k + j of each row; T*k in rows that no pair fills.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit.

    See Also
    --------
    moe_unpermute : The way back.
    moe_permute_aligned : Each expert's rows start at a multiple of a block.

    Notes
    -----
    A stable counting sort: the same inputs give the same rows, for any number of threads. The call does
    not wait for the device.

    References
    ----------
    .. [1] vLLM, ``fused_moe/moe_permute_unpermute.py``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[1.0], [2.0]], "float32")
    >>> rows, _, offset, inv, idx = cumoe.moe_permute(x, None, np.array([[2, 0], [0, -1]]), 3)
    >>> rows.ravel(), offset
    (array([1., 2., 1., 0.], dtype=float32), array([0, 2, 2, 3]))
    >>> inv.tolist(), idx
    ([[2, 0], [1, -1]], array([1, 2, 0, 4], dtype=int32))
    """
    side, (x, scale, ids, expert_map, given) = _arrays.enter(
        hidden_states=hidden_states, a1q_scale=a1q_scale, topk_ids=topk_ids, expert_map=expert_map, out=out
    )
    num_experts = _check.integer("num_experts", num_experts, 1, 2**31 - 1)
    num_local = _local_experts(num_experts, num_local_experts, expert_map)
    _check_tokens(x, scale, ids)
    num_tokens, top_k = ids.shape
    xp, room = side.xp, _arrays.room(side.xp, "permute")
    offsets = xp.empty(num_local + 1, np.int64)
    permuted_idx = xp.empty(ids.size, np.int32)
    inv_permuted_idx = xp.empty((num_tokens, top_k), np.int32)
    rows = _rows(xp, x, ids.size, "(T*k, H)", given, hidden_states=x, a1q_scale=scale, topk_ids=ids)
    room.sort_by_expert(_arrays.bits(ids), _map(xp, expert_map), offsets, permuted_idx, inv_permuted_idx)
    room.gather_rows(_bytes(x), permuted_idx, _bytes(rows), top_k)
    permuted_scale = _permute_scale(room, xp, scale, a1q_scale, permuted_idx, num_tokens, top_k, side)
    indices = side.leave(offsets), side.leave(inv_permuted_idx), side.leave(permuted_idx)
    return side.leave(rows), permuted_scale, *indices


@_arrays.on_callers_stream
def moe_permute_aligned(
    hidden_states: Array,
    a1q_scale: Array | None,
    topk_ids: Array,
    num_local_experts: int,
    *,
    alignment: int = 128,
    expert_map: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array | None, Array, Array, Array, Array]:
    """
    Copy tokens into rows sorted by expert, each expert's rows starting at a multiple of `alignment`.

    Parameters
    ----------
    hidden_states : (T, H) array of any number type
        Tokens, also quantised ones.
    a1q_scale : array, or None
        Scales of the tokens, as in `moe_permute`.
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. A pair whose id is outside 0..E-1 is skipped.
    num_local_experts : int
        E_l, the experts of this rank.
    alignment : int, default 128
        Rows of a block; a block belongs to one expert.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it; without it E = E_l.
    out : (M_sum, H) array, dtype of `hidden_states`, optional
        Receives the rows; must not share memory with the inputs. M_sum is `aligned_num_rows`.

    Returns
    -------
    permuted_hidden_states : (M_sum, H) array, dtype of `hidden_states`
        Rows; those of padding are zero, or left as they are in `out`.
    permuted_scale : array, or None
        Scale of each row; zero in padding.
    m_indices : (M_sum,) int32 array
        Local expert of each row, -1 in padding.
    inv_permuted_idx : (T, k) int32 array
        Row of each pair, -1 if it is skipped.
    permuted_idx : (M_sum,) int32 array
        Pair t * k + j of each row; T*k in padding.
    expert_num_tokens : (E_l,) int32 array
        Rows of each local expert that are not padding.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit.

    See Also
    --------
    moe_unpermute : The way back.
    aligned_num_rows : M_sum.
    aligned_end_offsets : The layout as end offsets instead of `m_indices`.
    tma_aligned_scale : Scales as the Hopper kernels load them.

    Notes
    -----
    The contiguous-grouped layout of DeepGEMM. Stable within an expert; the same inputs give the same
    rows. The call does not wait for the device.

    References
    ----------
    .. [1] DeepGEMM, ``m_grouped_fp8_gemm_nt_contiguous``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[1.0], [2.0]], "float32")
    >>> ids = np.array([[2, 0], [0, 2]])
    >>> rows, _, m_indices, inv, *_ = cumoe.moe_permute_aligned(x, None, ids, 3, alignment=4)
    >>> m_indices
    array([ 0,  0, -1, -1,  2,  2, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
          dtype=int32)
    >>> rows.ravel()[:8], inv.tolist()
    (array([1., 2., 0., 0., 1., 2., 0., 0.], dtype=float32), [[4, 0], [1, 5]])
    """
    side, (x, scale, ids, expert_map, given) = _arrays.enter(
        hidden_states=hidden_states, a1q_scale=a1q_scale, topk_ids=topk_ids, expert_map=expert_map, out=out
    )
    num_local = _check.integer("num_local_experts", num_local_experts, 1, 2**31 - 1)
    _check.expert_map(expert_map)
    _check_tokens(x, scale, ids)
    num_tokens, top_k = ids.shape
    num_rows = aligned_num_rows(num_tokens, top_k, num_local, alignment)
    xp, room = side.xp, _arrays.room(side.xp, "permute")
    expert_num_tokens = xp.empty(num_local, np.int32)
    m_indices = xp.empty(num_rows, np.int32)
    permuted_idx = xp.empty(num_rows, np.int32)
    inv_permuted_idx = xp.empty((num_tokens, top_k), np.int32)
    rows = _rows(xp, x, num_rows, "(M_sum, H)", given, hidden_states=x, a1q_scale=scale, topk_ids=ids)
    room.sort_by_expert_aligned(
        _arrays.bits(ids),
        _map(xp, expert_map),
        expert_num_tokens,
        m_indices,
        permuted_idx,
        inv_permuted_idx,
        int(alignment),
    )
    room.gather_rows(_bytes(x), permuted_idx, _bytes(rows), top_k)
    permuted_scale = _permute_scale(room, xp, scale, a1q_scale, permuted_idx, num_tokens, top_k, side)
    indices = m_indices, inv_permuted_idx, permuted_idx, expert_num_tokens
    return side.leave(rows), permuted_scale, *(side.leave(array) for array in indices)


def aligned_num_rows(num_tokens: int, top_k: int, num_local_experts: int, alignment: int = 128) -> int:
    """
    Count the rows that `moe_permute_aligned` needs for any routing.

    Parameters
    ----------
    num_tokens, top_k, num_local_experts : int
        T, k and E_l.
    alignment : int, default 128
        Rows of a block; a block belongs to one expert.

    Returns
    -------
    num_rows : int
        ``T*k + min(T*k, E_l) * (alignment - 1)``, rounded up to whole blocks.

    Raises
    ------
    ValueError
        A number out of range; rows are counted in int32.

    Notes
    -----
    M_sum in the names of DeepGEMM.

    Examples
    --------
    >>> import cumoe
    >>> cumoe.aligned_num_rows(3, 2, 64)
    768
    """
    num_tokens = _check.integer("num_tokens", num_tokens, 0)
    top_k = _check.integer("top_k", top_k, 0)
    num_local_experts = _check.integer("num_local_experts", num_local_experts, 1, 2**31 - 1)
    alignment = _check.integer("alignment", alignment, 1, 2**31 - 1)
    pairs = num_tokens * top_k
    rows = pairs + min(pairs, num_local_experts) * (alignment - 1)
    return _check.integer("M_sum", -(-rows // alignment) * alignment, 0, 2**31 - 1)


def _local_experts(num_experts: int, num_local_experts: int | None, expert_map: Array | None) -> int:
    _check.expert_map(expert_map, num_experts)
    if num_local_experts is None:
        return num_experts
    num_local = _check.integer("num_local_experts", num_local_experts, 1, num_experts)
    if expert_map is None and num_local != num_experts:
        raise ValueError(
            f"num_local_experts must be num_experts = {num_experts} without expert_map, got {num_local}; pass the map"
        )
    return num_local


def _check_tokens(x: Array, scale: Array | None, ids: Array) -> None:
    _check.ndim("hidden_states", x, "(T, H)", 2)
    _check.topk_ids(ids, len(x))
    for name, array in (("hidden_states", x), ("a1q_scale", scale)):
        if array is not None and array.dtype.hasobject:
            raise TypeError(f"{name} must be numbers, got {array.dtype.name}")
    if scale is not None and scale.ndim > 1 and scale.size != 1:
        _check.ndim("a1q_scale", scale, "(T, H / group)", 2)
        _check.shape("a1q_scale", scale, "(T, H / group)", (len(x), scale.shape[1]))


def _rows(xp: Any, x: Array, num_rows: int, letters: str, out: Array | None, **inputs: Any) -> Array:
    if out is None:
        return _arrays.zeros(xp, (num_rows, x.shape[1]), x.dtype)
    _check.output("out", out, letters, (num_rows, x.shape[1]), x.dtype.name, **inputs)
    return out


def _permute_scale(
    room: Any, xp: Any, scale: Array, given: Array, permuted_idx: Array, num_tokens: int, top_k: int, side: Any
) -> Array:
    if scale is None or scale.ndim != 2 or len(scale) != num_tokens:  # one for all tokens
        return given
    out = _arrays.zeros(xp, (len(permuted_idx), scale.shape[1]), scale.dtype)
    room.gather_rows(_bytes(scale), permuted_idx, _bytes(out), top_k)
    return side.leave(out)


def _bytes(array: Array) -> Array:
    return _arrays.bits(array).view(np.uint8)


def _map(xp: Any, expert_map: Array | None) -> Array:
    return xp.empty(0, np.int32) if expert_map is None else _arrays.bits(expert_map)
