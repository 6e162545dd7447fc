"""How far a result is from the exact one, in units of the proven bound."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._act import parameters
from cumoe._arrays import Array
from cumoe._call import ON_INPUT, check_routing
from cumoe._experts import make_experts, weight_arrays
from cumoe._prepare import PreparedExperts
from cumoe._schemes import SCHEMES
from cumoe.reference import experts, formats, quantised
from cumoe.reference.rounding import TF32_UNIT


@dataclass(frozen=True)
class Verification:
    """
    What `verify` found.

    Attributes
    ----------
    max_ratio : float
        Largest ``|out - exact| / bound``; at most 1 for a right result.
    worst : tuple of int
        (token, column) of that element.
    got, exact, bound : float
        The three numbers there.
    rms_error : float
        Root mean square of ``out - exact`` over the root mean square of `exact`.
    tokens : tuple of int
        The tokens that were computed again.
    """

    max_ratio: float
    worst: tuple[int, int]
    got: float
    exact: float
    bound: float
    rms_error: float
    tokens: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Every sampled element is within its bound."""
        return self.max_ratio <= 1

    def __str__(self) -> str:
        verdict = "within" if self.ok else "OUTSIDE"
        return (
            f"{verdict} the bound: max(error/bound) {self.max_ratio:.3g} at {list(self.worst)} "
            f"(got {self.got:.8g}, exact {self.exact:.8g}, bound {self.bound:.3g}), "
            f"relative rms error {self.rms_error:.3g}, {len(self.tokens)} tokens"
        )


@_arrays.on_callers_stream
def verify(
    out: Array,
    hidden_states: Array,
    w1: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    activation: str = "silu",
    quant_config: Any = None,
    apply_router_weight_on_input: bool | str = False,
    expert_map: Array | None = None,
    sample: int | None = 16,
    seed: int = 0,
    backend: str | None = None,
) -> Verification:
    """
    Compute sampled tokens again in float64 and compare with the error bound of each element.

    Parameters
    ----------
    out : (T, H) array
        Result to judge, from this library or another.
    hidden_states, w1, w2, topk_weights, topk_ids
        What it was computed from, as for `fused_experts`; unpacked weights.
    activation, quant_config, apply_router_weight_on_input, expert_map
        As for `fused_experts`.
    sample : int or None, default 16
        How many tokens; None takes all, as a scale that depends on all of them does.
    seed : int, default 0
        Of the choice of tokens.
    backend : str, optional
        "tf32" for a result of the kernel of that name, whose products round both factors: the bound is
        wider then. All other kernels have one bound.

    Returns
    -------
    Verification
        With `max_ratio`, at most 1 for a right result.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit each other.

    Notes
    -----
    The bound is a forward error analysis in `cumoe.reference.experts`: float32 sums of K products in any
    order and one rounding to the tokens' dtype at each of h, act(h), y and out. It holds for all inputs.
    Of quantised operands the exact numbers are those of the codes (`cumoe.reference.quantised`).
    Of arrays on a device, the sampled tokens and their experts are copied to the host.

    References
    ----------
    .. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM, 2002, chapter 3.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, w1, w2 = (rng.standard_normal(s, np.float32) for s in ((5, 8), (3, 12, 8), (3, 8, 6)))
    >>> weights, ids = cumoe.fused_topk(rng.standard_normal((5, 3), np.float32), 2)
    >>> out = cumoe.fused_experts(x, w1, w2, weights, ids)
    >>> cumoe.verify(out, x, w1, w2, weights, ids).ok
    True
    >>> cumoe.verify(2 * out, x, w1, w2, weights, ids).ok
    False
    """
    if isinstance(w1, PreparedExperts):
        raise TypeError("w1 must be an array (E, 2I, H), got PreparedExperts; pass what it was prepared from")
    alpha, beta, limit = parameters(activation, quant_config)
    _check.choice("apply_router_weight_on_input", apply_router_weight_on_input, ON_INPUT)
    own = weight_arrays(w1, w2, quant_config)
    side, inside = _arrays.enter(
        **own,
        out=out,
        hidden_states=hidden_states,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
    )
    own = dict(zip(own, inside, strict=False))
    out, x, weights, ids, expert_map = inside[-5:]
    if backend not in (None, "tf32"):
        _check.choice("backend", backend, ("tf32", *_arrays.room(side.xp, "pack").kernel_names()))
    made = make_experts(side.xp, own, activation, quant_config, x)
    hidden_size, scheme = made.hidden_size, made.scheme
    _check.ndim("hidden_states", x, "(T, H)", 2)
    num_tokens = len(x)
    _check.shape("hidden_states", x, "(T, H)", (num_tokens, hidden_size))
    _check.shape("out", out, "(T, H)", (num_tokens, hidden_size))
    check_routing(weights, ids, num_tokens)
    _check.expert_map(expert_map)
    a1, a2 = (None, None) if scheme is None else (scheme.a1, scheme.a2)
    on_tokens = apply_router_weight_on_input in (True, "hidden_states")
    if (a2 is not None and a2.is_batch_wide) or (a1 is not None and a1.is_batch_wide and on_tokens):
        sample = None  # a scale depends on all of them
    if sample is None or _check.integer("sample", sample, 0) >= num_tokens:
        tokens = np.arange(num_tokens)
    else:
        tokens = np.sort(np.random.default_rng(seed).choice(num_tokens, sample, replace=False))
    batch = _host(x) if a1 is not None and a1.is_batch_wide else None
    computed, x, weights, ids = (_rows(array, tokens) for array in (out, x, weights, ids))
    expert_map, num_experts = _host(expert_map), made.num_experts
    used = np.arange(num_experts)
    if side.xp is not np:
        used, expert_map = _experts_of(ids, expert_map, num_experts)
    w1, w2 = (_weight_law(own[name], scheme, name, used) for name in ("w1", "w2"))
    exact = experts.fused_experts(
        x,
        w1,
        w2,
        weights,
        ids,
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
        w1_bias=_rows(own["w1_bias"], used),
        w2_bias=_rows(own["w2_bias"], used),
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        operand_unit=TF32_UNIT if backend == "tf32" else 0.0,
        a1=_rows_law(a1, used, batch),
        a2=_rows_law(a2, used),
    )
    return _judge(computed.astype(np.float64), exact, experts.ratio(computed, exact), tokens)


def _rows_law(rows: Any, used: Any, batch: Any = None) -> Any:
    """The law's words for quantised rows, of the used experts."""
    if rows is None:
        return None
    global_scale = _host(rows.global_scale)
    if rows.is_by_expert:
        global_scale = global_scale[used]
    return quantised.Rows(rows.scheme, rows.cols, rows.per_tensor, _host(rows.scale), global_scale, batch)


def _weight_law(codes: Any, scheme: Any, name: str, used: Any) -> Any:
    """The law's words for a weight, of the used experts."""
    if scheme is None:
        return _rows(codes, used)
    weight = getattr(scheme, name)
    form = weight.format
    values = _rows(_arrays.bits(codes), used)
    if SCHEMES[form.rule].is_packed:
        values = formats.unpack(values, -1)
    elif form.rule == "int8":
        values = values.view(np.int8)
    scale, zeros, factor = (_rows(array, used) for array in (form.scale, form.zero_points, weight.factor))
    return quantised.Weights(form.rule, values, scale, zeros, form.group_rows, form.group_cols, factor)


def _experts_of(ids: Any, expert_map: Any, num_experts: int) -> tuple[Any, Any]:
    """The experts that `ids` choose, and a map to their places: all of them may be more than the host can hold."""
    local = np.arange(num_experts, dtype=np.int32) if expert_map is None else expert_map
    used = np.unique(experts.local_experts(ids, num_experts, expert_map))
    used = used[used >= 0]
    place = np.full(num_experts + 1, -1, np.int32)  # the last one: of no expert here
    place[used] = np.arange(len(used))
    is_here = (local >= 0) & (local < num_experts)
    return used, place[np.where(is_here, local, num_experts)]


def _judge(computed: Any, exact: Any, ratio: Any, tokens: Any) -> Verification:
    if ratio.size == 0:
        return Verification(0.0, (-1, -1), 0.0, 0.0, 0.0, 0.0, ())
    row, column = (int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    finite = np.isfinite(computed) & np.isfinite(exact.value)
    scale = float(np.sqrt(np.mean(exact.value[finite] ** 2))) if finite.any() else 0.0
    error = float(np.sqrt(np.mean((computed - exact.value)[finite] ** 2))) if finite.any() else 0.0
    return Verification(
        float(ratio[row, column]),
        (int(tokens[row]), column),
        float(computed[row, column]),
        float(exact.value[row, column]),
        float(exact.error[row, column]),
        error / scale if scale else error,
        tuple(int(t) for t in tokens),
    )


def _rows(array: Any, rows: Any) -> Any:
    """Some entries along the first axis, on the host; what is not there stays so."""
    if array is None or array.size == 0:
        return _host(array)
    if isinstance(array, np.ndarray):
        return array[rows]
    if len(rows) == len(array):
        return _host(array)
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for at, row in enumerate(rows):
        found[at] = _host(array[int(row)])
    return found


def _host(array: Any) -> Any:
    """A copy on the host; CuPy copies bits."""
    if array is None or isinstance(array, np.ndarray):
        return array
    return _arrays.bits(array).get().view(array.dtype)
