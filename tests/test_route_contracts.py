"""Routing: layouts, libraries, threads and wrong calls."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing import DTYPES, SCORING, check_fused, check_grouped, make_bias, make_logits
from sides import assert_equal, back, on

import cumoe
from cumoe.cpu import scores


def every_router(xp, logits, bias, scoring_func="sigmoid"):
    """Call each function that computes from logits; (name, results)."""
    given = {"scoring_func": scoring_func, "e_score_correction_bias": bias}
    plain = {"scoring_func": scoring_func, "renormalize": False}
    table, input_ids = xp.asarray([[0, 2], [3, 1]]), xp.asarray(np.arange(len(logits)) % 2)
    groups = {"num_expert_group": 4, "topk_group": 2}
    return {
        "plain": cumoe.fused_topk(logits, 2, **plain),
        "bias": cumoe.fused_topk(logits, 3, **given),
        "grouped": cumoe.grouped_topk(logits, 2, **groups, **plain),
        "grouped_bias": cumoe.grouped_topk(logits, 2, **groups, **given),
        "hash": cumoe.hash_topk(logits, input_ids, table, scoring_func=scoring_func),
        "dense": cumoe.topk_from_dense(logits, 3),
    }


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, arrays in results.items():
        assert_equal(arrays, [back(array) for array in expected[name]])


# -- bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring_func", SCORING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_batch(xp, scoring_func, dtype):
    rng = np.random.default_rng(0)
    logits, bias = make_logits(rng, 600, 64, dtype), make_bias(rng, 64)  # enough rows for all threads
    whole = every_router(xp, on(xp, logits), on(xp, bias), scoring_func)
    for rows in (slice(0, 2), slice(298, 300), slice(598, 600)):
        alone = every_router(xp, on(xp, logits[rows]), on(xp, bias), scoring_func)
        assert_same(alone, {name: [array[rows] for array in arrays] for name, arrays in whole.items()})


@pytest.mark.parametrize("scoring_func", SCORING)
def test_many_tokens_equal_reference(xp, scoring_func):
    rng = np.random.default_rng(1)
    logits, bias = make_logits(rng, 600, 64), make_bias(rng, 64)
    results = every_router(xp, on(xp, logits), on(xp, bias), scoring_func)
    plain = {"scoring_func": scoring_func, "renormalize": False}
    groups = {"num_expert_group": 4, "topk_group": 2}
    check_fused(xp, results["plain"], logits, **plain)
    check_fused(xp, results["bias"], logits, bias=bias, scoring_func=scoring_func)
    check_grouped(xp, results["grouped"], logits, **groups, **plain)
    decided = check_grouped(xp, results["grouped_bias"], logits, bias=bias, **groups, scoring_func=scoring_func)
    assert decided.mean() > 0.99


def test_the_number_of_threads_changes_no_bit():
    rng = np.random.default_rng(2)
    logits, bias = make_logits(rng, 600, 64), make_bias(rng, 64)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = every_router(np, logits, bias)
    finally:
        numba.set_num_threads(before)
    assert_same(every_router(np, logits, bias), one)


@given(seed=st.integers(0, 1000))
def test_permuting_experts_permutes_ids(xp, seed):
    rng = np.random.default_rng(seed)
    logits = make_logits(rng, 5, 24)  # without ties
    order = rng.permutation(24)
    weights, ids = map(back, cumoe.fused_topk(on(xp, logits), 4))
    moved_weights, moved_ids = map(back, cumoe.fused_topk(on(xp, logits[:, order]), 4))
    np.testing.assert_array_equal(order[moved_ids], ids)
    np.testing.assert_array_equal(moved_weights, weights)


# -- layouts and libraries --------------------------------------------------------------------------


def test_any_layout_gives_the_same(xp):
    rng = np.random.default_rng(3)
    logits, bias = make_logits(rng, 6, 8), make_bias(rng, 8)
    expected = every_router(xp, on(xp, logits), on(xp, bias))
    turned = on(xp, np.asfortranarray(logits))
    spread, spread_bias = on(xp, np.repeat(logits, 2, axis=1))[:, ::2], on(xp, np.repeat(bias, 3))[::3]
    backward = on(xp, logits[::-1].copy())[::-1]
    for other, other_bias in ((turned, on(xp, bias)), (spread, spread_bias), (backward, spread_bias)):
        assert_same(every_router(xp, other, other_bias), expected)


def test_inputs_may_be_read_only_and_are_not_written():
    rng = np.random.default_rng(4)
    logits, bias = make_logits(rng, 6, 8), make_bias(rng, 8)
    expected = every_router(np, logits, bias)
    kept = logits.copy(), bias.copy()
    logits.flags.writeable = bias.flags.writeable = False
    assert_same(every_router(np, logits, bias), expected)
    assert_equal((logits, bias), kept)
    weights, ids = expected["plain"]
    frozen = [array.copy() for array in (logits, weights, ids)]
    for array in frozen:
        array.flags.writeable = False
    left_weights, left_ids, _ = cumoe.zero_experts(*frozen, 4)
    assert left_weights.flags.writeable and left_ids.flags.writeable
    cumoe.append_shared_experts(*frozen[1:], 8, 1)
    cumoe.dense_from_topk(*frozen[1:], 8)
    assert_equal(frozen, (logits, weights, ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_come_back_as_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    logits, bias = make_logits(rng, 6, 8, dtype), make_bias(rng, 8)
    tensor, tensor_bias = torch.tensor(logits.astype(np.float32)).to(getattr(torch, dtype)), torch.tensor(bias)
    expected, results = every_router(np, logits, bias), every_router(torch, tensor, tensor_bias)
    for name, tensors in results.items():
        assert all(isinstance(one, torch.Tensor) for one in tensors)
        assert_equal([one.numpy() for one in tensors], expected[name])
    ids = cumoe.fused_topk(tensor, 2, indices_dtype="uint32", is_padding=torch.ones(6, dtype=torch.bool))[1]
    assert ids.dtype == torch.uint32 and (ids.numpy() == 2**32 - 1).all()


def test_a_custom_function_sees_the_tensors_of_the_caller():
    torch = pytest.importorskip("torch")
    logits, x = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 3)
    seen = []

    def custom(hidden_states, router_logits, top_k, renormalize):
        seen.extend([hidden_states, router_logits])
        return torch.topk(router_logits.sigmoid(), top_k)

    topk_weights, topk_ids = cumoe.select_experts(x, logits, 2, custom_routing_function=custom)
    assert seen[0] is x and seen[1] is logits
    wanted = torch.topk(logits.sigmoid(), 2)
    assert topk_ids.dtype == torch.int32 and torch.equal(topk_ids.long(), wanted.indices)
    assert topk_weights.dtype == torch.float32 and torch.equal(topk_weights, wanted.values.float())


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_the_smallest_problems(xp, num_tokens):
    logits = on(xp, np.zeros((num_tokens, 1), np.float32))
    one = np.ones((num_tokens, 1), np.float32), np.zeros((num_tokens, 1), np.int32)
    assert_equal(cumoe.fused_topk(logits, 1), one)
    assert_equal(cumoe.grouped_topk(logits, 1, num_expert_group=1, topk_group=1), one)
    assert_equal(cumoe.hash_topk(logits, on(xp, np.zeros(num_tokens, np.int32)), on(xp, np.zeros((1, 1), int))), one)
    assert_equal(cumoe.topk_from_dense(on(xp, one[0]), 1), one)
    assert_equal((cumoe.dense_from_topk(*(on(xp, array) for array in one), 1),), one[:1])
    x = on(xp, np.zeros((num_tokens, 0), np.float32))
    assert_equal(cumoe.zero_experts(x, *(on(xp, array) for array in one), 1), (*one, back(x)))


# -- the arithmetic of the CPU side -----------------------------------------------------------------


def test_log1p_is_accurate():
    x = np.concatenate([np.geomspace(1e-42, 3e38, 20_001), np.linspace(0, 30, 20_001)]).astype(np.float32)
    got = np.array([scores.log1p(one) for one in x], np.float64)
    exact = np.log1p(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(got - exact) <= 1.7 * ulp).all()


@pytest.mark.parametrize("scoring", scores.CODES.values())
def test_a_score_has_the_same_bits_alone_and_in_a_row(scoring):
    x = np.concatenate([np.linspace(-110, 30, 1003), [0, -0.0, np.inf, -np.inf, np.nan, 1e-40]]).astype(np.float32)
    row, top = np.empty_like(x), np.float32(30)
    scores.score_row(x, top, scoring, row)
    alone = np.array([scores.score(one, top, scoring) for one in x], np.float32)
    np.testing.assert_array_equal(row.view(np.uint32), alone.view(np.uint32))


# -- wrong calls ------------------------------------------------------------------------------------

LOGITS = np.zeros((3, 8), np.float32)
BIAS = np.zeros(8, np.float32)
WEIGHTS, IDS = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int32)
GROUPS = {"num_expert_group": 4, "topk_group": 2}
FLOATS = "float32, float16 or bfloat16"
INTEGERS = "int32, int64 or uint32"

WRONG = [
    (
        lambda: cumoe.fused_topk([[1.0]], 1),
        TypeError,
        "router_logits must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    (lambda: cumoe.fused_topk(BIAS, 1), ValueError, "router_logits must have 2 axes (T, E), got shape (8,)"),
    (lambda: cumoe.fused_topk(LOGITS.astype(float), 1), TypeError, f"router_logits must be {FLOATS}, got float64"),
    (lambda: cumoe.fused_topk(LOGITS[:, :0], 1), ValueError, "router_logits.shape[1] must be in 1..2147483647, got 0"),
    (lambda: cumoe.fused_topk(LOGITS, 0), ValueError, "top_k must be in 1..8, got 0"),
    (lambda: cumoe.fused_topk(LOGITS, 9), ValueError, "top_k must be in 1..8, got 9"),
    (lambda: cumoe.fused_topk(LOGITS, 2.0), TypeError, "top_k must be an int, got float"),
    (lambda: cumoe.fused_topk(LOGITS, True), TypeError, "top_k must be an int, got bool"),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, scoring_func="relu"),
        ValueError,
        "scoring_func must be softmax, sigmoid or sqrtsoftplus, got 'relu'",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, e_score_correction_bias=BIAS[:7]),
        ValueError,
        "e_score_correction_bias must have shape (E,) = (8,), got (7,)",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, e_score_correction_bias=BIAS.astype(int)),
        TypeError,
        f"e_score_correction_bias must be {FLOATS}, got int64",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, routed_scaling_factor="2"),
        TypeError,
        "routed_scaling_factor must be a number, got str",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, indices_dtype="int16"),
        ValueError,
        f"indices_dtype must be {INTEGERS}, got 'int16'",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, is_padding=np.zeros(4, bool)),
        ValueError,
        "is_padding must have shape (T,) = (3,), got (4,)",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, is_padding=np.zeros(3, np.int8)),
        TypeError,
        "is_padding must be bool, got int8",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, bias_vl=BIAS),
        ValueError,
        "image_sentinel_lo must be given with bias_vl, got None",
    ),
    (
        lambda: cumoe.fused_topk(LOGITS, 1, bias_vl=BIAS, image_sentinel_lo=1),
        ValueError,
        "input_ids must be given with bias_vl, got None",
    ),
    (
        lambda: cumoe.hash_topk(LOGITS, np.zeros(2, int), IDS),
        ValueError,
        "input_ids must have shape (T,) = (3,), got (2,)",
    ),
    (
        lambda: cumoe.hash_topk(LOGITS, np.zeros(3), IDS),
        TypeError,
        f"input_ids must be {INTEGERS}, got float64",
    ),
    (
        lambda: cumoe.hash_topk(LOGITS, np.zeros(3, int), IDS[0]),
        ValueError,
        "hash_indices_table must have 2 axes (V, k), got shape (2,)",
    ),
    (
        lambda: cumoe.hash_topk(LOGITS, np.zeros(3, int), WEIGHTS),
        TypeError,
        f"hash_indices_table must be {INTEGERS}, got float32",
    ),
    (
        lambda: cumoe.hash_topk(LOGITS[:, :1], np.zeros(3, int), IDS),
        ValueError,
        "hash_indices_table.shape[1] must be in 1..1, got 2",
    ),
    (
        lambda: cumoe.grouped_topk(LOGITS, 1, num_expert_group=3, topk_group=1),
        ValueError,
        "num_expert_group must divide E = 8, got 3",
    ),
    (
        lambda: cumoe.grouped_topk(LOGITS, 1, num_expert_group=4, topk_group=5),
        ValueError,
        "topk_group must be in 1..4, got 5",
    ),
    (lambda: cumoe.grouped_topk(LOGITS, 5, **GROUPS), ValueError, "top_k must be in 1..4, got 5"),
    (
        lambda: cumoe.select_experts(LOGITS[:2], LOGITS, 1),
        ValueError,
        "hidden_states must have shape (T, H) = (3, H), got (2, 8)",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 1, use_grouped_topk=True, topk_group=1),
        ValueError,
        "num_expert_group must be given with use_grouped_topk, got None",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 1, zero_expert_type="copy"),
        ValueError,
        "hidden_states must be given with zero_expert_type, got None",
    ),
    (
        lambda: cumoe.select_experts(LOGITS, LOGITS, 1, zero_expert_type="copy"),
        ValueError,
        "num_logical_experts must be given with zero_expert_type, got None",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 2, hash_indices_table=IDS),
        ValueError,
        "input_ids must be given with hash_indices_table, got None",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 3, hash_indices_table=IDS, input_ids=np.zeros(3, int)),
        ValueError,
        "hash_indices_table must have shape (V, k) = (3, 3), got (3, 2)",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 1, custom_routing_function=max, routed_scaling_factor=2.5),
        ValueError,
        "routed_scaling_factor must be 1 with custom_routing_function, got 2.5; scale inside the function",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 1, custom_routing_function=lambda *_: (WEIGHTS, IDS)),
        ValueError,
        "topk_weights of custom_routing_function must have shape (T, k) = (3, 1), got (3, 2)",
    ),
    (
        lambda: cumoe.select_experts(None, LOGITS, 2, custom_routing_function=lambda *_: (WEIGHTS, WEIGHTS)),
        TypeError,
        f"topk_ids of custom_routing_function must be {INTEGERS}, got float32",
    ),
    (
        lambda: cumoe.simulated_routing("zipf", 1, 2, 1),
        ValueError,
        "strategy must be uniform_random or normal_routing, got 'zipf'",
    ),
    (lambda: cumoe.simulated_routing("uniform_random", 1, 2, 3), ValueError, "top_k must be in 1..2, got 3"),
    (
        lambda: cumoe.simulated_routing(lambda *_: (WEIGHTS, IDS), 2, 2, 1),
        ValueError,
        "weights of the strategy must have shape (T, k) = (2, 1), got (3, 2)",
    ),
    (
        lambda: cumoe.zero_experts(LOGITS, WEIGHTS, IDS, 8, zero_expert_type="constant"),
        ValueError,
        "zero_expert_type must be identity, copy or zero, got 'constant'",
    ),
    (
        lambda: cumoe.zero_experts(LOGITS[:2], WEIGHTS, IDS, 8),
        ValueError,
        "topk_ids must have shape (T, k) = (2, 2), got (3, 2)",
    ),
    (
        lambda: cumoe.zero_experts(LOGITS, WEIGHTS.astype(np.float16), IDS, 8),
        TypeError,
        "topk_weights must be float32, got float16",
    ),
    (
        lambda: cumoe.append_shared_experts(WEIGHTS[:, :1], IDS, 8, 1),
        ValueError,
        "topk_weights must have shape (T, k) = (3, 2), got (3, 1)",
    ),
    (
        lambda: cumoe.append_shared_experts(WEIGHTS, IDS, 8, -1),
        ValueError,
        "num_fused_shared_experts must be >= 0, got -1",
    ),
    (lambda: cumoe.topk_from_dense(LOGITS, 9), ValueError, "top_k must be in 1..8, got 9"),
    (lambda: cumoe.dense_from_topk(WEIGHTS, IDS, 0), ValueError, "num_experts must be in 1..2147483647, got 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message[:60] for *_, message in WRONG])
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_arrays_of_two_libraries_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError) as caught:
        cumoe.fused_topk(LOGITS, 1, e_score_correction_bias=torch.zeros(8))
    assert str(caught.value) == (
        "arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, "
        "got router_logits: numpy, e_score_correction_bias: torch"
    )
