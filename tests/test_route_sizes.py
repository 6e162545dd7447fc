"""Routing at the sizes and addresses where kernels change their ways, with NaN and ties among the logits."""

import numpy as np
import pytest
from routing import DTYPES, SCORING, check_fused, check_grouped, make_bias, make_logits
from sides import assert_equal, back, on

import cumoe
from cumoe.reference import dense_route

# a lane of a warp holds 1, 2, 4 or 8 logits, then more in another way, and from 1025 on none
EXPERTS = [1, 31, 32, 33, 64, 65, 128, 129, 256, 257, 320, 384, 500, 512, 1023, 1024, 1025, 2056]


def make_problem(num_experts, dtype, kind, num_tokens=5):
    rng = np.random.default_rng(num_experts)
    return make_logits(rng, num_tokens, num_experts, dtype, kind), make_bias(rng, num_experts, "integers")


@pytest.mark.parametrize(("number", "num_experts"), list(enumerate(EXPERTS)))
@pytest.mark.parametrize("turn", [0, 1])
def test_fused_topk_at_every_size(xp, turn, number, num_experts):
    dtype, scoring_func = DTYPES[(number + turn) % 3], SCORING[(number + 2 * turn) % 3]
    for kind in ("normal", "integers", "poisoned"):
        logits, bias = make_problem(num_experts, dtype, kind)
        options = {"scoring_func": scoring_func, "renormalize": kind != "normal"}
        for top_k in sorted({1, min(8, num_experts), min(32, num_experts), min(33, num_experts)}):
            for given in (None, bias):
                results = cumoe.fused_topk(
                    on(xp, logits), top_k, e_score_correction_bias=on(xp, given), indices_dtype="int64", **options
                )
                check_fused(xp, results, logits, bias=given, **options)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_grouped_topk_at_every_size(xp, num_experts):
    sizes = {size for size in (1, 2, 32, 48, num_experts) if num_experts % size == 0}
    for number, group_size in enumerate(sorted(sizes)):
        num_expert_group = num_experts // group_size
        if num_expert_group > 128:  # slow in the law
            continue
        dtype, scoring_func = DTYPES[number % 3], SCORING[(number + num_experts) % 3]
        logits, bias = make_problem(num_experts, dtype, "poisoned" if number == 1 else "normal")
        groups = {"num_expert_group": num_expert_group, "topk_group": (num_expert_group + 1) // 2}
        options = {"scoring_func": scoring_func, "renormalize": number % 2 == 0, "routed_scaling_factor": 2.5}
        for top_k in {1, min(groups["topk_group"] * group_size, 8), min(groups["topk_group"] * group_size, 33)}:
            given = bias if number % 2 else None
            results = cumoe.grouped_topk(
                on(xp, logits), top_k, e_score_correction_bias=on(xp, given), **groups, **options
            )
            check_grouped(xp, results, logits, bias=given, **groups, **options)


@pytest.mark.parametrize("num_experts", [7, 128, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights_at_every_size(xp, dtype, num_experts):
    dense = np.round(make_problem(num_experts, "float32", "normal")[0]).astype(dtype)
    for top_k in (1, 7):
        weights, ids = dense_route.topk_from_dense(dense, top_k)
        assert_equal(cumoe.topk_from_dense(on(xp, dense), top_k), (weights, ids.astype(np.int32)))
        table = cumoe.dense_from_topk(on(xp, weights.astype(dtype)), on(xp, ids), num_experts)
        assert_equal((table,), (dense_route.dense_from_topk(weights, ids, num_experts),))


def at_offset(xp, array, offset):
    """The same numbers, `offset` elements behind an address that every load may use."""
    memory = on(xp, np.concatenate([array.reshape(-1)[:1].repeat(offset), array.reshape(-1)]))
    return memory[offset:].reshape(array.shape)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_begin_at_any_address(xp, dtype, offset):
    logits, bias = make_problem(128, dtype, "normal")
    moved, moved_bias = at_offset(xp, logits, offset), at_offset(xp, bias, offset)
    groups = {"num_expert_group": 4, "topk_group": 2}
    check_fused(xp, cumoe.fused_topk(moved, 8), logits)
    check_fused(xp, cumoe.fused_topk(moved, 8, e_score_correction_bias=moved_bias), logits, bias=bias)
    results = cumoe.grouped_topk(moved, 8, e_score_correction_bias=moved_bias, **groups)
    check_grouped(xp, results, logits, bias=bias, **groups)
    weights, ids = on(xp, np.full((5, 1), 2, np.float32)), on(xp, np.full((5, 1), 9))
    copied = back(cumoe.zero_experts(moved, weights, ids, 8)[2])
    np.testing.assert_array_equal(copied.astype(np.float32), 2 * logits.astype(np.float32))


@pytest.mark.parametrize("num_experts", [7, 60, 66, 128, 502, 1100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_later_rows_of_an_array_get_the_same_bits(xp, dtype, num_experts):
    logits, bias = (on(xp, array) for array in make_problem(num_experts, dtype, "normal", num_tokens=9))
    for given in ({"renormalize": False}, {"e_score_correction_bias": bias}):
        weights, ids = map(back, cumoe.fused_topk(logits, 6, **given))
        for first in (1, 2, 7):
            assert_equal(cumoe.fused_topk(logits[first:], 6, **given), (weights[first:], ids[first:]))
