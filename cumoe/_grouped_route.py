"""Router logits (T, E) -> `topk_weights` and `topk_ids` (T, k): top-k inside the best groups of experts."""

from cumoe import _arrays, _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array


@_arrays.on_callers_stream
def grouped_topk(
    router_logits: Array,
    top_k: int,
    *,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    indices_dtype: str = "int32",
    is_padding: Array | None = None,
) -> tuple[Array, Array]:
    """
    Choose the best groups of experts, then the k best experts inside them.

    Parameters
    ----------
    router_logits : (T, E) array, float32, float16 or bfloat16
        One logit for each token and expert.
    top_k : int
        Experts chosen for each token, k, at most those of the chosen groups.
    num_expert_group : int
        Groups of neighbouring experts; must divide E.
    topk_group : int
        Groups chosen for each token.
    renormalize : bool, default True
        Divide the weights of a token by their sum plus 1e-20.
    scoring_func : {"softmax", "sigmoid", "sqrtsoftplus"}, default "softmax"
        The score of a logit, as in `fused_topk`.
    e_score_correction_bias : (E,) array, float32, float16 or bfloat16, optional
        Added to the scores for the choice only; the weights are the scores without it.
    routed_scaling_factor : float, default 1.0
        Factor of every weight, after renormalizing.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.
    is_padding : (T,) array, bool, optional
        Tokens that are not there: their ids are -1 and their weights 0.

    Returns
    -------
    topk_weights : (T, k) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k) array, `indices_dtype`
        Chosen experts, the best first. Equal experts come by the lower id; the k ids of a token differ.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, groups that do not divide E, or too few experts in the chosen groups.

    See Also
    --------
    fused_topk : Without groups.

    Notes
    -----
    A group counts by its greatest score, with a bias by the sum of its two greatest ``score + bias``;
    equal groups come by the lower number. Logits that are not finite, scores that do not exist and
    biases that are not finite take an expert out: it is chosen last and its weight is 0. If that leaves
    no expert, the ids are 0..k-1 and each weight is 1 / k.

    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> logits = np.array([[5, 0, 0, 0, 3, 4]], dtype=np.float32)
    >>> bias = np.zeros(6, np.float32)
    >>> topk_weights, topk_ids = cumoe.grouped_topk(
    ...     logits, 2, num_expert_group=3, topk_group=1, scoring_func="sigmoid", e_score_correction_bias=bias
    ... )
    >>> topk_ids
    array([[5, 4]], dtype=int32)
    """
    side, (logits, bias, padding) = _arrays.enter(
        router_logits=router_logits, e_score_correction_bias=e_score_correction_bias, is_padding=is_padding
    )
    num_tokens, num_experts = arguments.shape_of(logits)
    num_expert_group = _check.integer("num_expert_group", num_expert_group, 1, num_experts)
    if num_experts % num_expert_group:
        raise ValueError(f"num_expert_group must divide E = {num_experts}, got {num_expert_group}")
    topk_group = _check.integer("topk_group", topk_group, 1, num_expert_group)
    top_k = _check.integer("top_k", top_k, 1, topk_group * (num_experts // num_expert_group))
    topk_weights, topk_ids = arguments.empty(side, num_tokens, top_k, indices_dtype)
    _arrays.room(side.xp, "grouped_route").grouped_topk(
        _arrays.bits(logits),
        arguments.of_experts("e_score_correction_bias", bias, num_experts),
        arguments.padding(padding, num_tokens),
        logits.dtype.name,
        num_expert_group,
        topk_group,
        arguments.known_scoring(scoring_func),
        bool(renormalize),
        arguments.number("routed_scaling_factor", routed_scaling_factor),
        topk_weights,
        topk_ids,
    )
    return side.leave(topk_weights), side.leave(topk_ids)
