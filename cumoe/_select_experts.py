"""One call for every way to route: which one it is follows from the arguments."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array
from cumoe._grouped_route import grouped_topk
from cumoe._route import fused_topk, hash_topk
from cumoe._simulated_routing import Strategy, simulated_routing
from cumoe._special_experts import zero_experts

RoutingFunction = Callable[[Any, Any, int, bool], tuple[Array, Array]]


@_arrays.on_callers_stream
def select_experts(
    hidden_states: Array | None,
    router_logits: Array,
    top_k: int,
    *,
    use_grouped_topk: bool = False,
    renormalize: bool = True,
    topk_group: int | None = None,
    num_expert_group: int | None = None,
    custom_routing_function: RoutingFunction | None = None,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Array | None = None,
    indices_dtype: str = "int32",
    is_padding: Array | None = None,
    per_expert_scale: Array | None = None,
    input_ids: Array | None = None,
    hash_indices_table: Array | None = None,
    bias_vl: Array | None = None,
    image_sentinel_lo: int | None = None,
    zero_expert_type: str | None = None,
    num_logical_experts: int | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    simulation_strategy: str | Strategy | None = None,
    rng: int | np.random.Generator | None = None,
) -> tuple[Array, ...]:
    """
    Route tokens in the way that the arguments ask for.

    Parameters
    ----------
    hidden_states : (T, H) array or None
        Tokens. Needed by `custom_routing_function` (which may take None) and by `zero_expert_type`.
    router_logits : (T, E) array, float32, float16 or bfloat16
        One logit for each token and expert.
    top_k : int
        Experts chosen for each token, k.
    use_grouped_topk : bool, default False
        Choose groups first, as `grouped_topk` does. Where the groups hold one expert or less, or do not
        divide E, this is plain top-k.
    renormalize : bool, default True
        Divide the weights of a token by their sum.
    topk_group, num_expert_group : int, optional
        The groups of `use_grouped_topk`.
    custom_routing_function : callable, optional
        ``f(hidden_states, router_logits, top_k, renormalize)``, called with the arrays as given, returns
        (T, k) weights and ids. It scales its weights itself.
    scoring_func : {"softmax", "sigmoid", "sqrtsoftplus"}, default "softmax"
        The score of a logit, as in `fused_topk`.
    routed_scaling_factor : float, default 1.0
        Factor of every weight, after renormalizing; must stay 1 with a custom function.
    e_score_correction_bias : (E,) array, float32, float16 or bfloat16, optional
        Added to the scores for the choice only.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.
    is_padding : (T,) array, bool, optional
        Tokens that are not there: their ids are -1 and their weights 0.
    per_expert_scale : (E,) array, float32, float16 or bfloat16, optional
        A factor for the weights of each expert, in plain and biased top-k.
    input_ids : (T,) array, int32, int64 or uint32, optional
        Vocabulary ids of the tokens.
    hash_indices_table : (V, k) array, int32, int64 or uint32, optional
        Experts of each vocabulary id, as in `hash_topk`.
    bias_vl, image_sentinel_lo : array and int, optional
        The bias of image tokens, as in `fused_topk`.
    zero_expert_type : {"identity", "copy", "zero"}, optional
        The logits beyond `num_logical_experts` belong to experts that compute nothing, as in
        `zero_experts`.
    num_logical_experts : int, optional
        Experts with weights, if there are others.
    num_fused_shared_experts : int, default 0
        Shared experts that every token also takes, as in `append_shared_experts`.
    shared_expert_weight : float, default 1.0
        Their weight.
    simulation_strategy : str or callable, optional
        Draw the routing at random, as `simulated_routing` does.
    rng : int or numpy.random.Generator, optional
        Seed or source of `simulation_strategy`.

    Returns
    -------
    topk_weights : (T, k + num_fused_shared_experts) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k + num_fused_shared_experts) array, `indices_dtype`
        Chosen experts.
    zero_expert_output : (T, H) array, dtype of `hidden_states`
        What the experts that compute nothing add to the output. Only with `zero_expert_type`.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, an unknown name, or an argument that another one needs.

    See Also
    --------
    fused_topk : What happens where nothing else is asked for.

    Notes
    -----
    The first of these that is asked for decides: `simulation_strategy`, `zero_expert_type`,
    `use_grouped_topk`, `custom_routing_function`, `hash_indices_table`, plain top-k with or without a
    bias. The arguments of those further down the list are not used. Shared experts are appended to all.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> logits = np.array([[1, 3, 2, 0]], np.float32)
    >>> topk_weights, topk_ids = cumoe.select_experts(None, logits, 1, num_fused_shared_experts=1)
    >>> topk_weights, topk_ids
    (array([[1., 1.]], dtype=float32), array([[1, 4]], dtype=int32))
    """
    side, (x, logits, bias, padding, scale_row, tokens, table, image_bias) = _arrays.enter(
        hidden_states=hidden_states,
        router_logits=router_logits,
        e_score_correction_bias=e_score_correction_bias,
        is_padding=is_padding,
        per_expert_scale=per_expert_scale,
        input_ids=input_ids,
        hash_indices_table=hash_indices_table,
        bias_vl=bias_vl,
    )
    num_tokens, num_experts = arguments.shape_of(logits)
    if x is not None and (x.ndim != 2 or x.shape[0] != num_tokens):
        raise ValueError(f"hidden_states must have shape (T, H) = ({num_tokens}, H), got {tuple(x.shape)}")
    padding = arguments.padding(padding, num_tokens)
    scoring: dict[str, Any] = {
        "renormalize": renormalize,
        "scoring_func": scoring_func,
        "routed_scaling_factor": routed_scaling_factor,
        "indices_dtype": indices_dtype,
        "is_padding": padding,
    }
    zero_expert_output = None
    if simulation_strategy is not None:
        topk_weights, topk_ids = simulated_routing(
            simulation_strategy, num_tokens, num_experts, top_k, rng=rng, indices_dtype=indices_dtype, xp=side.xp
        )
        topk_weights, topk_ids = _without_padding(side, topk_weights, topk_ids, padding)
    elif zero_expert_type is not None:
        _needed("zero_expert_type", hidden_states=x, num_logical_experts=num_logical_experts)
        logical = _check.integer("num_logical_experts", num_logical_experts, 1, num_experts)
        topk_weights, topk_ids = fused_topk(logits, top_k, e_score_correction_bias=bias, **scoring)
        topk_weights, topk_ids, zero_expert_output = zero_experts(
            x, topk_weights, topk_ids, logical, zero_expert_type=zero_expert_type
        )
        num_experts = logical
    elif use_grouped_topk and _groups(num_experts, num_expert_group, topk_group):
        topk_weights, topk_ids = grouped_topk(
            logits,
            top_k,
            num_expert_group=num_expert_group,  # type: ignore[arg-type]  # _groups looked
            topk_group=topk_group,  # type: ignore[arg-type]
            e_score_correction_bias=bias,
            **scoring,
        )
    elif custom_routing_function is not None and not use_grouped_topk:
        if arguments.number("routed_scaling_factor", routed_scaling_factor) != 1:
            raise ValueError(
                "routed_scaling_factor must be 1 with custom_routing_function, "
                f"got {routed_scaling_factor}; scale inside the function"
            )
        if not callable(custom_routing_function):
            raise TypeError(f"custom_routing_function must be callable, got {type(custom_routing_function).__name__}")
        given = custom_routing_function(hidden_states, router_logits, top_k, renormalize)
        topk_weights, topk_ids = _take_custom(given, num_tokens, top_k, indices_dtype)
        topk_weights, topk_ids = _without_padding(side, topk_weights, topk_ids, padding)
    elif table is not None:
        _needed("hash_indices_table", input_ids=tokens)
        _check.shape("hash_indices_table", table, "(V, k)", (*table.shape[:1], top_k))
        topk_weights, topk_ids = hash_topk(
            logits, tokens, table, bias_vl=image_bias, image_sentinel_lo=image_sentinel_lo, **scoring
        )
    else:
        topk_weights, topk_ids = fused_topk(
            logits,
            top_k,
            e_score_correction_bias=bias,
            per_expert_scale=scale_row,
            input_ids=tokens,
            bias_vl=image_bias,
            image_sentinel_lo=image_sentinel_lo,
            **scoring,
        )
    topk_weights, topk_ids = _appended(
        side, topk_weights, topk_ids, num_experts, num_fused_shared_experts, shared_expert_weight, padding
    )
    results = [topk_weights, topk_ids] + ([] if zero_expert_output is None else [zero_expert_output])
    return tuple(side.leave(array) for array in results)


@_arrays.on_callers_stream
def append_shared_experts(
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    num_fused_shared_experts: int,
    *,
    shared_expert_weight: float = 1.0,
    is_padding: Array | None = None,
) -> tuple[Array, Array]:
    """
    Add experts that every token takes to its choices.

    Parameters
    ----------
    topk_weights : (T, k) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k) array, int32, int64 or uint32
        Chosen experts.
    num_experts : int
        Routed experts, E: the shared ones have the ids from E on.
    num_fused_shared_experts : int
        Shared experts.
    shared_expert_weight : float, default 1.0
        Their weight: 1, or the inverse of a factor that is applied to the whole output later.
    is_padding : (T,) array, bool, optional
        Tokens that are not there: their new ids are -1 and the weights 0.

    Returns
    -------
    topk_weights, topk_ids : (T, k + num_fused_shared_experts) arrays
        The choices with the shared experts at the end, of the kinds given.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        Shapes that do not fit.

    See Also
    --------
    select_experts : Does this on request.

    Notes
    -----
    Weights of the chosen experts are not renormalized with the new ones.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.append_shared_experts(np.ones((1, 1), np.float32), np.array([[3]]), 8, 2)
    (array([[1., 1., 1.]], dtype=float32), array([[3, 8, 9]]))
    """
    side, (weights, ids, padding) = _arrays.enter(topk_weights=topk_weights, topk_ids=topk_ids, is_padding=is_padding)
    _check.ndim("topk_ids", ids, "(T, k)", 2)
    _check.dtype("topk_ids", ids, arguments.INTEGERS)
    _check.shape("topk_weights", weights, "(T, k)", tuple(ids.shape))
    _check.dtype("topk_weights", weights, ("float32",))
    padding = arguments.padding(padding, ids.shape[0])
    weights, ids = _appended(side, weights, ids, num_experts, num_fused_shared_experts, shared_expert_weight, padding)
    return side.leave(weights), side.leave(ids)


@_arrays.on_callers_stream
def llama4_routing(hidden_states: Any, gating_output: Array, topk: int, renormalize: bool) -> tuple[Array, Array]:
    """
    Choose experts by their logits and weigh them by the sigmoid of these, as Llama 4 does.

    Parameters
    ----------
    hidden_states : object
        Not used; routing functions have it.
    gating_output : (T, E) array, float32, float16 or bfloat16
        One logit for each token and expert.
    topk : int
        Experts chosen for each token, k; 1 in Llama 4.
    renormalize : bool
        Not used: Llama 4 does not renormalize.

    Returns
    -------
    topk_weights : (T, k) array, float32
        ``sigmoid`` of the chosen logits.
    topk_ids : (T, k) array, int32
        Chosen experts, the best first.

    Raises
    ------
    TypeError
        Not an array, or a dtype outside the list above.
    ValueError
        A shape that does not fit, or `topk` outside 1..E.

    See Also
    --------
    select_experts : Takes this function as `custom_routing_function`.

    Notes
    -----
    The weights belong on the tokens before the experts: pass ``apply_router_weight_on_input=True`` to
    `fused_experts`.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.llama4_routing(None, np.array([[-1, 0]], np.float32), 1, False)
    (array([[0.5]], dtype=float32), array([[1]], dtype=int32))
    """
    _, (logits,) = _arrays.enter(gating_output=gating_output)
    _check.ndim("gating_output", logits, "(T, E)", 2)
    _check.dtype("gating_output", logits, arguments.FLOATS)
    _check.integer("topk", topk, 1, logits.shape[1])
    topk_weights, topk_ids = fused_topk(gating_output, topk, renormalize=False, scoring_func="sigmoid")
    return topk_weights, topk_ids


def _groups(num_experts: int, num_expert_group: int | None, topk_group: int | None) -> bool:
    """Say whether the groups are ones; where they are not, routing is plain."""
    _needed("use_grouped_topk", num_expert_group=num_expert_group, topk_group=topk_group)
    num_expert_group = _check.integer("num_expert_group", num_expert_group, 1)
    return num_experts > num_expert_group and num_experts % num_expert_group == 0


def _needed(because_of: str, **values: Any) -> None:
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name} must be given with {because_of}, got None")


def _take_custom(given: Any, num_tokens: int, top_k: int, indices_dtype: str) -> tuple[Array, Array]:
    _, (weights, ids) = _arrays.enter(topk_weights=given[0], topk_ids=given[1])
    _check.choice("indices_dtype", indices_dtype, arguments.INTEGERS)
    _check.shape("topk_weights of custom_routing_function", weights, "(T, k)", (num_tokens, top_k))
    _check.shape("topk_ids of custom_routing_function", ids, "(T, k)", (num_tokens, top_k))
    _check.dtype("topk_weights of custom_routing_function", weights, (*arguments.FLOATS, "float64"))
    _check.dtype("topk_ids of custom_routing_function", ids, arguments.INTEGERS)
    return weights.astype("float32", copy=False), ids.astype(indices_dtype, copy=False)


def _without_padding(
    side: _arrays.Side, topk_weights: Array, topk_ids: Array, padding: Array | None
) -> tuple[Array, Array]:
    if padding is None:
        return topk_weights, topk_ids
    xp, rows = side.xp, padding[:, None]
    dropped = xp.asarray(-1).astype(topk_ids.dtype)  # 2**32 - 1 where there is no sign
    return xp.where(rows, xp.float32(0), topk_weights), xp.where(rows, dropped, topk_ids)


def _appended(
    side: _arrays.Side,
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    num_fused_shared_experts: int,
    shared_expert_weight: float,
    padding: Array | None,
) -> tuple[Array, Array]:
    _check.integer("num_experts", num_experts, 1)
    _check.integer("num_fused_shared_experts", num_fused_shared_experts, 0)
    weight = arguments.number("shared_expert_weight", shared_expert_weight)
    if num_fused_shared_experts == 0:
        return topk_weights, topk_ids
    _check.integer("num_experts + num_fused_shared_experts", num_experts + num_fused_shared_experts, 1, 2**31 - 1)
    xp, shape = side.xp, (topk_ids.shape[0], num_fused_shared_experts)
    ids = xp.arange(num_experts, num_experts + num_fused_shared_experts).astype(topk_ids.dtype)
    weights, ids = _without_padding(side, xp.full(shape, weight, "float32"), xp.broadcast_to(ids, shape), padding)
    return xp.concatenate([topk_weights, weights], axis=1), xp.concatenate([topk_ids, ids], axis=1)
