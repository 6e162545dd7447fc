"""Routing: every function against the law, at exact ties, with NaN and infinities, on any layout."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from routing import (
    DTYPES,
    SCORING,
    assert_best,
    assert_valid_ids,
    assert_weights,
    check_fused,
    check_grouped,
    make_bias,
    make_logits,
    problems,
    same_inputs,
)
from sides import assert_equal, back, on

import cumoe
from cumoe.reference import dense_route, special_experts
from cumoe.reference import route as law

options = st.fixed_dictionaries(
    {"renormalize": st.booleans(), "scoring_func": st.sampled_from(SCORING), "routed_scaling_factor": st.just(2.5)}
)


@given(problem=problems(), options=options)
def test_fused_topk_equals_reference(xp, problem, options):
    logits, bias = on(xp, problem.logits), on(xp, problem.bias)
    results = cumoe.fused_topk(logits, problem.top_k, e_score_correction_bias=bias, **options)
    check_fused(xp, results, problem.logits, bias=problem.bias, **options)


@given(problem=problems(), options=options, data=st.data())
def test_grouped_topk_equals_reference(xp, problem, options, data):
    num_experts = problem.logits.shape[1]
    num_expert_group = data.draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
    topk_group = data.draw(st.integers(1, num_expert_group))
    top_k = min(problem.top_k, topk_group * (num_experts // num_expert_group))
    groups = {"num_expert_group": num_expert_group, "topk_group": topk_group}
    logits, bias = on(xp, problem.logits), on(xp, problem.bias)
    results = cumoe.grouped_topk(logits, top_k, e_score_correction_bias=bias, **groups, **options)
    check_grouped(xp, results, problem.logits, bias=problem.bias, **groups, **options)


@given(problem=problems(max_experts=20), options=options, data=st.data())
def test_hash_topk_equals_reference(xp, problem, options, data):
    num_tokens, num_experts = problem.logits.shape
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(["int32", "int64", "uint32"]))
    table = rng.integers(-1, num_experts + 1, (40, problem.top_k)).astype(dtype)
    signed = table.astype(np.int32).astype(np.int64)
    input_ids = rng.integers(-2, 43, num_tokens)
    image = {"bias_vl": problem.bias, "image_sentinel_lo": 10} if problem.bias is not None else {}
    topk_weights, topk_ids = map(
        back,
        cumoe.hash_topk(
            on(xp, problem.logits),
            on(xp, input_ids),
            on(xp, table),
            **{name: on(xp, value) if name == "bias_vl" else value for name, value in image.items()},
            **options,
        ),
    )
    is_image = (input_ids >= 10) & (input_ids < 15) if image else np.zeros(num_tokens, bool)
    known = (input_ids >= 0) & (input_ids < 40)
    expected = np.where(known[:, None], signed[np.where(known, input_ids, 0)], -1)
    np.testing.assert_array_equal(topk_ids[~is_image], expected[~is_image])
    if image:
        choice = law.choices(problem.logits, options["scoring_func"], problem.bias)
        chosen = law.Bounded(choice.value[is_image], choice.error[is_image])
        assert_best(topk_ids[is_image], chosen, same_inputs(problem.logits[is_image], problem.bias))
    routing = law.fused_topk(problem.logits, problem.top_k, topk_ids=topk_ids, **options)
    assert_weights(topk_weights, routing)


def test_image_tokens_use_their_own_bias_without_a_table_too(xp):
    logits = np.zeros((3, 4), np.float32)
    topk_ids = cumoe.fused_topk(
        on(xp, logits),
        1,
        e_score_correction_bias=on(xp, np.array([0, 1, 0, 0], np.float32)),
        bias_vl=on(xp, np.array([0, 0, 0, 1], np.float32)),
        input_ids=on(xp, np.array([99, 104, 105])),
        image_sentinel_lo=100,
    )[1]
    assert back(topk_ids).tolist() == [[1], [3], [1]]


# -- known answers ----------------------------------------------------------------------------------


def test_softmax_weights_are_those_of_the_formula(xp):
    logits = on(xp, np.log(np.array([[1, 4, 2, 1]], np.float32)))
    whole = cumoe.fused_topk(logits, 2, renormalize=False)
    np.testing.assert_allclose(back(whole[0]), [[0.5, 0.25]], rtol=1e-6)
    renormalized = cumoe.fused_topk(logits, 2, routed_scaling_factor=3.0)
    np.testing.assert_allclose(back(renormalized[0]), [[2, 1]], rtol=1e-6)
    assert back(whole[1]).tolist() == back(renormalized[1]).tolist() == [[1, 2]]


def test_a_bias_chooses_and_does_not_weigh(xp):
    logits, bias = on(xp, np.zeros((1, 3), np.float32)), on(xp, np.array([-2, -1, -3], np.float32))
    topk_weights, topk_ids = cumoe.fused_topk(logits, 2, scoring_func="sigmoid", e_score_correction_bias=bias)
    assert_equal((topk_weights, topk_ids), (np.full((1, 2), 0.5, np.float32), np.array([[1, 0]], np.int32)))


@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_of_one_bad_value_gives_the_first_experts(xp, scoring_func, bad):
    logits = np.full((2, 5), bad, np.float32)
    topk_weights, topk_ids = map(back, cumoe.fused_topk(on(xp, logits), 3, scoring_func=scoring_func))
    assert topk_ids.tolist() == [[0, 1, 2]] * 2
    one = np.float32(1 / 3) if scoring_func == "sigmoid" and bad == np.inf else 0
    np.testing.assert_allclose(topk_weights, one, rtol=1e-6)


def test_scores_without_value_count_as_zero_or_come_last(xp):
    logits = on(xp, np.array([[np.nan, -np.inf, -3, np.inf]], np.float32))
    answers = {name: cumoe.fused_topk(logits, 4, scoring_func=name) for name in SCORING}
    ids = {name: back(answer[1]).tolist() for name, answer in answers.items()}
    assert ids == {"softmax": [[0, 1, 2, 3]], "sigmoid": [[3, 2, 0, 1]], "sqrtsoftplus": [[2, 1, 0, 3]]}
    weights = {name: back(answer[0])[0] for name, answer in answers.items()}
    assert weights["softmax"].tolist() == [0, 0, 0, 0]
    assert weights["sigmoid"][2:].tolist() == [0, 0]
    assert weights["sqrtsoftplus"].tolist() == [1, 0, 0, 0]


def test_groups_without_finite_experts_share_their_weight(xp):
    logits = np.full((2, 8), np.nan, np.float32)
    logits[1, 6] = 1
    topk_weights, topk_ids = cumoe.grouped_topk(
        on(xp, logits), 4, num_expert_group=4, topk_group=2, scoring_func="sigmoid", routed_scaling_factor=2.0
    )
    assert back(topk_ids).tolist() == [[0, 1, 2, 3], [6, 0, 1, 2]]
    np.testing.assert_allclose(back(topk_weights), [[0.25] * 4, [2, 0, 0, 0]], rtol=1e-6)


def test_group_score_is_the_maximum_without_and_the_best_two_with_a_bias(xp):
    logits = on(xp, np.array([[3, -9, 2, 2, 0, 0]], np.float32))
    groups = {"num_expert_group": 3, "topk_group": 1, "scoring_func": "sigmoid"}
    assert back(cumoe.grouped_topk(logits, 1, **groups)[1]).tolist() == [[0]]
    bias = on(xp, np.zeros(6, np.float32))
    assert back(cumoe.grouped_topk(logits, 1, **groups, e_score_correction_bias=bias)[1]).tolist() == [[2]]


# -- options that every router has ------------------------------------------------------------------


@pytest.mark.parametrize("indices_dtype", ["int32", "int64", "uint32"])
def test_padding_tokens_get_no_expert(xp, indices_dtype):
    logits = make_logits(np.random.default_rng(0), 4, 6)
    logits[1] = np.nan
    is_padding = np.array([False, True, False, True])
    given = {"indices_dtype": indices_dtype, "is_padding": on(xp, is_padding)}
    table, input_ids = on(xp, np.array([[0, 1]])), on(xp, np.zeros(4, np.int64))
    for results in (
        cumoe.fused_topk(on(xp, logits), 2, **given),
        cumoe.grouped_topk(on(xp, logits), 2, num_expert_group=3, topk_group=2, **given),
        cumoe.hash_topk(on(xp, logits), input_ids, table, **given),
        cumoe.select_experts(None, on(xp, logits), 2, simulation_strategy="uniform_random", **given),
        cumoe.select_experts(None, on(xp, logits), 2, custom_routing_function=cumoe.llama4_routing, **given),
        cumoe.select_experts(None, on(xp, logits), 1, num_fused_shared_experts=1, **given),
    ):
        topk_weights, topk_ids = map(back, results)
        assert topk_ids.dtype == indices_dtype
        assert (topk_ids[is_padding] == np.array(-1).astype(indices_dtype)).all()
        assert (topk_weights[is_padding] == 0).all()
        assert (topk_ids[~is_padding] < 7).all() and (topk_weights[~is_padding] > 0).all()


def test_token_expert_indices_number_the_pairs_by_choice(xp):
    logits = on(xp, np.zeros((3, 5), np.float32))
    indices = cumoe.fused_topk(logits, 2, return_token_expert_indices=True)[2]
    assert_equal((indices,), (np.array([[0, 3], [1, 4], [2, 5]], np.int32),))


@given(problem=problems(max_experts=20))
def test_per_expert_scale_multiplies_the_weights(xp, problem):
    assume(problem.bias is not None and np.isfinite(problem.bias).all())
    scale = {"per_expert_scale": problem.bias}
    results = cumoe.fused_topk(on(xp, problem.logits), problem.top_k, per_expert_scale=on(xp, problem.bias))
    check_fused(xp, results, problem.logits, **scale)


# -- special experts, dense weights -----------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    indices_dtype=st.sampled_from(["int32", "int64", "uint32"]),
    zero_expert_type=st.sampled_from(["identity", "copy", "zero"]),
    masked_id=st.sampled_from([0, -1, 3]),
)
def test_zero_experts_equal_reference(xp, seed, sizes, dtype, indices_dtype, zero_expert_type, masked_id):
    num_tokens, top_k, hidden_size = sizes
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, hidden_size)).astype(dtype)
    signed = rng.integers(-1, 12, (num_tokens, top_k))
    weights = rng.random((num_tokens, top_k), np.float32)
    results = cumoe.zero_experts(
        on(xp, x),
        on(xp, weights),
        on(xp, signed.astype(indices_dtype)),
        8,
        zero_expert_type=zero_expert_type,
        masked_id=masked_id,
    )
    copies = zero_expert_type != "zero"
    left_weights, left_ids, out = special_experts.zero_experts(
        x, weights, signed, 8, copies=copies, masked_id=masked_id
    )
    assert_equal(results[:2], (left_weights, left_ids.astype(indices_dtype)))
    assert back(results[2]).dtype == x.dtype
    assert (np.abs(back(results[2]).astype(np.float64) - out.value) <= out.error).all()


def test_tokens_without_a_special_expert_add_zero_even_if_they_are_not_finite(xp):
    x = on(xp, np.array([[np.nan, np.inf]], np.float32))
    out = cumoe.zero_experts(x, on(xp, np.ones((1, 1), np.float32)), on(xp, np.array([[7]])), 8)[2]
    assert back(out).tolist() == [[0, 0]]


@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(0, 5),
    num_experts=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    poison=st.booleans(),
    data=st.data(),
)
def test_dense_weights_become_choices_and_come_back(xp, seed, num_tokens, num_experts, dtype, poison, data):
    rng = np.random.default_rng(seed)
    dense = rng.integers(-3, 4, (num_tokens, num_experts)).astype(dtype)
    if poison and dense.size:
        dense.flat[rng.integers(dense.size)] = np.nan
    top_k = data.draw(st.integers(1, num_experts))
    indices_dtype = data.draw(st.sampled_from(["int32", "int64", "uint32"]))
    topk_weights, topk_ids = cumoe.topk_from_dense(on(xp, dense), top_k, indices_dtype=indices_dtype)
    expected = dense_route.topk_from_dense(dense, top_k)
    assert_equal((topk_weights, topk_ids), (expected[0], expected[1].astype(indices_dtype)))
    table = cumoe.dense_from_topk(topk_weights, topk_ids, num_experts)
    assert_equal((table,), (dense_route.dense_from_topk(*expected, num_experts),))
    if top_k >= (dense != 0).sum(axis=1).max(initial=0):
        np.testing.assert_array_equal(back(table), dense.astype(np.float32))


def test_choosing_an_expert_twice_adds_its_weights(xp):
    weights, ids = np.array([[1, 2, 4, 8]], np.float32), np.array([[1, 1, -1, 3]])
    for dtype in DTYPES:
        table = cumoe.dense_from_topk(on(xp, weights.astype(dtype)), on(xp, ids), 3)
        assert_equal((table,), (np.array([[0, 3, 0]], np.float32),))


def test_shared_experts_come_last_with_their_weight(xp):
    weights, ids = np.array([[0.75, 0.25]], np.float32), np.array([[5, 2]], np.int32)
    results = cumoe.append_shared_experts(on(xp, weights), on(xp, ids), 8, 2, shared_expert_weight=0.5)
    assert_equal(results, (np.array([[0.75, 0.25, 0.5, 0.5]], np.float32), np.array([[5, 2, 8, 9]], np.int32)))
    unchanged = cumoe.append_shared_experts(on(xp, weights), on(xp, ids), 8, 0)
    assert_equal(unchanged, (weights, ids))


# -- simulated routing ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform_random", "normal_routing"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 7), (8, 3), (64, 6)])
def test_simulated_routing_is_valid_and_repeatable(xp, strategy, num_experts, top_k):
    first = cumoe.simulated_routing(strategy, 50, num_experts, top_k, rng=3, indices_dtype="int64", xp=xp)
    again = cumoe.simulated_routing(strategy, 50, num_experts, top_k, rng=3, indices_dtype="int64", xp=xp)
    topk_weights, topk_ids = map(back, first)
    assert_equal(again, (topk_weights, topk_ids))
    assert_valid_ids(topk_ids, num_experts)
    assert topk_ids.shape == (50, top_k) and topk_weights.dtype == np.float32
    total = top_k if strategy == "uniform_random" else 1
    np.testing.assert_allclose(topk_weights.sum(axis=1), total, rtol=1e-5)
    assert cumoe.simulated_routing(strategy, 0, num_experts, top_k)[1].shape == (0, top_k)


def test_simulated_routing_follows_its_law():
    num_tokens = 100_000
    share = {
        name: np.bincount(cumoe.simulated_routing(name, num_tokens, 8, 2, rng=0)[1][:, 0], minlength=8) / num_tokens
        for name in ("uniform_random", "normal_routing")
    }
    z = np.random.default_rng(1).standard_normal(num_tokens)
    normal = np.bincount((8 / (1 + np.exp(-z))).astype(int), minlength=8) / num_tokens
    deviation = np.sqrt(0.25 / num_tokens)  # of a share, at most
    assert np.abs(share["uniform_random"] - 1 / 8).max() < 5 * deviation
    assert np.abs(share["normal_routing"] - normal).max() < 5 * np.sqrt(2) * deviation


def test_simulated_routing_takes_any_function(xp):
    def round_robin(rng, num_tokens, num_experts, top_k):
        pairs = np.arange(num_tokens * top_k).reshape(num_tokens, top_k)
        return np.ones(pairs.shape), pairs % num_experts

    weights, ids = cumoe.simulated_routing(round_robin, 3, 4, 2, xp=xp)
    assert_equal((weights, ids), (np.ones((3, 2), np.float32), np.array([[0, 1], [2, 3], [0, 1]], np.int32)))


# -- one call for all -------------------------------------------------------------------------------


def test_select_experts_takes_the_first_that_is_asked_for(xp):
    rng = np.random.default_rng(0)
    logits, x = on(xp, make_logits(rng, 5, 8)), on(xp, make_logits(rng, 5, 3))
    bias = on(xp, make_bias(rng, 8))
    table, input_ids = on(xp, np.array([[6, 7]])), on(xp, np.zeros(5, np.int64))

    def custom(hidden_states, router_logits, top_k, renormalize):
        assert hidden_states is x and router_logits is logits and top_k == 2 and renormalize
        return xp.full((5, 2), 0.5, dtype="float64"), xp.full((5, 2), 4, dtype="int64")

    asked = {
        "simulated": {"simulation_strategy": "uniform_random", "rng": 1},
        "zero": {"zero_expert_type": "identity", "num_logical_experts": 6},
        "grouped": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
        "custom": {"custom_routing_function": custom},
        "hash": {"hash_indices_table": table, "input_ids": input_ids},
        "bias": {"e_score_correction_bias": bias},
        "plain": {},
    }
    raw = cumoe.fused_topk(logits, 2, e_score_correction_bias=bias)
    expected = {
        "simulated": cumoe.simulated_routing("uniform_random", 5, 8, 2, rng=1),
        "zero": cumoe.zero_experts(x, *raw, 6),
        "grouped": cumoe.grouped_topk(logits, 2, num_expert_group=4, topk_group=2, e_score_correction_bias=bias),
        "custom": (np.full((5, 2), 0.5, np.float32), np.full((5, 2), 4, np.int32)),
        "hash": cumoe.hash_topk(logits, input_ids, table, scoring_func="softmax"),
        "bias": raw,
        "plain": cumoe.fused_topk(logits, 2),
    }
    order = list(asked)
    for name in order:
        arguments = {}
        for later in reversed(order[order.index(name) :]):
            arguments |= asked[later]
        assert_equal(cumoe.select_experts(x, logits, 2, **arguments), [back(array) for array in expected[name]])


@pytest.mark.parametrize("num_expert_group", [3, 8, 16])
def test_groups_that_are_none_fall_to_plain_routing(xp, num_expert_group):
    logits = on(xp, make_logits(np.random.default_rng(0), 4, 8))
    results = cumoe.select_experts(
        None, logits, 3, use_grouped_topk=True, num_expert_group=num_expert_group, topk_group=1
    )
    assert_equal(results, [back(array) for array in cumoe.fused_topk(logits, 3)])


def test_llama4_weighs_by_the_sigmoid_of_the_chosen_logits(xp):
    logits = make_logits(np.random.default_rng(0), 6, 16, "bfloat16")
    results = cumoe.select_experts(None, on(xp, logits), 1, custom_routing_function=cumoe.llama4_routing)
    check_fused(xp, results, logits, scoring_func="sigmoid", renormalize=False)


def test_shared_experts_follow_the_routed_ones_that_have_weights(xp):
    logits, x = on(xp, np.array([[0, 1, 5, 9]], np.float32)), on(xp, np.ones((1, 2), np.float32))
    given = {"renormalize": False, "num_fused_shared_experts": 1, "shared_expert_weight": 0.25}
    assert back(cumoe.select_experts(x, logits, 2, **given)[1]).tolist() == [[3, 2, 4]]
    topk_weights, topk_ids, output = map(
        back, cumoe.select_experts(x, logits, 2, zero_expert_type="copy", num_logical_experts=3, **given)
    )
    assert topk_ids.tolist() == [[0, 2, 3]]
    assert topk_weights[0, 0] == 0 and topk_weights[0, 2] == 0.25
    np.testing.assert_allclose(output, 1 / (1 + np.exp(-4) + np.exp(-8) + np.exp(-9)), rtol=1e-6)
