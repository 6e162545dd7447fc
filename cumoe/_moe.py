"""
The whole layer: choose the plan, sort the pairs by expert, two grouped products, add up.

`fused_experts` reads top to bottom like the list in its Notes; everything that loops over data is in
the rooms that the steps call.
"""

from collections.abc import Callable
from typing import Any

from cumoe import _recorded
from cumoe._arrays import Array, on_callers_stream
from cumoe._call import Call, check_logits, enter_call
from cumoe._prepare import PreparedExperts
from cumoe._select_experts import select_experts
from cumoe._workspace import lent


@on_callers_stream
def fused_experts(
    hidden_states: Array,
    w1: Array | PreparedExperts,
    w2: Array | None,
    topk_weights: Array,
    topk_ids: Array,
    *,
    activation: str = "silu",
    quant_config: Any = None,
    apply_router_weight_on_input: bool | str = False,
    expert_map: Array | None = None,
    global_num_experts: int | None = None,
    out: Array | None = None,
    check: bool = False,
    workspace_limit: int | None = None,
    workspace: Array | None = None,
    backend: str | None = None,
) -> Array:
    """
    Run each token through its chosen experts and add the weighted results.

    Parameters
    ----------
    hidden_states : (T, H) array, float32, float16 or bfloat16
        Tokens. Any strides; C-contiguous rows are read in place.
    w1 : (E, 2I, H) array, or PreparedExperts
        Gate rows 0..I-1, then up rows I..2I-1, for each expert (gate even, up odd for an interleaved
        activation; (E, I, H) for an activation without gate). Of the dtype of `hidden_states`, or the codes
        that `quant_config` names: float8_e4m3fn, int8 or uint8, those of four bits two a byte along H.
    w2 : (E, H, I) array, or None with PreparedExperts
        Second product.
    topk_weights : (T, k) array, float32 (float64, float16 and bfloat16 are converted)
        Weight of each choice.
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice, in 0..`global_num_experts`-1. Any other id is skipped.
    activation : str, default "silu"
        Name of an activation, see `moe_activation`. PreparedExperts bring their own.
    quant_config : FusedMoEQuantConfig, optional
        From a builder such as `fp8_w8a8_moe_quant_config`: number formats and scales of weights and
        activations, biases, and the parameters of the activation.
    apply_router_weight_on_input : bool or str, default False
        Where the weight of a choice goes: False, on the second product; True or "hidden_states", on
        the token before the first product; "accumulator", on the first product after its bias.
    expert_map : (global_num_experts,) int32 array, optional
        Row of `w1` for each global id, < 0 where another rank has it; such choices are skipped.
    global_num_experts : int, optional
        Number of experts that ids count over; default: length of `expert_map`, else E.
    out : (T, H) array, optional
        Written and returned if given; C-contiguous, must not share memory with the inputs.
    check : bool, default False
        Look at values too: ids in range and distinct in a row, weights and tokens finite, `expert_map`
        below E.
    workspace_limit : int, optional
        Most bytes of the scratch that grows with the tokens, which are done in pieces that fit, with the
        same bits. Each CPU thread holds a few MiB besides: a block of rows and, for plain weights, a panel.
    workspace : (bytes,) uint8 array, optional
        Where the scratch goes: at least ``plan(...).workspace_bytes``, on the side of the other arrays. On the
        GPU what must be converted takes its part of it too: choices and biases that are not float32, scales of
        codes that are not prepared, arrays that are not contiguous. What it holds afterwards is of no use.
    backend : str, optional
        Kernel that multiplies; default: the fastest that adds exact products. On the GPU "wgmma" (Hopper),
        "mma" (any), both for 16-bit numbers, "fma" and "tf32" for float32; "tf32" rounds the factors to 11
        bits and is used only when it is named here. On the CPU "amx", "avx512bf16", "avx512", "avx2" or
        "portable". `plan` says which one is used and why not a faster one.

    Returns
    -------
    out : (T, H) array, dtype of `hidden_states`
        On the side (host or device) and stream of the inputs.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or layout that does not fit; with `check`, a value. Arrays on another device than the current one.
    NotImplementedError
        A legal combination that has no kernel on this side, or a `backend` that cannot run here.

    Notes
    -----
    ``out[t] = sum_j topk_weights[t, j] * w2[e] @ act(w1[e] @ x[t])``, ``e = topk_ids[t, j]``.
    Products are summed in float32; each of the results h, act(h), y is rounded to the dtype of the
    tokens; choices are added in the order j = 0, 1, ... in float32. The same inputs give the same bits,
    for any number of threads, and a token's bits do not depend on the other tokens.
    Quantised weights are multiplied as numbers of the dtype of the tokens. Scales that change along K are
    multiplied into the codes in float32 and rounded to that dtype, which costs nothing for mxfp4, mxfp8 and nvfp4
    in bfloat16; the others meet the sums in float32. Activations are quantised before each product, by the rules of
    `quantize`, where `quant_config` says so. Where one scale serves all tokens, bits do depend on the others.
    Scratch: about ``T * k * (H + I)`` elements, see `plan`; on the GPU the decoded weights of one product more.
    On the CPU a call of up to 4096 choices on prepared weights is recorded when its shapes come for the second time,
    and is one compiled call from then on; the memory between its steps is kept for the next. On Linux, with two
    threads, one that is woken behind the other moves to another CPU (``sched_setaffinity``, put back at once).
    On the GPU the call never waits for the device; CuPy arrays are worked on in CuPy's current stream, torch
    tensors in torch's. With `out` and `workspace` it allocates nothing there, so that it can be captured in a CUDA
    graph, once it has run before.
    The steps are

    1. sort the (token, choice) pairs by expert,
    2. first product, with gather, bias and activation,
    3. second product, with bias and router weight,
    4. add the rows of each token.

    References
    ----------
    .. [1] vLLM, ``vllm/model_executor/layers/fused_moe``, the functions of the same names.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.eye(2, 4, dtype="float32")
    >>> w1 = np.ones((3, 4, 4), "float32")
    >>> w2 = np.ones((3, 4, 2), "float32")
    >>> ids = np.array([[0, 2], [1, 0]], "int32")
    >>> weights = np.full((2, 2), 0.5, "float32")
    >>> cumoe.fused_experts(x, w1, w2, weights, ids)
    array([[1.4621172, 1.4621172, 1.4621172, 1.4621172],
           [1.4621172, 1.4621172, 1.4621172, 1.4621172]], dtype=float32)
    """
    return _layer(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        quant_config,
        apply_router_weight_on_input,
        expert_map,
        global_num_experts,
        out,
        check,
        workspace_limit,
        workspace,
        backend,
    )


@on_callers_stream
def fused_moe(
    hidden_states: Array,
    w1: Array | PreparedExperts,
    w2: Array | None,
    router_logits: Array,
    *,
    top_k: int,
    renormalize: bool = True,
    use_grouped_topk: bool = False,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    custom_routing_function: Callable[..., tuple[Array, Array]] | None = None,
    scoring_func: str = "softmax",
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    activation: str = "silu",
    quant_config: Any = None,
    apply_router_weight_on_input: bool | str = False,
    expert_map: Array | None = None,
    global_num_experts: int | None = None,
    out: Array | None = None,
    check: bool = False,
    workspace_limit: int | None = None,
    workspace: Array | None = None,
    backend: str | None = None,
) -> Array:
    """
    Route each token by its logits and run its experts: `select_experts`, then `fused_experts`.

    Parameters
    ----------
    hidden_states : (T, H) array, float32, float16 or bfloat16
        Tokens.
    w1, w2 : arrays, or PreparedExperts and None
        As in `fused_experts`.
    router_logits : (T, global_num_experts) array, float32, float16 or bfloat16
        One logit per token and expert.
    top_k : int
        Experts per token.
    renormalize : bool, default True
        Divide the weights of a token by their sum.
    use_grouped_topk, num_expert_group, topk_group
        Grouped routing, see `grouped_topk`.
    custom_routing_function : callable, optional
        ``f(hidden_states, router_logits, top_k, renormalize) -> (topk_weights, topk_ids)``. With a `workspace` on
        the GPU, CuPy arrays that it makes lie there: it must not keep them for later calls.
    scoring_func : str, default "softmax"
        See `fused_topk`.
    e_score_correction_bias : (E,) array, optional
        Added to the scores for the choice only.
    routed_scaling_factor : float, default 1.0
        Multiplies the weights.
    activation, quant_config, apply_router_weight_on_input, expert_map, global_num_experts
        As in `fused_experts`.
    out, check, workspace_limit, workspace, backend
        As in `fused_experts`; `check` also looks for logits that are NaN or +inf.

    Returns
    -------
    out : (T, H) array, dtype of `hidden_states`
        As `fused_experts` gives it.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As the two functions raise them.

    Notes
    -----
    Scores are float32; equal scores go to the lower id.

    References
    ----------
    .. [1] vLLM, ``fused_moe``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x, logits = np.eye(2, 4, dtype="float32"), np.arange(6, dtype="float32").reshape(2, 3)
    >>> w1, w2 = np.ones((3, 4, 4), "float32"), np.ones((3, 4, 2), "float32")
    >>> cumoe.fused_moe(x, w1, w2, logits, top_k=2).shape
    (2, 4)
    """
    if custom_routing_function is None:
        check_logits(router_logits, w1, expert_map, global_num_experts, check)
    with lent(workspace) as taken:
        topk_weights, topk_ids = select_experts(
            hidden_states,
            router_logits,
            top_k,
            use_grouped_topk=use_grouped_topk,
            renormalize=renormalize,
            topk_group=topk_group,
            num_expert_group=num_expert_group,
            custom_routing_function=custom_routing_function,
            scoring_func=scoring_func,
            routed_scaling_factor=routed_scaling_factor,
            e_score_correction_bias=e_score_correction_bias,
        )
    return _layer(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        quant_config,
        apply_router_weight_on_input,
        expert_map,
        global_num_experts,
        out,
        check,
        workspace_limit,
        workspace,
        backend,
        taken(),
    )


def _layer(*arguments: Any) -> Array:
    """The layer as it was recorded, if such a call was; else step by step, behind all checks of `enter_call`."""
    x, w1, w2, weights, ids, activation, quant_config, on_input, expert_map, count, out, check, *others = arguments
    limit, workspace, backend = others[:3]
    key = None
    if not check and w2 is quant_config is limit is workspace is backend is None:
        key, result = _recorded.replay(w1, (x, weights, ids, expert_map, out), activation, on_input, count)
        if result is not None:
            return result
    call = enter_call(*arguments)
    if key is not None:
        _recorded.remember(w1, key, call, _steps)
    _steps(call)
    return call.result()


def _steps(call: Call) -> None:
    """The steps, for all tokens or some after the others."""
    for piece in call.pieces():
        piece.sort()
        piece.first_product()
        piece.second_product()
        piece.add_up()
