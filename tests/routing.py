"""Router logits of every kind, and what makes an answer a right one."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
from hypothesis import strategies as st
from sides import back

from cumoe.reference import route as law

DTYPES = ("float32", "float16", "bfloat16")
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
KINDS = ("normal", "integers", "wide", "poisoned", "equal")


class Problem(NamedTuple):
    logits: np.ndarray
    top_k: int
    bias: np.ndarray | None


def make_logits(rng, num_tokens, num_experts, dtype="float32", kind="normal"):
    """`integers` is full of ties, `wide` of scores that saturate, `poisoned` of NaN and infinities."""
    shape = (num_tokens, num_experts)
    logits = rng.standard_normal(shape)
    if kind == "integers":
        logits = rng.integers(-3, 4, shape).astype(float)
    elif kind == "wide":
        logits *= 60
    elif kind == "poisoned":
        bad = rng.random(shape) < rng.choice([0.02, 0.5, 1.0], (num_tokens, 1))
        logits[bad] = rng.choice([np.nan, -np.nan, np.inf, -np.inf], int(bad.sum()))
    elif kind == "equal":
        logits[:] = logits[:, :1]
    return logits.astype(dtype)


def make_bias(rng, num_experts, kind="normal"):
    if kind == "integers":
        return rng.integers(-1, 2, num_experts).astype(np.float32)
    bias = rng.standard_normal(num_experts).astype(np.float32)
    if kind == "poisoned":
        bias[rng.random(num_experts) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
    return bias


@st.composite
def problems(draw, max_experts=70):
    """Top-k problems; the bias is there in half of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_tokens = draw(st.sampled_from([0, 1, 2, 5, 17]))
    num_experts = draw(st.integers(1, max_experts))
    kind = draw(st.sampled_from(KINDS))
    logits = make_logits(rng, num_tokens, num_experts, draw(st.sampled_from(DTYPES)), kind)
    bias = make_bias(rng, num_experts, draw(st.sampled_from(["normal", "integers", "poisoned"])))
    return Problem(logits, draw(st.integers(1, num_experts)), bias if draw(st.booleans()) else None)


def assert_valid_ids(ids, num_experts):
    """Check that every row holds different ids of experts."""
    ids = ids.astype(np.int64)
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()


def assert_best(ids, choice, same):
    """
    Check that `ids` are the k best of `choice`, in order, as far as its error can tell.

    `same(t, a, b)` says which experts have the very same inputs: they must come by their ids.
    """
    ids = ids.astype(np.int64)
    assert_valid_ids(ids, choice.value.shape[1])
    for t, row in enumerate(ids):
        value, error = choice.value[t], choice.error[t]
        rank = np.where(np.isnan(value), -2.0, np.where(value == -np.inf, -1.0, 0.0))  # NaN is after -inf
        value = np.where(rank < 0, 0.0, value)
        left = np.ones(value.size, bool)
        for e in row:
            left[e] = False
            better = rank[e] > rank[left]
            with np.errstate(invalid="ignore"):  # two biases of +inf
                near = value[e] - value[left] >= -(error[e] + error[left])
            equal = value[e] == value[left]
            assert (better | ((rank[e] == rank[left]) & (near | equal))).all(), (t, e)
            others = np.flatnonzero(left)
            ties = others[(rank[e] == rank[left]) & equal & ((error[e] + error[left] == 0) | same(t, e, others))]
            assert (e < ties).all(), (t, e)


def same_inputs(logits, bias):
    """Make the `same` of `assert_best`."""
    x = logits.astype(np.float64)

    def same(t, a, b):
        equal = (x[t, a] == x[t, b]) | (np.isnan(x[t, a]) & np.isnan(x[t, b]))
        return equal if bias is None else equal & (bias[a] == bias[b])

    return same


def assert_weights(weights, routing):
    """Check weights against the law's at the same ids, element by element within its error."""
    assert weights.dtype == np.float32
    off = np.abs(weights.astype(np.float64) - routing.topk_weights)
    assert np.isfinite(weights).all()
    worst = np.argmax(off - routing.error) if off.size else 0
    assert (off <= routing.error).all(), (
        np.unravel_index(worst, off.shape),
        off.flat[worst],
        routing.error.flat[worst],
    )


def check_fused(xp, results, logits, *, bias=None, scoring_func="softmax", **options):
    """Check what `fused_topk` returned, from the logits alone."""
    topk_weights, topk_ids = map(back, results)
    ids = topk_ids.astype(np.int64)
    choice = law.choices(logits, scoring_func, bias)
    if bias is None:
        np.testing.assert_array_equal(ids, law.best(choice.value, ids.shape[1]))
    else:
        assert_best(ids, choice, same_inputs(logits, bias))
    routing = law.fused_topk(
        logits, ids.shape[1], scoring_func=scoring_func, e_score_correction_bias=bias, topk_ids=ids, **options
    )
    assert_weights(topk_weights, routing)


def check_grouped(xp, results, logits, *, num_expert_group, topk_group, bias=None, scoring_func="softmax", **options):
    """
    Check what `grouped_topk` returned, and return which rows were decided.

    In the others two groups are nearer to each other than float32 can tell; there any legal ids do.
    """
    topk_weights, topk_ids = map(back, results)
    topk_ids = topk_ids.astype(np.int64)
    assert_valid_ids(topk_ids, logits.shape[1])
    choice = law.grouped_choices(logits, scoring_func, bias)
    groups = law.group_scores(choice, num_expert_group, bias is not None)
    order = law.best(groups.value, num_expert_group)
    size = logits.shape[1] // num_expert_group
    decided = np.ones(len(logits), bool)
    masked = law.Bounded(np.full_like(choice.value, -np.inf), np.zeros_like(choice.error))
    for t in range(len(logits)):
        kept, lost = order[t, :topk_group], order[t, topk_group:]
        with np.errstate(invalid="ignore"):
            gap = groups.value[t, kept][:, None] - groups.value[t, lost]
        room = groups.error[t, kept][:, None] + groups.error[t, lost]
        tie = [
            [_two_best(logits, bias, choice, t, g, size) == _two_best(logits, bias, choice, t, h, size) for h in lost]
            for g in kept
        ]
        decided[t] = ((room == 0) | ~np.isfinite(gap) | (gap > room) | np.array(tie, bool).reshape(gap.shape)).all()
        experts = (kept[:, None] * size + np.arange(size)).reshape(-1)
        masked.value[t, experts], masked.error[t, experts] = choice.value[t, experts], choice.error[t, experts]
    assert decided.all() or bias is not None
    masked = law.Bounded(masked.value[decided], masked.error[decided])
    assert_best(topk_ids[decided], masked, same_inputs(logits[decided], bias))
    routing = law.grouped_topk(
        logits,
        topk_ids.shape[1],
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        scoring_func=scoring_func,
        e_score_correction_bias=bias,
        topk_ids=topk_ids,
        **options,
    )
    assert_weights(topk_weights[decided], law.Routing(*(array[decided] for array in routing)))
    return decided


def _two_best(logits, bias, choice, t, g, size):
    """Inputs of the two best experts of a group: groups that agree in them have the same score to the last bit."""
    experts = g * size + np.argsort(-choice.value[t, g * size : (g + 1) * size], kind="stable")[:2]
    return sorted((float(logits[t, e]), 0.0 if bias is None else float(bias[e])) for e in experts)
