"""Router weights as a dense (T, E) table and as (T, k) choices, each from the other."""

from cumoe import _arrays, _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array


@_arrays.on_callers_stream
def topk_from_dense(router_weights: Array, top_k: int, *, indices_dtype: str = "int32") -> tuple[Array, Array]:
    """
    Read the choices of each token out of a dense table of weights.

    Parameters
    ----------
    router_weights : (T, E) array, float32, float16 or bfloat16
        Weight of each expert for each token, 0 for the experts that it did not choose.
    top_k : int
        Choices of each token, k, from 1 to E. A token with more than k weights keeps the k of greatest
        magnitude.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.

    Returns
    -------
    topk_weights : (T, k) array, float32
        The weights, greatest magnitude first; 0 where the token has fewer than k.
    topk_ids : (T, k) array, `indices_dtype`
        Their experts, equal ones by the lower id; -1 where the token has fewer than k.

    Raises
    ------
    TypeError
        Not an array, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, or `top_k` outside 1..E.

    See Also
    --------
    dense_from_topk : The way back.

    Notes
    -----
    A weight that is NaN counts as the greatest, so that it is never lost. The call does not wait for the
    device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.topk_from_dense(np.array([[0, 0.25, 0.75, 0]], np.float32), 3)
    (array([[0.75, 0.25, 0.  ]], dtype=float32), array([[ 2,  1, -1]], dtype=int32))
    """
    side, (dense,) = _arrays.enter(router_weights=router_weights)
    _check.ndim("router_weights", dense, "(T, E)", 2)
    _check.dtype("router_weights", dense, arguments.FLOATS)
    num_tokens, num_experts = dense.shape
    _check.integer("router_weights.shape[1]", num_experts, 1, 2**31 - 1)
    top_k = _check.integer("top_k", top_k, 1, num_experts)
    topk_weights, topk_ids = arguments.empty(side, num_tokens, top_k, indices_dtype)
    _arrays.room(side.xp, "dense_route").topk_from_dense(
        _arrays.bits(dense), dense.dtype.name, topk_weights, arguments.signed(topk_ids)
    )
    return side.leave(topk_weights), side.leave(topk_ids)


@_arrays.on_callers_stream
def dense_from_topk(topk_weights: Array, topk_ids: Array, num_experts: int) -> Array:
    """
    Spread the choices of each token over a dense table of weights.

    Parameters
    ----------
    topk_weights : (T, k) array, float32, float16 or bfloat16
        Weights of the chosen experts.
    topk_ids : (T, k) array, int32, int64 or uint32
        Chosen experts. An id outside 0..E-1 is skipped.
    num_experts : int
        Columns of the table, E.

    Returns
    -------
    router_weights : (T, E) array, float32
        Weight of each expert for each token, 0 for those not chosen.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        Shapes that do not fit.

    See Also
    --------
    topk_from_dense : The way back.

    Notes
    -----
    The weights of an expert that a token chose twice are added, in order. The call does not wait for the
    device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.dense_from_topk(np.array([[0.75, 0.25]], np.float32), np.array([[2, 1]]), 4)
    array([[0.  , 0.25, 0.75, 0.  ]], dtype=float32)
    """
    side, (weights, ids) = _arrays.enter(topk_weights=topk_weights, topk_ids=topk_ids)
    _check.ndim("topk_ids", ids, "(T, k)", 2)
    _check.dtype("topk_ids", ids, arguments.INTEGERS)
    _check.shape("topk_weights", weights, "(T, k)", tuple(ids.shape))
    _check.dtype("topk_weights", weights, arguments.FLOATS)
    num_experts = _check.integer("num_experts", num_experts, 1, 2**31 - 1)
    out = side.xp.empty((ids.shape[0], num_experts), "float32")
    _arrays.room(side.xp, "dense_route").dense_from_topk(
        _arrays.bits(weights), arguments.signed(_arrays.bits(ids)), weights.dtype.name, out
    )
    return side.leave(out)
