"""
Routing in float64, with a bound on the error that any honest float32 computation of the weights makes.

    choice = logits, or score(logits) + bias
    ids    = the k greatest of choice, equal ones by the lower id
    weight = score[ids] / sum of score[ids] (or not) * scale

Scores grow with their logits, so without a bias comparing logits is comparing exact scores, and the ids
have one right answer. With a bias a float32 computation compares numbers that are off by the bound of
`choices`, and two experts nearer to each other than that may come in either order.

The bound. UNIT is one float32 rounding; exp and log1p may each be off by 4 of them (2 ulp), and every
subnormal may count as zero (FLUSH). Then

    exp(x - m)         is off by expm1(UNIT |x - m|) + 4 UNIT of itself
    sigmoid(x)         by 4 UNIT for exp, one for 1 + exp, one for the division
    sqrt(softplus(x))  by 4 UNIT for exp, whose error log1p does not enlarge, and 4 UNIT for log1p, both
                       halved by the root, and one for the root

a sum of k chosen scores by what these are off plus k - 1 roundings, in any order, and the sum over a
whole row by n / 4 + 3 roundings, which four sums side by side need. Whoever renormalizes a softmax may
divide by the whole sum first: that is a common factor and one rounding more.
"""

from typing import Any, NamedTuple

import numpy as np

from cumoe.reference.rounding import FLUSH, Bounded, rounded

UNIT = 2.0**-24
_EXP = 4 * UNIT
_SECOND_ORDER = 1.001  # products of two errors, each far below 1e-3
_FLOOR = 1e-20  # grouped routing adds it to the sum
_NO_SCORE = -1e30
_IMAGE_IDS = 5
_FLOAT32 = np.dtype(np.float32)

Array = np.ndarray[Any, Any]


class Routing(NamedTuple):
    """Weights and ids of the chosen experts, and the largest error that float32 weights may have."""

    topk_weights: Array
    topk_ids: Array
    error: Array


def scores(router_logits: Array, scoring_func: str) -> Bounded:
    """Score every logit. A score that is not finite counts as 0; under softmax that takes the whole row."""
    x = router_logits.astype(np.float64)
    with np.errstate(all="ignore"):
        if scoring_func == "softmax":
            return _softmax(x)
        if scoring_func == "sigmoid":
            value = np.where(x >= 0, 1 / (1 + np.exp(-x)), np.exp(x) / (1 + np.exp(x)))
            error = 6 * _SECOND_ORDER * UNIT * value + FLUSH
        else:
            value = np.sqrt(np.where(x > 20, x, np.log1p(np.exp(x))))
            flushed = np.minimum(np.sqrt(FLUSH), FLUSH / value)  # sqrt(softplus + FLUSH) - sqrt(softplus)
            error = 5 * _SECOND_ORDER * UNIT * value + flushed
    finite = np.isfinite(value)
    return Bounded(np.where(finite, value, 0.0), np.where(finite, error, 0.0))


def _softmax(x: Array) -> Bounded:
    numerator, defined = _numerators(x)
    value, error = _quotient(numerator, _row_sum(numerator))
    return Bounded(np.where(defined, value, 0.0), np.where(defined, error, 0.0))


def _numerators(x: Array) -> tuple[Bounded, Array]:
    """``exp(x - max(x))``, and which rows have a softmax."""
    defined = (np.isfinite(x) | (x == -np.inf)).all(axis=-1, keepdims=True)
    defined &= (x > -np.inf).any(axis=-1, keepdims=True)
    x = np.where(defined, x, 0.0)
    distance = x.max(axis=-1, keepdims=True) - x
    value = np.exp(-distance)
    relative = np.expm1(np.minimum(UNIT * distance, 1.0)) + _EXP
    return Bounded(value, _SECOND_ORDER * relative * value + FLUSH), defined


def choices(router_logits: Array, scoring_func: str, bias: Array | None = None) -> Bounded:
    """What the experts of a token are compared by; NaN comes last."""
    x = router_logits.astype(np.float64)
    has_score = ~np.isnan(x) & (x != np.inf)
    if bias is not None:
        score = scores(x, scoring_func)
        value = score.value + bias.astype(np.float64)
        error = rounded(value, score.error, _FLOAT32)
        if scoring_func == "sqrtsoftplus":
            value, error = np.where(has_score, value, _NO_SCORE), np.where(has_score, error, 0.0)
        return Bounded(value, np.where(np.isfinite(value), error, 0.0))
    if scoring_func == "softmax":
        defined = has_score.all(axis=-1) & (x > -np.inf).any(axis=-1)
        x = np.where(defined[..., None], x, 0.0)
    elif scoring_func == "sigmoid":
        x = np.where(np.isnan(x), -np.inf, x)
    else:
        x = np.where(has_score, x, np.nan)
    return Bounded(x, np.zeros_like(x))


def best(choice: Array, top_k: int) -> Array:
    """The k greatest of each row, greatest first, equal ones by the lower id, NaN last."""
    return np.argsort(-choice, axis=-1, kind="stable")[..., :top_k]


def weights(
    router_logits: Array,
    topk_ids: Array,
    *,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    per_expert_scale: Array | None = None,
    counted: Array | None = None,
    floor: float = 0.0,
) -> Bounded:
    """The weights of given ids, 0 for an id outside 0..E-1 and where `counted` is false."""
    num_experts = router_logits.shape[-1]
    ids = topk_ids.astype(np.int64)
    used = (ids >= 0) & (ids < num_experts)
    if counted is not None:
        used &= counted
    ids = np.where(used, ids, 0)
    score = scores(router_logits, scoring_func)
    if renormalize and scoring_func == "softmax":
        numerator, defined = _numerators(router_logits.astype(np.float64))
        error = numerator.error + UNIT * numerator.value + FLUSH * num_experts
        score = Bounded(np.where(defined, numerator.value, 0.0), np.where(defined, error, 0.0))
        floor = floor * numerator.value.sum(axis=-1, keepdims=True)
    value = np.where(used, np.take_along_axis(score.value, ids, -1), 0.0)
    error = np.where(used, np.take_along_axis(score.error, ids, -1), 0.0)
    if renormalize:
        total = _sum(Bounded(value, error), value.shape[-1] - 1)
        total = Bounded(total.value + floor, rounded(total.value + floor, total.error, _FLOAT32))
        divisor = Bounded(np.where(total.value > 0, total.value, 1.0), total.error)
        value, error = _quotient(Bounded(value, error), divisor)
        # where the sum may vanish in float32, the quotient may be anything between 0 and 1
        error = np.where(used, np.minimum(error, 1 + 2 * topk_ids.shape[-1] * UNIT), 0.0)
    scale = Bounded(np.array(routed_scaling_factor), np.array(UNIT * abs(routed_scaling_factor)))
    value, error = _product(Bounded(value, error), scale)
    if per_expert_scale is not None:
        factor = np.where(used, per_expert_scale.astype(np.float64)[ids], 1.0)
        value, error = _product(Bounded(value, error), Bounded(factor, np.zeros_like(factor)))
    return Bounded(value, np.where(used, error, 0.0))


def fused_topk(
    router_logits: Array,
    top_k: int,
    *,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Array | None = None,
    per_expert_scale: Array | None = None,
    input_ids: Array | None = None,
    hash_indices_table: Array | None = None,
    bias_vl: Array | None = None,
    image_sentinel_lo: int = 0,
    topk_ids: Array | None = None,
) -> Routing:
    """The formula of this file; with `topk_ids` the weights of these instead of the best ids."""
    ids = best(choices(router_logits, scoring_func, e_score_correction_bias).value, top_k)
    if hash_indices_table is not None and input_ids is not None:
        known = (input_ids >= 0) & (input_ids < len(hash_indices_table))
        row = hash_indices_table.astype(np.int64)[np.where(known, input_ids, 0).astype(np.int64)]
        ids = np.where(known[:, None], row, -1)
    if bias_vl is not None and input_ids is not None:
        is_image = (input_ids >= image_sentinel_lo) & (input_ids < image_sentinel_lo + _IMAGE_IDS)
        ids = np.where(is_image[:, None], best(choices(router_logits, scoring_func, bias_vl).value, top_k), ids)
    if is_padding is not None:
        ids = np.where(is_padding[:, None], -1, ids)
    ids = ids if topk_ids is None else topk_ids
    value, error = weights(
        router_logits,
        ids,
        renormalize=renormalize,
        scoring_func=scoring_func,
        routed_scaling_factor=routed_scaling_factor,
        per_expert_scale=per_expert_scale,
    )
    return Routing(value, ids, error)


def grouped_choices(router_logits: Array, scoring_func: str, bias: Array | None = None) -> Bounded:
    """Like `choices`, with -inf for every expert that has no finite logit, score and bias."""
    x = router_logits.astype(np.float64)
    choice = choices(router_logits, scoring_func, bias)
    finite = np.isfinite(x) & np.isfinite(choice.value)
    if scoring_func == "softmax":  # a NaN or +inf takes the score from the whole row
        finite &= (np.isfinite(x) | (x == -np.inf)).all(axis=-1, keepdims=True)
    return Bounded(np.where(finite, choice.value, -np.inf), np.where(finite, choice.error, 0.0))


def group_scores(choice: Bounded, num_expert_group: int, biased: bool) -> Bounded:
    """What the groups of a token are compared by: the greatest choice, or the sum of the two greatest."""
    num_tokens, num_experts = choice.value.shape
    shape = (num_tokens, num_expert_group, num_experts // num_expert_group)
    value = np.sort(choice.value.reshape(shape), axis=-1)
    error = choice.error.reshape(shape).max(axis=-1)  # a maximum is off by no more than the worst element
    if not biased or shape[-1] == 1:
        return Bounded(value[..., -1], error)
    total = value[..., -1] + value[..., -2]
    return Bounded(total, np.where(np.isfinite(total), rounded(total, 2 * error, _FLOAT32), 0.0))


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
    is_padding: Array | None = None,
    topk_ids: Array | None = None,
) -> Routing:
    """The same with every expert outside the best groups at -inf; see `group_scores`."""
    biased = e_score_correction_bias is not None
    choice = grouped_choices(router_logits, scoring_func, e_score_correction_bias)
    groups = best(group_scores(choice, num_expert_group, biased).value, topk_group)
    group_of_expert = np.arange(router_logits.shape[1]) // (router_logits.shape[1] // num_expert_group)
    kept = (group_of_expert[None, :, None] == groups[:, None, :]).any(axis=-1)
    ids = best(np.where(kept, choice.value, -np.inf), top_k) if topk_ids is None else topk_ids.astype(np.int64)
    padding = np.zeros(len(ids), bool) if is_padding is None else is_padding
    ids = np.where(padding[:, None], -1, ids)
    counted = np.take_along_axis(choice.value, np.maximum(ids, 0), -1) > -np.inf
    counted &= np.take_along_axis(kept, np.maximum(ids, 0), -1)
    value, error = weights(
        router_logits,
        ids,
        renormalize=renormalize,
        scoring_func=scoring_func,
        routed_scaling_factor=routed_scaling_factor,
        counted=counted,
        floor=_FLOOR,
    )
    nothing = ~counted.any(axis=-1) & ~padding
    value[nothing], error[nothing] = 1 / top_k, UNIT / top_k
    return Routing(value, ids, error)


def _row_sum(terms: Bounded) -> Bounded:
    num_terms = terms.value.shape[-1]
    return _sum(terms, min(num_terms - 1, num_terms // 4 + 3))


def _sum(terms: Bounded, additions: int) -> Bounded:
    """Sum over the last axis, which is kept, by so many additions in a row."""
    value = terms.value.sum(axis=-1, keepdims=True)
    error = terms.error.sum(axis=-1, keepdims=True)
    relative = additions * UNIT / (1 - additions * UNIT)
    return Bounded(value, error + relative * (value + error) + additions * FLUSH)


def _quotient(a: Bounded, b: Bounded) -> Bounded:
    """``a / b`` for b >= 0: ``|a' / b' - a / b| <= (da + |a / b| db) / (b - db)``, and one rounding."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = a.value / b.value
        error = np.where(b.value > b.error, (a.error + np.abs(value) * b.error) / (b.value - b.error), np.inf)
    return Bounded(value, rounded(value, error, _FLOAT32))


def _product(a: Bounded, b: Bounded) -> Bounded:
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
    return Bounded(value, rounded(value, error, _FLOAT32))
