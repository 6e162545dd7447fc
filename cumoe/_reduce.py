"""How the rows that experts give are weighted and added up per token: the three forms."""

from cumoe import _arrays, _check
from cumoe._arrays import Array
from cumoe._batched import moe_unbatch
from cumoe._unpermute import moe_fused_mul_sum, moe_sum


@_arrays.on_callers_stream
def topk_weight_and_reduce(
    fused_expert_output: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    form: str = "contiguous",
    apply_router_weight_on_input: bool = False,
    rank: int = 0,
    out: Array | None = None,
) -> Array:
    """
    Weight the rows that experts gave and add them up per token.

    Parameters
    ----------
    fused_expert_output : array, float32, float16 or bfloat16
        What the experts gave, in the shape that `form` says.
    topk_weights : (T, k) array, float32 (float64, float16 and bfloat16 are converted)
        Weight of each choice.
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. A choice with an id < 0 is skipped.
    form : str, default "contiguous"
        "noop": (T, H), weighted and added already; "contiguous": (T, k, H) or (T*k, H), a row per
        choice, in token order; "naive_batched": (E_l, slots, H), the shelves of `moe_batch`.
    apply_router_weight_on_input : bool, default False
        The weights are in the rows already: only add.
    rank : int, default 0
        With "naive_batched", this rank has the experts ``E_l * rank`` and following.
    out : (T, H) array, dtype of `fused_expert_output`, optional
        Written and returned if given. C-contiguous, must not share memory with the inputs.

    Returns
    -------
    out : (T, H) array, dtype of `fused_expert_output`
        Zero for a token without any choice left. With "noop" and no `out`, the input itself.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or layout that does not fit, or an unknown form.

    See Also
    --------
    moe_fused_mul_sum : The contiguous form.
    moe_unbatch : The naive batched form.
    moe_unpermute : Rows sorted by expert.

    Notes
    -----
    Products and sums are float32, choices in the order j = 0, 1, ..., rounded once. A layer whose
    experts leave the choice to the finalizing step ("delegate") has none of these forms: that step
    knows how the rows lie and names one.

    References
    ----------
    .. [1] vLLM, ``fused_moe/topk_weight_and_reduce.py``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> rows = np.array([[1.0], [2.0], [3.0], [4.0]], "float32")
    >>> weights, ids = np.full((2, 2), 0.5, "float32"), np.array([[0, 1], [2, -1]])
    >>> cumoe.topk_weight_and_reduce(rows, weights, ids)
    array([[1.5],
           [1.5]], dtype=float32)
    """
    _check.choice("form", form, ("noop", "contiguous", "naive_batched"))
    if form == "naive_batched":
        weights = None if apply_router_weight_on_input else topk_weights
        return moe_unbatch(fused_expert_output, weights, topk_ids, rank=rank, out=out)
    if rank != 0:
        raise ValueError(f"rank must be 0 unless form is 'naive_batched', got {rank!r}")
    side, (rows, weights, ids, given) = _arrays.enter(
        fused_expert_output=fused_expert_output, topk_weights=topk_weights, topk_ids=topk_ids, out=out
    )
    _check.topk_ids(ids)
    num_tokens, top_k = ids.shape
    if form == "noop":
        _check.ndim("fused_expert_output", rows, "(T, H)", 2)
        _check.shape("fused_expert_output", rows, "(T, H)", (num_tokens, rows.shape[1]))
        if given is None:
            return fused_expert_output
        _check.output("out", given, "(T, H)", tuple(rows.shape), rows.dtype.name, fused_expert_output=rows)
        given[...] = rows
        return side.leave(given)
    if rows.ndim == 2:
        _check.shape("fused_expert_output", rows, "(T*k, H)", (ids.size, rows.shape[1]))
        rows = rows.reshape(num_tokens, top_k, rows.shape[1])
    _check.ndim("fused_expert_output", rows, "(T, k, H)", 3)
    if apply_router_weight_on_input:
        return side.leave(moe_sum(rows, ids, out=given))
    if given is not None:
        _check.output("out", given, "(T, H)", (num_tokens, rows.shape[2]), rows.dtype.name, fused_expert_output=rows)
        given[...] = 0  # moe_fused_mul_sum leaves a token without any choice as it is
    return side.leave(moe_fused_mul_sum(rows, weights, ids, out=given))
