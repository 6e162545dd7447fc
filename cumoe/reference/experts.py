"""
The expert computation in float64, with a bound on the error that any honest float32 computation makes.

For token t, choice j, e = expert_map[topk_ids[t, j]], skipped if e is outside 0..E-1:

    x' = x[t] * w[t, j]             only with the router weight on the input, rounded
    h  = x' @ w1[e].T + b1[e]       (* w[t, j] in the mode "accumulator"), rounded
    a  = act(h)                     rounded
    y  = (a @ w2[e].T + b2[e]) * w[t, j]   without w if it was on the input, rounded
    out[t] = sum over j of y        rounded

"Rounded" is what a computation may do: each arrow adds at most one rounding to the dtype of the
activations; the float64 value has none. The bound is a forward error analysis of these lines, so it
holds for every input, not for typical ones (features: rounding.py; activations: act.py). Quantised
operands (quantised.py) take the places of w1, w2, x' and a; their factors meet the sums before the bias.
"""

from typing import Any

import numpy as np

from cumoe.reference import act, quantised
from cumoe.reference.rounding import FLUSH, SUM_UNIT, Bounded, gamma, largest, rounded


def fused_experts(
    hidden_states: np.ndarray,
    w1: np.ndarray | quantised.Weights,
    w2: np.ndarray | quantised.Weights,
    topk_weights: np.ndarray,
    topk_ids: np.ndarray,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    w1_bias: np.ndarray | None = None,
    w2_bias: np.ndarray | None = None,
    apply_router_weight_on_input: bool | str = False,
    expert_map: np.ndarray | None = None,
    operand_unit: float = 0.0,
    a1: quantised.Rows | None = None,
    a2: quantised.Rows | None = None,
) -> Bounded:
    """
    The formula of this file for every row of `hidden_states`, (T, H) float64 both.

    With `operand_unit` (`rounding.TF32_UNIT`), a product may round both of its operands once more. `w1` and `w2` are
    arrays or `quantised.Weights`; `a1` and `a2` say how the rows before them are quantised, weights as well then.
    """
    num_tokens, hidden_size = hidden_states.shape
    dtype = hidden_states.dtype
    x = hidden_states.astype(np.float64, order="C")
    weights = np.asarray(topk_weights).astype(np.float32).astype(np.float64)
    experts = local_experts(topk_ids, len(w1), expert_map)
    on_tokens = apply_router_weight_on_input in (True, "hidden_states")
    used = [(e, *np.nonzero(experts == e)) for e in np.unique(experts[experts >= 0])]
    with np.errstate(invalid="ignore", over="ignore"):
        batch = None
        if a1 is not None and a1.is_batch_wide:
            whole = x if a1.batch is None else np.asarray(a1.batch).astype(np.float64)
            tokens = Bounded(whole, np.zeros_like(whole))
            batch = quantised.batch_scale(weighted(tokens, weights[:, :1], dtype) if on_tokens else tokens, a1)
        between = []
        for e, tokens, choices in used:
            weight = weights[tokens, choices][:, None]
            first = Bounded(x[tokens], np.zeros((len(tokens), hidden_size)))
            if on_tokens:
                first = weighted(first, weight, dtype)
            h = product(first, w1, e, a1, batch, w1_bias, operand_unit, dtype)
            if apply_router_weight_on_input == "accumulator":
                h = scaled(h, weight)
            h = Bounded(h.value, rounded(h.value, h.error, dtype))
            a = activated(h, activation, alpha, beta, limit)
            between.append(Bounded(a.value, rounded(a.value, a.error, dtype)))
        batch = None
        if a2 is not None and a2.is_batch_wide and between:
            batch = quantised.batch_scale(joined(between), a2)
        out = np.zeros((num_tokens, hidden_size))
        size, error = np.zeros_like(out), np.zeros_like(out)
        for (e, tokens, choices), a in zip(used, between, strict=True):
            y = product(a, w2, e, a2, batch, w2_bias, operand_unit, dtype)
            if not apply_router_weight_on_input:
                y = scaled(y, weights[tokens, choices][:, None])
            np.add.at(out, tokens, y.value)
            np.add.at(size, tokens, np.abs(y.value))
            np.add.at(error, tokens, rounded(y.value, y.error, dtype))
        error += gamma(topk_ids.shape[1]) * (size + error)
        return Bounded(out, unknown_is_infinite(rounded(out, error, dtype)))


def product(
    x: Bounded,
    weights: Any,
    e: int,
    rows: quantised.Rows | None,
    batch: Any,
    biases: np.ndarray | None,
    operand_unit: float,
    dtype: np.dtype,
) -> Bounded:
    """Rows of one expert times its weights, plus its bias; either may be quantised."""
    bias = None if biases is None else biases[e]
    if not isinstance(weights, quantised.Weights):
        return linear(x, weights[e], bias, operand_unit)
    row_factor = Bounded(np.ones((len(x.value), 1)), np.zeros((len(x.value), 1)))
    if rows is not None:
        x, row_factor = quantised.quantise(x, rows, dtype, e, batch)
    numbers, column_factor = weights.operand(e, dtype)
    sums = linear(x, numbers.value, None, operand_unit)
    with np.errstate(invalid="ignore", over="ignore"):
        grown = times(np.abs(x.value) + x.error, numbers.error)  # what rounding the weights may change
        grown *= (1 + operand_unit) ** 2 * (1 + gamma(x.value.shape[1] + 2))
        sums = Bounded(sums.value, sums.error + grown)
        return factored(sums, row_factor, column_factor, bias)


def factored(sums: Bounded, row_factor: Bounded, column_factor: np.ndarray, bias: np.ndarray | None) -> Bounded:
    """``sums * (row factor * column factor) + bias``, three float32 operations."""
    b = np.zeros(len(column_factor)) if bias is None else np.asarray(bias).astype(np.float64)
    factor, off = row_factor.value * column_factor, row_factor.error * np.abs(column_factor)
    value = sums.value * factor + b
    error = sums.error * (np.abs(factor) + off) + np.abs(sums.value) * off
    most = (np.abs(sums.value) + sums.error) * (np.abs(factor) + off) + np.abs(b)
    return Bounded(value, unknown_is_infinite(error + gamma(3) * most + 3 * FLUSH))


def weighted(rows: Bounded, weight: np.ndarray, dtype: np.dtype) -> Bounded:
    """Tokens times their router weight, rounded."""
    value = rows.value * weight
    return Bounded(value, rounded(value, SUM_UNIT * np.abs(value), dtype))


def joined(parts: list[Bounded]) -> Bounded:
    """Rows of all parts, one after the other."""
    return Bounded(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def linear(x: Bounded, weights: np.ndarray, bias: np.ndarray | None = None, operand_unit: float = 0.0) -> Bounded:
    """``x @ weights.T + bias`` summed in float32, of operands that are off by up to `operand_unit` of themselves."""
    w = weights.astype(np.float64, order="C")
    b = np.zeros(len(w)) if bias is None else np.asarray(bias).astype(np.float64)
    terms, absolute, grown = w.shape[1] + 2, np.abs(w), 1 + operand_unit
    with np.errstate(invalid="ignore", over="ignore"):
        # x' (1 + d) w (1 + d') with |x' - x| <= e and |d|, |d'| <= u is off from x w by at most
        # |w| (e (1 + u)**2 + |x| ((1 + u)**2 - 1))
        off = x.error * grown**2 + np.abs(x.value) * (grown**2 - 1)
        magnitude, heavy = (np.abs(x.value) + x.error) * grown, absolute * grown
        if operand_unit:
            magnitude, heavy = (np.where(one > largest(np.dtype("f4")), np.inf, one) for one in (magnitude, heavy))
        size = times(magnitude, heavy) + np.abs(b)
        # subnormal operands and products may count as zero
        flushed = FLUSH * (magnitude.sum(axis=1)[:, None] + heavy.sum(axis=1) + 2 * terms)
        error = times(off, absolute) + gamma(terms) * size + flushed
        return Bounded(times(x.value, w) + b, unknown_is_infinite(error))


def times(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``x @ w.T``, in the order that BLAS does faster for few rows of `x`."""
    return (w @ x.T).T


def scaled(x: Bounded, factor: np.ndarray) -> Bounded:
    """``x * factor``, one float32 product."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(factor) * x.error * (1 + SUM_UNIT) + SUM_UNIT * np.abs(x.value * factor) + FLUSH
        return Bounded(x.value * factor, unknown_is_infinite(error))


def activated(h: Bounded, activation: str, alpha: float | None, beta: float | None, limit: float | None) -> Bounded:
    """The activation of act.py on the gate and up columns of `h`."""
    rule = act.ACTIVATIONS[activation]
    parameters = rule.parameters(alpha, beta, limit)
    (gate, up), (gate_error, up_error) = act.split(h.value, activation), act.split(h.error, activation)
    with np.errstate(invalid="ignore", over="ignore"):
        error = rule.error(gate, up, gate_error, up_error, *parameters)
        return Bounded(rule.value(gate, up, *parameters), unknown_is_infinite(error))


def local_experts(topk_ids: np.ndarray, num_experts: int, expert_map: np.ndarray | None) -> np.ndarray:
    """The row of the weights that each choice uses, int64, -1 if it is skipped."""
    ids = topk_ids.astype(np.int64)
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = np.where(known, expert_map[np.where(known, ids, 0)].astype(np.int64), -1)
    return np.where((ids >= 0) & (ids < num_experts), ids, -1)


def unknown_is_infinite(error: np.ndarray) -> np.ndarray:
    """Inf where the analysis says nothing (an operand was not finite or overflowed on the way)."""
    return np.where(np.isnan(error), np.inf, error)


def ratio(out: Any, bounded: Bounded) -> np.ndarray:
    """
    ``|out - value| / error`` elementwise; at most 1 for a right result.

    Where `value` is not finite, `out` must be neither. Where the bound is infinite, anything goes.
    """
    computed = np.asarray(out).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(computed - bounded.value)
        quotient = np.where(distance == 0, 0.0, distance / bounded.error)
    quotient = np.where(np.isnan(quotient), np.inf, quotient)
    quotient = np.where(np.isinf(bounded.error), 0.0, quotient)
    return np.where(np.isfinite(bounded.value), quotient, np.where(np.isfinite(computed), np.inf, 0.0))
