"""Rows of experts added up per token: after a permutation, and over the choices axis."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array

_DTYPES = ("float32", "float16", "bfloat16")
_WEIGHTS = ("float32", "float64", "float16", "bfloat16")


@_arrays.on_callers_stream
def moe_unpermute(
    permuted_hidden_states: Array,
    topk_weights: Array | None,
    inv_permuted_idx: Array,
    expert_first_token_offset: Array | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """
    Add the weighted rows of each token, back in token order.

    Parameters
    ----------
    permuted_hidden_states : (R, H) array, float32, float16 or bfloat16
        Rows sorted by expert.
    topk_weights : (T, k) array, float32 (float64, float16 and bfloat16 are converted), or None
        Weight of each choice; None adds the rows as they are.
    inv_permuted_idx : (T, k) or (T*k,) array, int32 or int64
        Row of each pair. A choice whose row is outside 0..R-1 is skipped.
    expert_first_token_offset : (E_l + 1,) int64 array, optional
        A choice whose row is not below the last offset is skipped too.
    out : (T, H) array, dtype of `permuted_hidden_states`, optional
        Written and returned if given. C-contiguous, must not share memory with the inputs.

    Returns
    -------
    out : (T, H) array, dtype of `permuted_hidden_states`
        Zero for a token without any row.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or layout that does not fit.

    See Also
    --------
    moe_permute : The way there.
    moe_sum : The same for (T, k, H).

    Notes
    -----
    ``out[t] = sum over j of topk_weights[t, j] * permuted_hidden_states[inv_permuted_idx[t, j]]``,
    j ascending, in float32, rounded once. Skipped rows are never read. A token's bits depend on its own
    rows only. The call does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``fused_moe/moe_permute_unpermute.py``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> rows = np.array([[1.0], [2.0], [4.0]], "float32")
    >>> weights = np.array([[0.5, 0.5], [1.0, 0.0]], "float32")
    >>> cumoe.moe_unpermute(rows, weights, np.array([[2, 0], [1, -1]]))
    array([[2.5],
           [2. ]], dtype=float32)
    """
    side, (y, weights, inv, offsets, given) = _arrays.enter(
        permuted_hidden_states=permuted_hidden_states,
        topk_weights=topk_weights,
        inv_permuted_idx=inv_permuted_idx,
        expert_first_token_offset=expert_first_token_offset,
        out=out,
    )
    _check.ndim("permuted_hidden_states", y, "(R, H)", 2)
    _check.dtype("permuted_hidden_states", y, _DTYPES)
    _check.dtype("inv_permuted_idx", inv, ("int32", "int64"))
    if weights is None:
        _check.ndim("inv_permuted_idx", inv, "(T, k)", 2)
    else:
        _check.ndim("topk_weights", weights, "(T, k)", 2)
        if inv.ndim == 1:
            _check.shape("inv_permuted_idx", inv, "(T*k,)", (weights.size,))
            inv = inv.reshape(weights.shape)
        _check.shape("inv_permuted_idx", inv, "(T, k)", tuple(weights.shape))
    if offsets is not None:
        _check.ndim("expert_first_token_offset", offsets, "(E_l + 1,)", 1)
        _check.dtype("expert_first_token_offset", offsets, ("int64",))
        if offsets.size == 0:
            raise ValueError("expert_first_token_offset must have shape (E_l + 1,), got (0,)")
    inputs = {"permuted_hidden_states": y, "topk_weights": weights, "inv_permuted_idx": inv}
    result = _result(side.xp, given, (len(inv), y.shape[1]), y.dtype, **inputs)
    _arrays.room(side.xp, "unpermute").unpermute(
        _arrays.bits(y),
        _float32(weights),
        _arrays.bits(inv),
        _arrays.bits(result),
        y.dtype.name,
        None if offsets is None else _arrays.bits(offsets),
    )
    return side.leave(result)


def moe_sum(
    x: Array, topk_ids: Array | None = None, expert_map: Array | None = None, *, out: Array | None = None
) -> Array:
    """
    Add up the choices of each token.

    Parameters
    ----------
    x : (T, k, H) array, float32, float16 or bfloat16
        One row per token and choice. Any strides, without a copy.
    topk_ids : (T, k) array, int32, int64 or uint32, optional
        A choice whose id is < 0 is skipped.
    expert_map : (E,) int32 array, optional
        A choice whose id is outside 0..E-1 or mapped below 0 is skipped too.
    out : (T, H) array, dtype of `x`, optional
        Written and returned if given. C-contiguous, must not share memory with the inputs.

    Returns
    -------
    out : (T, H) array, dtype of `x`
        Zero for a token without any choice left.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or layout that does not fit.

    See Also
    --------
    moe_fused_mul_sum : With a weight for each choice.

    Notes
    -----
    ``out[t] = sum over j of x[t, j]``, j ascending, in float32, rounded once. Skipped choices are never
    read. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.arange(8, dtype="float32").reshape(2, 2, 2)
    >>> cumoe.moe_sum(x, np.array([[0, 1], [3, -1]]))
    array([[2., 4.],
           [4., 5.]], dtype=float32)
    """
    return _weighted_sum(x, None, topk_ids, expert_map, out, keep=False)


def moe_fused_mul_sum(
    x: Array,
    topk_weights: Array,
    topk_ids: Array | None = None,
    expert_map: Array | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """
    Multiply the choices of each token with their weights and add them up.

    Parameters
    ----------
    x : (T, k, H) array, float32, float16 or bfloat16
        One row per token and choice. Any strides, without a copy.
    topk_weights : (T, k) array, float32 (float64, float16 and bfloat16 are converted)
        Weight of each choice.
    topk_ids : (T, k) array, int32, int64 or uint32, optional
        A choice whose id is < 0 is skipped.
    expert_map : (E,) int32 array, optional
        A choice whose id is outside 0..E-1 or mapped below 0 is skipped too.
    out : (T, H) array, dtype of `x`, optional
        Written and returned if given. C-contiguous, must not share memory with the inputs.

    Returns
    -------
    out : (T, H) array, dtype of `x`
        The row of a token without any choice left is zero, or left as it is in the `out` given.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or layout that does not fit.

    See Also
    --------
    moe_sum : Without weights.

    Notes
    -----
    ``out[t] = sum over j of topk_weights[t, j] * x[t, j]``, j ascending, in float32, rounded once.
    Skipped choices are never read. The call does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``fused_moe/moe_fused_mul_sum.py``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.arange(8, dtype="float32").reshape(2, 2, 2)
    >>> cumoe.moe_fused_mul_sum(x, np.array([[1.0, 0.5], [2.0, 1.0]], "float32"))
    array([[ 1. ,  2.5],
           [14. , 17. ]], dtype=float32)
    """
    if topk_weights is None:
        raise TypeError("topk_weights must be a (T, k) array, got None; moe_sum adds without weights")
    return _weighted_sum(x, topk_weights, topk_ids, expert_map, out, keep=True)


@_arrays.on_callers_stream
def _weighted_sum(
    x: Array,
    topk_weights: Array | None,
    topk_ids: Array | None,
    expert_map: Array | None,
    out: Array | None,
    keep: bool,
) -> Array:
    side, (x, weights, ids, expert_map, given) = _arrays.enter(
        x=x, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, out=out
    )
    _check.ndim("x", x, "(T, k, H)", 3)
    _check.dtype("x", x, _DTYPES)
    num_tokens, top_k, hidden_size = x.shape
    if weights is not None:
        _check.shape("topk_weights", weights, "(T, k)", (num_tokens, top_k))
    if ids is not None:
        _check.topk_ids(ids)
        _check.shape("topk_ids", ids, "(T, k)", (num_tokens, top_k))
    _check.expert_map(expert_map)
    if expert_map is not None and ids is None:
        raise ValueError("topk_ids must be given with expert_map, got None")
    result = _result(side.xp, given, (num_tokens, hidden_size), x.dtype, x=x, topk_weights=weights, topk_ids=ids)
    _arrays.room(side.xp, "unpermute").weighted_sum(
        _strided_bits(x),
        _float32(weights),
        None if ids is None else _arrays.bits(ids),
        side.xp.empty(0, np.int32) if expert_map is None else _arrays.bits(expert_map),
        _arrays.bits(result),
        x.dtype.name,
        keep and given is not None,
    )
    return side.leave(result)


def _result(xp: Any, out: Array | None, shape: tuple[int, int], dtype: Any, **inputs: Any) -> Array:
    if out is None:
        return xp.empty(shape, dtype)
    _check.output("out", out, "(T, H)", shape, dtype.name, **inputs)
    return out


def _float32(topk_weights: Array | None) -> Array | None:
    if topk_weights is None:
        return None
    _check.dtype("topk_weights", topk_weights, _WEIGHTS)
    return _arrays.bits(topk_weights.astype(np.float32, copy=False))


def _strided_bits(x: Array) -> Array:
    """Like `_arrays.bits`, but with the strides that `x` has."""
    if isinstance(x, np.ndarray) and not x.flags.aligned:
        return _arrays.bits(x)
    return _arrays.read_only_as_plain(x if x.dtype.name == "float32" else x.view(np.uint16))
