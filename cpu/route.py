"""
Scores and top-k, one token after the other.

    ids[t]     = the k best of choice[t], greatest first, equal ones by the lower expert id
    weights[t] = score[t, ids[t]] / their sum (or not) * scale

Without a bias the choice is the logit itself: every score grows with it, so the ids depend on no rounding.
With a bias it is score + bias in float32. Each row is computed alone and in one fixed order.
"""

import math

import numpy as np

from cumoe.cpu import best, rows, scores
from cumoe.cpu._jit import jit
from cumoe.cpu.bits import CODECS

LOAD = CODECS["float32"][0]  # constant of the templates below; rows.run(...) sets it

_INFINITY, _NAN = np.float32(np.inf), np.float32(np.nan)
_ZERO, _ONE = np.float32(0), np.float32(1)
_NO_SCORE = np.float32(-1e30)  # stands in a biased choice for a logit that has no sqrt(softplus)
_IMAGE_IDS = 5  # image tokens carry one of five consecutive ids


def fused_topk(
    router_logits,
    bias,
    input_ids,
    hash_indices_table,
    image_bias,
    first_image_id,
    is_padding,
    per_expert_scale,
    dtype,
    scoring_func,
    renormalize,
    scale,
    topk_weights,
    topk_ids,
):
    """
    Route every row of ``router_logits`` (T, E): write ``topk_weights`` and ``topk_ids`` (T, k).

    `bias`, `image_bias` and `per_expert_scale` are (E,) float32, `is_padding` (T,) bool, `input_ids` (T,)
    int64, `hash_indices_table` (vocabulary, k) integer; each may be None. `dtype` names what the bits of
    `router_logits` mean: float32, bfloat16 or float16.
    """
    arguments = (
        router_logits,
        or_empty(bias, np.float32),
        or_empty(input_ids, np.int64),
        np.empty((0, 0), np.int32) if hash_indices_table is None else hash_indices_table,
        or_empty(image_bias, np.float32),
        first_image_id,
        or_empty(is_padding, np.bool_),
        or_empty(per_expert_scale, np.float32),
        scores.CODES[scoring_func],
        renormalize,
        np.float32(scale),
        topk_weights,
        topk_ids,
    )
    rows.run(_fused_rows, len(router_logits), router_logits.size, arguments, LOAD=CODECS[dtype][0])


def or_empty(array, dtype):
    """Stand in for an array that was not given, so that one compiled loop serves both."""
    return np.empty(0, dtype) if array is None else array


def _fused_rows(first, last, arguments):
    (
        router_logits,
        bias,
        input_ids,
        hash_indices_table,
        image_bias,
        first_image_id,
        is_padding,
        per_expert_scale,
        scoring,
        renormalize,
        scale,
        topk_weights,
        topk_ids,
    ) = arguments
    num_experts, top_k = router_logits.shape[1], topk_ids.shape[1]
    num_packed, num_blocks = best.room_for(num_experts)
    packed, maxima = np.zeros(num_packed, np.uint64), np.zeros(num_blocks, np.uint64)
    logits, choice = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    chosen = np.empty(top_k, np.int64)
    for t in range(first, last):
        if is_padding.size > 0 and is_padding[t]:
            drop(topk_weights[t], topk_ids[t])
            continue
        for e in range(num_experts):
            logits[e] = LOAD(router_logits[t, e])
        top = scores.softmax_top(logits) if scoring == scores.SOFTMAX else _ZERO
        is_image = image_bias.size > 0 and first_image_id <= input_ids[t] < first_image_id + _IMAGE_IDS
        row_bias = image_bias if is_image else bias
        if hash_indices_table.shape[0] > 0 and not is_image:
            known = 0 <= input_ids[t] < hash_indices_table.shape[0]
            for j in range(top_k):
                chosen[j] = hash_indices_table[input_ids[t], j] if known else -1
        else:
            if row_bias.size > 0:
                _biased_choice(logits, top, scoring, row_bias, choice)
            else:
                _plain_choice(logits, top, scoring, choice)
            best.pack(choice, packed)
            best.begin(packed, maxima)
            for j in range(top_k):
                chosen[j] = best.take(packed, maxima)
        total = _ONE
        if scoring == scores.SOFTMAX and not renormalize:
            scores.score_row(logits, top, scoring, choice)
            total = scores.total(choice)
        out = topk_weights[t]
        kept = _ZERO
        for j in range(top_k):
            out[j] = scores.score(logits[chosen[j]], top, scoring) if 0 <= chosen[j] < num_experts else _ZERO
            kept += out[j]
        finish(out, kept if renormalize else total, scale, chosen, per_expert_scale)
        for j in range(top_k):
            topk_ids[t, j] = chosen[j]


@jit()
def drop(topk_weights, topk_ids):
    """Write the row of a padding token."""
    for j in range(topk_ids.size):
        topk_weights[j] = 0
        topk_ids[j] = -1


@jit()
def _plain_choice(logits, top, scoring, choice):
    if scoring == scores.SOFTMAX:
        no_score = math.isnan(top)
        for e in range(choice.size):
            choice[e] = _ZERO if no_score else logits[e]
    elif scoring == scores.SIGMOID:
        for e in range(choice.size):  # no score counts as 0, the score of -inf
            choice[e] = -_INFINITY if math.isnan(logits[e]) else logits[e]
    else:
        for e in range(choice.size):  # no score comes last, and NaN comes after -inf
            choice[e] = logits[e] if logits[e] < _INFINITY else _NAN


@jit()
def _biased_choice(logits, top, scoring, bias, choice):
    scores.score_row(logits, top, scoring, choice)
    if scoring == scores.SOFTMAX:
        total = scores.total(choice)
        total = total if total > _ZERO else _ONE  # no softmax exists
        for e in range(choice.size):
            choice[e] = choice[e] / total + bias[e]
    elif scoring == scores.SIGMOID:
        for e in range(choice.size):
            choice[e] = choice[e] + bias[e]
    else:
        for e in range(choice.size):
            choice[e] = choice[e] + bias[e] if logits[e] < _INFINITY else _NO_SCORE


@jit()
def finish(weights, divisor, scale, chosen, per_expert_scale):
    """Divide the chosen scores, unless by nothing, and scale them."""
    divisor = divisor if divisor > _ZERO else _ONE
    for j in range(weights.size):
        weights[j] = weights[j] / divisor * scale
        if per_expert_scale.size > 0 and 0 <= chosen[j] < per_expert_scale.size:
            weights[j] *= per_expert_scale[chosen[j]]
