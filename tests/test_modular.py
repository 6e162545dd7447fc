"""Layers in three steps: tokens to their experts, both products, results back."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import rank_of, ready, routed
from strategies import make_problem, problems
from test_moe import assert_within, law

import cumoe
from cumoe import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEParallelConfig
from cumoe.method import (
    BatchedExperts,
    BatchedPrepareAndFinalize,
    ExpertTokensMetadata,
    MoEPrepareAndFinalizeNoEP,
    StandardExperts,
)

STANDARD, BATCHED = "allgather_reducescatter", "deepep_low_latency"


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def exchanging(rank, ranks=2, backend=BATCHED):
    """Parallel config of a rank that exchanges tokens with others."""
    return FusedMoEParallelConfig.make(1, ranks, enable_expert_parallel=True, dp_rank=rank, all2all_backend=backend)


# -- which object is made ---------------------------------------------------------------------------


def test_no_outer_steps_without_exchange():
    for parallel in (FusedMoEParallelConfig.make(), FusedMoEParallelConfig.make(2, enable_expert_parallel=True)):
        problem = make_problem(2, 2, 4, 8, 16)
        method, _ = ready(problem, moe_parallel_config=parallel)
        assert method.maybe_make_prepare_finalize() is None
        assert method.prepare_finalize is method.experts is None


@pytest.mark.parametrize(
    ("backend", "outer", "inner"),
    [
        (STANDARD, MoEPrepareAndFinalizeNoEP, StandardExperts),
        ("passthrough", MoEPrepareAndFinalizeNoEP, StandardExperts),
        (BATCHED, BatchedPrepareAndFinalize, BatchedExperts),
        ("nixl_ep", BatchedPrepareAndFinalize, BatchedExperts),
    ],
)
def test_the_exchange_decides_the_format(backend, outer, inner):
    problem = make_problem(2, 2, 4, 8, 16)
    method, layer = ready(problem, moe_parallel_config=exchanging(1, 2, backend), num_experts=8, max_num_tokens=5)
    made = method.maybe_make_prepare_finalize()
    assert type(made) is type(method.prepare_finalize) is outer
    experts = method.select_gemm_impl(made, layer)
    assert type(experts) is type(method.experts) is inner
    assert made.activation_format is experts.activation_format
    assert experts.quant_config is method.moe_quant_config
    assert made.topk_indices_dtype() is None and method.topk_indices_dtype is None
    assert made.output_is_reduced() is False
    if outer is BatchedPrepareAndFinalize:
        assert (made.num_dispatchers(), made.max_num_tokens_per_rank()) == (2, 5)
        assert (experts.num_dispatchers, experts.max_num_tokens) == (2, 5)
        assert not experts.supports_expert_map() and experts.finalize_weight_and_reduce_impl() == "delegate"
    else:
        assert (made.num_dispatchers(), made.max_num_tokens_per_rank()) == (1, None)
        assert experts.supports_expert_map() and experts.finalize_weight_and_reduce_impl() == "noop"


def test_experts_need_processed_weights():
    method, layer = ready(make_problem(1, 2, 4, 8, 16))
    method.moe_quant_config = None
    with raises(ValueError, "moe_quant_config must be set, got None; call process_weights_after_loading first"):
        method.select_gemm_impl(MoEPrepareAndFinalizeNoEP(), layer)


# -- workspaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "rows", "standard", "batched"),
    [
        ("silu", 96, ((5, 2, 64), (5, 2, 96), (5, 64)), ((4, 14, 96), (4, 14, 48), (4, 14, 64))),
        ("silu", 256, ((5, 2, 128), (5, 2, 256), (5, 64)), ((4, 14, 256), (4, 14, 128), (4, 14, 64))),
        ("silu_no_mul", 48, ((5, 2, 64), (5, 2, 64), (5, 64)), ((4, 14, 64), (4, 14, 48), (4, 14, 64))),
        ("relu2_no_mul", 128, ((5, 2, 128), (5, 2, 128), (5, 64)), ((4, 14, 128), (4, 14, 128), (4, 14, 64))),
    ],
)
def test_workspace_shapes(activation, rows, standard, batched):
    sizes = {"num_tokens": 5, "w1_rows": rows, "hidden_size": 64, "top_k": 2}
    experts = {"global_num_experts": 8, "local_num_experts": 4, "activation": activation}
    assert StandardExperts(FUSED_MOE_UNQUANTIZED_CONFIG).workspace_shapes(**sizes, **experts) == standard
    assert BatchedExperts(7, 2, FUSED_MOE_UNQUANTIZED_CONFIG).workspace_shapes(**sizes, **experts) == batched


# -- the steps together -----------------------------------------------------------------------------


@given(problem=problems(activations=("silu", "swigluoai", "gelu_no_mul")))
def test_standard_steps_give_the_bits_of_the_plain_layer(problem):
    plain, layer = ready(problem)
    stepped, stepped_layer = ready(problem, moe_parallel_config=exchanging(0, backend=STANDARD))
    expected = plain.apply(layer, *routed(problem), expert_map=problem.expert_map)
    out = np.empty_like(expected)
    assert stepped.apply(stepped_layer, *routed(problem), expert_map=problem.expert_map, out=out) is out
    assert out.tobytes() == expected.tobytes()


@given(problem=problems(activations=("silu", "swigluoai", "gelu_no_mul")))
def test_batched_steps_equal_reference(problem):
    method, layer = ready(problem, moe_parallel_config=exchanging(0), max_num_tokens=20)
    num_local, num_global = len(problem.w1), method.moe.num_experts
    expert_map = problem.expert_map
    if expert_map is None and num_local == num_global:
        expert_map = np.arange(num_global, dtype=np.int32)
    out = method.apply(layer, *routed(problem), expert_map=expert_map)
    assert_within(out, law(problem))


@given(problem=problems(dtypes=("float32",), activations=("silu",)))
def test_batched_steps_in_float32_give_the_bits_of_the_plain_layer(problem):
    # float32 results are not rounded between the second product and the weight
    plain, layer = ready(problem)
    stepped, stepped_layer = ready(problem, moe_parallel_config=exchanging(0), max_num_tokens=20)
    expert_map = problem.expert_map
    if expert_map is None:
        expert_map = np.arange(len(problem.w1), dtype=np.int32)
    expected = plain.apply(layer, *routed(problem), expert_map=expert_map)
    out = stepped.apply(stepped_layer, *routed(problem), expert_map=expert_map)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("backend", [STANDARD, BATCHED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_on_the_input(backend, dtype):
    problem = make_problem(9, 1, 4, 33, 20, dtype, bias=True)
    problem = problem._replace(topk_weights=np.linspace(0.1, 2, 9, dtype=np.float32)[:, None])
    plain, layer = ready(problem)
    expected = plain.apply(layer, *routed(problem), apply_router_weight_on_input=True)
    stepped, layer = ready(problem, num_experts=8, moe_parallel_config=exchanging(0, backend=backend))
    expert_map = np.array([0, 1, 2, 3, -1, -1, -1, -1], np.int32)
    for mode in (True, "hidden_states"):
        out = stepped.apply(layer, *routed(problem), apply_router_weight_on_input=mode, expert_map=expert_map)
        assert out.tobytes() == expected.tobytes()


def test_weights_on_the_input_need_one_choice():
    problem = make_problem(9, 2, 4, 33, 20)
    method, layer = ready(problem, moe_parallel_config=exchanging(0))
    message = "topk_weights must have shape (T, 1) = (9, 1) with apply_router_weight_on_input, got (9, 2)"
    with raises(ValueError, message):
        method.apply(layer, *routed(problem), apply_router_weight_on_input=True)
    message = "no modular layer with apply_router_weight_on_input='accumulator'; available: False, 'hidden_states'"
    with raises(NotImplementedError, message):
        method.apply(layer, *routed(problem), apply_router_weight_on_input="accumulator")


@settings(max_examples=10)
@given(
    num_experts=st.integers(1, 9),
    ranks=st.integers(2, 4),
    backend=st.sampled_from((STANDARD, BATCHED)),
    placement=st.sampled_from(("linear", "round_robin")),
    id_dtype=st.sampled_from((np.int32, np.int64, np.uint32)),
    seed=st.integers(0, 99),
)
def test_parts_of_all_ranks_sum_to_the_whole(num_experts, ranks, backend, placement, id_dtype, seed):
    problem = make_problem(7, 1, num_experts, 24, 12, bias=True, seed=seed)
    problem = problem._replace(topk_ids=problem.topk_ids.astype(id_dtype))
    total = np.zeros_like(problem.hidden_states)
    for rank in range(ranks):
        parallel = exchanging(rank, ranks, backend)
        method, layer, expert_map = rank_of(problem, ranks, rank, placement, moe_parallel_config=parallel)
        if backend == BATCHED:  # the placement is known without a map
            if placement == "round_robin":
                layer.expert_routing_tables = cumoe.round_robin_routing_tables(ranks, rank, num_experts)
                method.process_weights_after_loading(layer)
            total += method.apply(layer, *routed(problem))
        else:
            total += method.apply(layer, *routed(problem), expert_map=expert_map)
    whole, layer = ready(problem)
    # k = 1: every token has one owner, the others add zero
    np.testing.assert_array_equal(total, whole.apply(layer, *routed(problem)))


def test_tensors_go_through_the_steps():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make_problem(7, 2, 4, 33, 20, bias=True)
    for backend in (STANDARD, BATCHED):
        method, layer = ready(problem, moe_parallel_config=exchanging(0, backend=backend))
        expected = method.apply(layer, *routed(problem))
        tensors = [torch.from_numpy(array) for array in routed(problem)]
        out = method.apply(layer, *tensors)
        assert isinstance(out, torch.Tensor) and out.numpy().tobytes() == expected.tobytes()
        target = torch.full_like(out, torch.nan)
        method.apply(layer, *tensors, out=target)
        assert torch.equal(target, out)


# -- the steps by themselves ------------------------------------------------------------------------


def some_experts():
    problem = make_problem(6, 2, 3, 16, 8, bias=True)
    config = cumoe.biased_moe_quant_config(problem.w1_bias, problem.w2_bias)
    return problem, config, cumoe.prepare(problem.w1, problem.w2, quant_config=config)


@pytest.mark.parametrize("prepared", [False, True])
def test_standard_experts_alone(prepared):
    problem, config, packed = some_experts()
    out = np.full_like(problem.hidden_states, np.nan)
    weights = (packed, None) if prepared else (problem.w1, problem.w2)
    StandardExperts(config).apply(out, problem.hidden_states, *weights, problem.topk_weights, problem.topk_ids)
    assert_within(out, law(problem))


@pytest.mark.parametrize("prepared", [False, True])
def test_batched_experts_read_used_slots_only(prepared):
    problem, config, packed = some_experts()
    x = np.full((3, 5, 16), np.nan, np.float32)
    counts = np.array([2, 0, 5], np.int32)
    rows = np.random.default_rng(0).standard_normal((7, 16), np.float32)
    x[0, :2], x[2] = rows[:2], rows[2:]
    out = np.full_like(x, np.nan)
    weights = (packed, None) if prepared else (problem.w1, problem.w2)
    experts = BatchedExperts(5, 1, config)
    experts.apply(
        out, x, *weights, None, None, expert_tokens_meta=ExpertTokensMetadata(counts), check=True, workspace_limit=4000
    )
    one = problem._replace(
        hidden_states=rows,
        topk_weights=np.ones((7, 1), np.float32),
        topk_ids=np.array([[0]] * 2 + [[2]] * 5, np.int32),
    )
    assert_within(np.concatenate([out[0, :2], out[2]]), law(one))
    assert not out[0, 2:].any() and not out[1].any()


def test_batched_steps_say_what_they_need():
    _, config, packed = some_experts()
    x, out = np.zeros((3, 5, 16), np.float32), np.zeros((3, 5, 16), np.float32)
    experts = BatchedExperts(5, 1, config)
    with raises(ValueError, "expert_tokens_meta must be given for the batched format, got None"):
        experts.apply(out, x, packed, None, None, None)
    counts = ExpertTokensMetadata(np.array([2, 0, 6], np.int32))
    with raises(ValueError, "expert_num_tokens must be in 0..5, got [2, 0, 6]"):
        experts.apply(out, x, packed, None, None, None, expert_tokens_meta=counts, check=True)
    with raises(ValueError, "rows of hidden_states must be in 0..4, got 5"):
        BatchedExperts(2, 2, config).apply(out, x, packed, None, None, None, expert_tokens_meta=counts)
    with raises(ValueError, "expert_num_tokens must have shape (E_l,) = (3,), got (2,)"):
        short = ExpertTokensMetadata(np.zeros(2, np.int32))
        experts.apply(out, x, packed, None, None, None, expert_tokens_meta=short)
    with raises(ValueError, "max_num_tokens must be >= 1, got 0"):
        BatchedExperts(0, 1, config)
    for name in ("a1q_scale", "a2_scale"):
        message = (
            f"no kernel for activations that come quantised ({name} is given); available: None, "
            "the experts quantise them as quant_config says"
        )
        for one in (experts, StandardExperts(config)):
            with raises(NotImplementedError, message):
                one.apply(out, x, packed, None, None, None, **{name: np.ones(1, np.float32)})


def test_outer_steps_say_what_they_cannot_do():
    problem = make_problem(6, 2, 4, 16, 8)
    with raises(ValueError, "a1 must have at most max_num_tokens * num_dispatchers = 4 tokens, got 6"):
        BatchedPrepareAndFinalize(2, 4, 2).prepare(*routed(problem), 4, None, False, FUSED_MOE_UNQUANTIZED_CONFIG)
    outer = BatchedPrepareAndFinalize(6, 4)
    with raises(ValueError, "weight_and_reduce_impl must be delegate or naive_batched, got 'noop'"):
        outer.finalize(None, np.zeros((4, 6, 16), np.float32), problem.topk_weights, problem.topk_ids, False, "noop")


def test_prepare_gives_the_protocol():
    problem = make_problem(6, 2, 4, 16, 8)
    x, weights, ids = routed(problem)
    config = FUSED_MOE_UNQUANTIZED_CONFIG
    a1, scale, meta, new_ids, new_weights = MoEPrepareAndFinalizeNoEP().prepare(x, weights, ids, 4, None, False, config)
    assert a1 is x and scale is meta is new_ids is new_weights is None
    outer = BatchedPrepareAndFinalize(4, 2, num_dispatchers=2, first_expert=1)
    a1, scale, meta, new_ids, new_weights = outer.prepare(x, weights, ids, 4, None, False, config)
    assert a1.shape == (2, 8, 16) and scale is new_weights is None
    np.testing.assert_array_equal(new_ids, np.where((ids == 1) | (ids == 2), ids - 1, -1))
    np.testing.assert_array_equal(meta.expert_num_tokens, [(ids == 1).sum(), (ids == 2).sum()])
    for expert in range(2):
        np.testing.assert_array_equal(a1[expert, : (new_ids == expert).sum()], x[(new_ids == expert).any(axis=1)])


def test_tokens_stay_as_they_are_for_experts_that_quantise():
    problem = make_problem(6, 2, 4, 16, 8)
    quantised = cumoe.FusedMoEQuantConfig.make("int8")
    for outer in (MoEPrepareAndFinalizeNoEP(), BatchedPrepareAndFinalize(6, 4)):
        plain = outer.prepare(*routed(problem), 4, None, False, FUSED_MOE_UNQUANTIZED_CONFIG)[0]
        a1, scale, *_ = outer.prepare(*routed(problem), 4, None, False, quantised)
        assert scale is None and a1.dtype == problem.hidden_states.dtype
        np.testing.assert_array_equal(a1, plain)


def test_contiguous_rows_are_weighted_and_added_by_finalize():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 16), np.float32)
    weights, ids = rng.random((6, 2), np.float32), np.array([[0, -1]] * 6)
    outer = MoEPrepareAndFinalizeNoEP()
    for impl in ("delegate", "contiguous"):
        out = outer.finalize(None, rows, weights, ids, False, impl)
        np.testing.assert_array_equal(out, rows[::2] * weights[:, :1])
    np.testing.assert_array_equal(outer.finalize(None, rows, weights, ids, True, "delegate"), rows[::2])
    summed = np.full((6, 16), np.nan, np.float32)
    assert outer.finalize(summed, rows[:6], weights, ids, False, "noop") is summed
    np.testing.assert_array_equal(summed, rows[:6])
