"""Router logits (T, E) -> `topk_weights` and `topk_ids` (T, k): top-k of the scores, or by a table."""

from cumoe import _arrays, _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array


@_arrays.on_callers_stream
def fused_topk(
    router_logits: Array,
    top_k: int,
    *,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    indices_dtype: str = "int32",
    is_padding: Array | None = None,
    per_expert_scale: Array | None = None,
    input_ids: Array | None = None,
    bias_vl: Array | None = None,
    image_sentinel_lo: int | None = None,
    return_token_expert_indices: bool = False,
) -> tuple[Array, ...]:
    """
    Choose the k best experts of each token and weigh them by their scores.

    Parameters
    ----------
    router_logits : (T, E) array, float32, float16 or bfloat16
        One logit for each token and expert.
    top_k : int
        Experts chosen for each token, k, from 1 to E.
    renormalize : bool, default True
        Divide the weights of a token by their sum, unless it is 0.
    scoring_func : {"softmax", "sigmoid", "sqrtsoftplus"}, default "softmax"
        The score of a logit. ``sqrtsoftplus(x) = sqrt(log(1 + exp(x)))``, with x itself for the
        logarithm above 20.
    e_score_correction_bias : (E,) array, float32, float16 or bfloat16, optional
        Added to the scores for the choice only; the weights are the scores without it.
    routed_scaling_factor : float, default 1.0
        Factor of every weight, after renormalizing.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.
    is_padding : (T,) array, bool, optional
        Tokens that are not there: their ids are -1 and their weights 0.
    per_expert_scale : (E,) array, float32, float16 or bfloat16, optional
        A factor for the weights of each expert, after everything else (Gemma 4).
    input_ids : (T,) array, int32, int64 or uint32, optional
        Vocabulary ids of the tokens, which `bias_vl` needs.
    bias_vl : (E,) array, float32, float16 or bfloat16, optional
        Replaces `e_score_correction_bias` for image tokens.
    image_sentinel_lo : int, optional
        Image tokens are those with ids ``image_sentinel_lo .. image_sentinel_lo + 4``.
    return_token_expert_indices : bool, default False
        Also return the third array that some permutation kernels ask for.

    Returns
    -------
    topk_weights : (T, k) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k) array, `indices_dtype`
        Chosen experts, the best first. Equal experts come by the lower id; the k ids of a token differ.
    token_expert_indices : (T, k) array, int32
        ``j * T + t`` at ``[t, j]``. Only with `return_token_expert_indices`.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, `top_k` outside 1..E, or an unknown name.

    See Also
    --------
    grouped_topk : The same inside the best groups of experts.
    hash_topk : Experts by the token's vocabulary id.
    select_experts : One call for all of these.

    Notes
    -----
    The sum runs over the k chosen experts with `renormalize`, else a softmax is over all E. Scores are
    computed in float32. Without a bias the logits themselves are compared, with which every score
    grows: the ids depend on no rounding. With a bias, ``score + bias`` is compared in float32.

    Not every logit has a score. A row of softmax that holds NaN or +inf, or nothing but -inf, has score
    0 everywhere, and so has a NaN logit under sigmoid; under sqrtsoftplus a NaN or +inf logit has weight
    0 and comes last (with a bias: is chosen by -1e30). The k ids of a token are valid and distinct all
    the same. A bias that is NaN comes last.

    A token's bits depend on its own row only. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> logits = np.array([[0, 2, 1, 2]], dtype=np.float32)
    >>> topk_weights, topk_ids = cumoe.fused_topk(logits, 2)
    >>> topk_weights, topk_ids
    (array([[0.5, 0.5]], dtype=float32), array([[1, 3]], dtype=int32))
    """
    side, (logits, bias, padding, scale_row, tokens, image_bias) = _arrays.enter(
        router_logits=router_logits,
        e_score_correction_bias=e_score_correction_bias,
        is_padding=is_padding,
        per_expert_scale=per_expert_scale,
        input_ids=input_ids,
        bias_vl=bias_vl,
    )
    num_tokens, num_experts = arguments.shape_of(logits)
    top_k = _check.integer("top_k", top_k, 1, num_experts)
    topk_weights, topk_ids = arguments.empty(side, num_tokens, top_k, indices_dtype)
    _arrays.room(side.xp, "route").fused_topk(
        _arrays.bits(logits),
        arguments.of_experts("e_score_correction_bias", bias, num_experts),
        arguments.token_ids(tokens, num_tokens),
        None,
        arguments.of_experts("bias_vl", image_bias, num_experts),
        _first_image_id(image_sentinel_lo, image_bias, tokens),
        arguments.padding(padding, num_tokens),
        arguments.of_experts("per_expert_scale", scale_row, num_experts),
        logits.dtype.name,
        arguments.known_scoring(scoring_func),
        bool(renormalize),
        arguments.number("routed_scaling_factor", routed_scaling_factor),
        topk_weights,
        topk_ids,
    )
    results = [topk_weights, topk_ids]
    if return_token_expert_indices:
        xp = side.xp
        indices = xp.arange(top_k)[None, :] * num_tokens + xp.arange(num_tokens)[:, None]
        results.append(indices.astype(xp.int32))
    return tuple(side.leave(array) for array in results)


@_arrays.on_callers_stream
def hash_topk(
    router_logits: Array,
    input_ids: Array,
    hash_indices_table: Array,
    *,
    renormalize: bool = True,
    scoring_func: str = "sqrtsoftplus",
    routed_scaling_factor: float = 1.0,
    indices_dtype: str = "int32",
    is_padding: Array | None = None,
    bias_vl: Array | None = None,
    image_sentinel_lo: int | None = None,
) -> tuple[Array, Array]:
    """
    Look the experts of each token up by its vocabulary id and weigh them by their scores.

    Parameters
    ----------
    router_logits : (T, E) array, float32, float16 or bfloat16
        One logit for each token and expert.
    input_ids : (T,) array, int32, int64 or uint32
        Vocabulary ids of the tokens.
    hash_indices_table : (V, k) array, int32, int64 or uint32
        Experts of each vocabulary id.
    renormalize : bool, default True
        Divide the weights of a token by their sum, unless it is 0.
    scoring_func : {"sqrtsoftplus", "sigmoid", "softmax"}, default "sqrtsoftplus"
        The score of a logit, as in `fused_topk`.
    routed_scaling_factor : float, default 1.0
        Factor of every weight, after renormalizing.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.
    is_padding : (T,) array, bool, optional
        Tokens that are not there: their ids are -1 and their weights 0.
    bias_vl : (E,) array, float32, float16 or bfloat16, optional
        Image tokens do not look up: they take the k best of ``score + bias_vl``.
    image_sentinel_lo : int, optional
        Image tokens are those with ids ``image_sentinel_lo .. image_sentinel_lo + 4``.

    Returns
    -------
    topk_weights : (T, k) array, float32
        Scores of the experts, renormalized and scaled.
    topk_ids : (T, k) array, `indices_dtype`
        The row of the table; -1 for a vocabulary id outside 0..V-1.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, more than E experts a token, or an unknown name.

    See Also
    --------
    fused_topk : The k best experts instead.

    Notes
    -----
    DeepSeek V4 routes its first layers so. An id of the table outside 0..E-1 is handed on with weight 0
    and counts in no sum. The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> logits = np.zeros((2, 4), np.float32)
    >>> table = np.array([[0, 1], [3, 2], [1, 3]])
    >>> cumoe.hash_topk(logits, np.array([2, 1]), table, routed_scaling_factor=2.0)
    (array([[1., 1.],
           [1., 1.]], dtype=float32), array([[1, 3],
           [3, 2]], dtype=int32))
    """
    side, (logits, tokens, table, padding, image_bias) = _arrays.enter(
        router_logits=router_logits,
        input_ids=input_ids,
        hash_indices_table=hash_indices_table,
        is_padding=is_padding,
        bias_vl=bias_vl,
    )
    num_tokens, num_experts = arguments.shape_of(logits)
    _check.given("input_ids", tokens)
    _check.ndim("hash_indices_table", table, "(V, k)", 2)
    _check.dtype("hash_indices_table", table, arguments.INTEGERS)
    top_k = _check.integer("hash_indices_table.shape[1]", table.shape[1], 1, num_experts)
    _check.integer("hash_indices_table.shape[0]", table.shape[0], 1)
    topk_weights, topk_ids = arguments.empty(side, num_tokens, top_k, indices_dtype)
    _arrays.room(side.xp, "route").fused_topk(
        _arrays.bits(logits),
        None,
        arguments.token_ids(tokens, num_tokens),
        arguments.signed(_arrays.bits(table)),
        arguments.of_experts("bias_vl", image_bias, num_experts),
        _first_image_id(image_sentinel_lo, image_bias, tokens),
        arguments.padding(padding, num_tokens),
        None,
        logits.dtype.name,
        arguments.known_scoring(scoring_func),
        bool(renormalize),
        arguments.number("routed_scaling_factor", routed_scaling_factor),
        topk_weights,
        topk_ids,
    )
    return side.leave(topk_weights), side.leave(topk_ids)


def _first_image_id(image_sentinel_lo: int | None, bias_vl: Array | None, input_ids: Array | None) -> int:
    if bias_vl is None:
        return 0
    for name, value in (("image_sentinel_lo", image_sentinel_lo), ("input_ids", input_ids)):
        if value is None:
            raise ValueError(f"{name} must be given with bias_vl, got None")
    return _check.integer("image_sentinel_lo", image_sentinel_lo, 0)
