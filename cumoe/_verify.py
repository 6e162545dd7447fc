"""How far a result is from the exact one, in units of the proven bound."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._act import parameters
from cumoe._arrays import Array
from cumoe._experts import make_experts
from cumoe._law import enter_compared, host, host_rows, needs_all_tokens, rows_law, used_experts, weight_law
from cumoe.reference import experts
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
    alpha, beta, limit = parameters(activation, quant_config)
    given = enter_compared(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        expert_map,
        quant_config,
        apply_router_weight_on_input,
        out=out,
    )
    side, own, out, x, weights, ids, expert_map = given
    if backend not in (None, "tf32"):
        _check.choice("backend", backend, ("tf32", *_arrays.room(side.xp, "pack").kernel_names()))
    made, num_tokens = make_experts(side.xp, own, activation, quant_config, x), len(x)
    _check.shape("hidden_states", x, "(T, H)", (num_tokens, made.hidden_size))
    _check.shape("out", out, "(T, H)", (num_tokens, made.hidden_size))
    scheme = made.scheme
    a1, a2 = (None, None) if scheme is None else (scheme.a1, scheme.a2)
    if needs_all_tokens(a1, a2, apply_router_weight_on_input):
        sample = None
    if sample is None or _check.integer("sample", sample, 0) >= num_tokens:
        tokens = np.arange(num_tokens)
    else:
        tokens = np.sort(np.random.default_rng(seed).choice(num_tokens, sample, replace=False))
    batch = host(x) if a1 is not None and a1.is_batch_wide else None
    computed, x, weights, ids = (host_rows(array, tokens) for array in (out, x, weights, ids))
    expert_map, num_experts = host(expert_map), made.num_experts
    used = np.arange(num_experts)
    if side.xp is not np:
        used, expert_map = used_experts(ids, expert_map, num_experts)
    w1, w2 = (weight_law(own[name], scheme, name, used) for name in ("w1", "w2"))
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
        w1_bias=host_rows(own["w1_bias"], used),
        w2_bias=host_rows(own["w2_bias"], used),
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        operand_unit=TF32_UNIT if backend == "tf32" else 0.0,
        a1=rows_law(a1, used, batch),
        a2=rows_law(a2, used),
    )
    return _judge(computed.astype(np.float64), exact, experts.ratio(computed, exact), tokens)


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
