"""
Top-k inside the best groups of experts, one token after the other.

    choice[e]   = logit[e], or score[e] + bias[e];  -inf where that or the logit is not finite
    group[g]    = the greatest choice of the group, or with a bias the sum of its two greatest
    choice[e]   = -inf outside the `topk_group` best groups
    ids         = the k best of choice, weights = their scores / (their sum + 1e-20) * scale

Equal groups and equal experts go by the lower number. An expert whose choice is -inf has weight 0; if all
have, the ids are 0..k-1 and every weight is 1 / k.
"""

import math

import numpy as np

from cumoe.cpu import best, rows, scores
from cumoe.cpu._jit import jit
from cumoe.cpu.bits import CODECS
from cumoe.cpu.route import drop, finish, or_empty

LOAD = CODECS["float32"][0]  # constant of the template below; rows.run(...) sets it

_INFINITY = np.float32(np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)
_FLOOR = np.float32(1e-20)  # is added to the sum of the chosen scores


def grouped_topk(
    router_logits,
    bias,
    is_padding,
    dtype,
    num_expert_group,
    topk_group,
    scoring_func,
    renormalize,
    scale,
    topk_weights,
    topk_ids,
):
    """
    Route every row of ``router_logits`` (T, E): write ``topk_weights`` and ``topk_ids`` (T, k).

    `bias` is (E,) float32, `is_padding` (T,) bool; each may be None. `dtype` names what the bits of
    `router_logits` mean: float32, bfloat16 or float16.
    """
    arguments = (
        router_logits,
        or_empty(bias, np.float32),
        or_empty(is_padding, np.bool_),
        num_expert_group,
        topk_group,
        scores.CODES[scoring_func],
        renormalize,
        np.float32(scale),
        topk_weights,
        topk_ids,
    )
    rows.run(_grouped_rows, len(router_logits), router_logits.size, arguments, LOAD=CODECS[dtype][0])


def _grouped_rows(first, last, arguments):
    (
        router_logits,
        bias,
        is_padding,
        num_expert_group,
        topk_group,
        scoring,
        renormalize,
        scale,
        topk_weights,
        topk_ids,
    ) = arguments
    num_experts, top_k = router_logits.shape[1], topk_ids.shape[1]
    group_size = num_experts // num_expert_group
    num_packed, num_blocks = best.room_for(num_experts)
    packed, maxima = np.zeros(num_packed, np.uint64), np.zeros(num_blocks, np.uint64)
    num_packed, num_blocks = best.room_for(num_expert_group)
    packed_groups, group_maxima = np.zeros(num_packed, np.uint64), np.zeros(num_blocks, np.uint64)
    logits, choice = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    groups, kept_group = np.empty(num_expert_group, np.float32), np.empty(num_expert_group, np.bool_)
    chosen = np.empty(top_k, np.int64)
    no_scale = np.empty(0, np.float32)
    for t in range(first, last):
        if is_padding.size > 0 and is_padding[t]:
            drop(topk_weights[t], topk_ids[t])
            continue
        for e in range(num_experts):
            logits[e] = LOAD(router_logits[t, e])
        top = scores.softmax_top(logits) if scoring == scores.SOFTMAX else _ZERO
        total = _ONE
        if scoring == scores.SOFTMAX and (bias.size > 0 or not renormalize):
            scores.score_row(logits, top, scoring, choice)
            total = scores.total(choice)
        _choice(logits, top, total, scoring, bias, choice)
        for g in range(num_expert_group):
            group = choice[g * group_size : g * group_size + group_size]
            groups[g] = _sum_of_best_two(group) if bias.size > 0 and group_size > 1 else group.max()
            kept_group[g] = False
        best.pack(groups, packed_groups)
        best.begin(packed_groups, group_maxima)
        for _ in range(topk_group):
            kept_group[best.take(packed_groups, group_maxima)] = True
        for g in range(num_expert_group):
            if not kept_group[g]:
                choice[g * group_size : g * group_size + group_size] = -_INFINITY
        best.pack(choice, packed)
        best.begin(packed, maxima)
        out = topk_weights[t]
        kept = _ZERO
        for j in range(top_k):
            e = best.take(packed, maxima)
            chosen[j] = e
            out[j] = scores.score(logits[e], top, scoring) if choice[e] > -_INFINITY else _ZERO
            kept += out[j]
        if choice[chosen[0]] > -_INFINITY:
            finish(out, kept + _FLOOR * total if renormalize else total, scale, chosen, no_scale)
        else:
            out[:] = _ONE / np.float32(top_k)
        for j in range(top_k):
            topk_ids[t, j] = chosen[j]


@jit()
def _choice(logits, top, total, scoring, bias, choice):
    no_score = math.isnan(top)
    if bias.size == 0:
        for e in range(choice.size):
            choice[e] = logits[e]
    else:
        scores.score_row(logits, top, scoring, choice)
        for e in range(choice.size):
            choice[e] = choice[e] / total + bias[e]
    for e in range(choice.size):
        finite = abs(choice[e]) < _INFINITY and abs(logits[e]) < _INFINITY
        choice[e] = choice[e] if finite and not no_score else -_INFINITY


@jit()
def _sum_of_best_two(group):
    first, second = -_INFINITY, -_INFINITY
    for e in range(group.size):
        second = max(second, min(first, group[e]))
        first = max(first, group[e])
    return first + second
