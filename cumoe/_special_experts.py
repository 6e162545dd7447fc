"""Experts that compute nothing: their share of the output, and a routing without them."""

from cumoe import _arrays, _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array

ZERO_EXPERT_TYPES = ("identity", "copy", "zero")


@_arrays.on_callers_stream
def zero_experts(
    hidden_states: Array,
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    *,
    zero_expert_type: str = "identity",
    masked_id: int = 0,
) -> tuple[Array, Array, Array]:
    """
    Split off the choices of experts that only hand their token on.

    Parameters
    ----------
    hidden_states : (T, H) array, float32, float16 or bfloat16
        Tokens.
    topk_weights : (T, k) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k) array, int32, int64 or uint32
        Chosen experts. Ids from `num_experts` on are the special ones; ids below 0 stay as they are.
    num_experts : int
        Experts with weights, E.
    zero_expert_type : {"identity", "copy", "zero"}, default "identity"
        What a special expert gives: its token ("identity" and "copy" are one thing), or nothing.
    masked_id : int, default 0
        What a special choice becomes for the other experts, with weight 0. With -1 they skip it, with 0
        they compute it for nothing.

    Returns
    -------
    topk_weights, topk_ids : (T, k) arrays
        The choices of experts with weights, of the kinds given.
    zero_expert_output : (T, H) array, dtype of `hidden_states`
        What the special experts add to the layer's output.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit, or an unknown name.

    See Also
    --------
    fused_topk : Routes over both sorts: give it logits for the special experts too.

    Notes
    -----
    ``zero_expert_output[t] = (sum of the special weights of t) * hidden_states[t]``: the sum in float32,
    choices in order, one rounding at the end. It is 0 where the sum is 0. No argument is changed.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[2.0, 4.0]], np.float32)
    >>> topk_weights, topk_ids = np.array([[0.75, 0.25]], np.float32), np.array([[1, 8]])
    >>> cumoe.zero_experts(x, topk_weights, topk_ids, 8)
    (array([[0.75, 0.  ]], dtype=float32), array([[1, 0]]), array([[0.5, 1. ]], dtype=float32))
    """
    side, (x, weights, ids) = _arrays.enter(hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
    _check.ndim("hidden_states", x, "(T, H)", 2)
    _check.dtype("hidden_states", x, arguments.FLOATS)
    _check.ndim("topk_ids", ids, "(T, k)", 2)
    _check.dtype("topk_ids", ids, arguments.INTEGERS)
    _check.shape("topk_ids", ids, "(T, k)", (x.shape[0], ids.shape[1]))
    _check.shape("topk_weights", weights, "(T, k)", tuple(ids.shape))
    _check.dtype("topk_weights", weights, ("float32",))
    num_experts = _check.integer("num_experts", num_experts, 1, 2**31 - 1)
    masked_id = _check.integer("masked_id", masked_id, -1, num_experts - 1)
    _check.choice("zero_expert_type", zero_expert_type, ZERO_EXPERT_TYPES)
    xp = side.xp
    real_weights, real_ids = xp.empty(weights.shape, weights.dtype), xp.empty(ids.shape, ids.dtype)
    out = xp.empty(x.shape, x.dtype)
    _arrays.room(xp, "special_experts").zero_experts(
        _arrays.bits(x),
        _arrays.bits(weights),
        arguments.signed(_arrays.bits(ids)),
        x.dtype.name,
        num_experts,
        masked_id,
        zero_expert_type != "zero",
        real_weights,
        arguments.signed(real_ids),
        _arrays.bits(out),
    )
    return side.leave(real_weights), side.leave(real_ids), side.leave(out)
