"""Running a layer through its method: routed or not, on one rank or several."""

import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import rank_of, ready, routed
from sides import back, device_of, on
from strategies import make_problem, problems
from test_moe import assert_within, law

import cumoe


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# -- running ----------------------------------------------------------------------------------------


@given(problem=problems())
def test_apply_equals_reference(xp, problem):
    method, layer = ready(problem, xp)
    out = method.apply(layer, *routed(problem, xp), expert_map=on(xp, problem.expert_map))
    assert_within(back(out), law(problem))


@given(problem=problems(activations=("silu",)), on_input=st.sampled_from((True, "accumulator")))
def test_apply_takes_what_the_layer_says(xp, problem, on_input):
    method, layer = ready(problem, xp)
    options = {"apply_router_weight_on_input": on_input, "expert_map": on(xp, problem.expert_map)}
    expected = method.apply(layer, *routed(problem, xp), **options, global_num_experts=method.moe.num_experts)
    for name, value in options.items():
        setattr(layer, name, value)
    layer.global_num_experts = -1
    assert method.apply(layer, *routed(problem, xp)).tobytes() == expected.tobytes()
    assert_within(back(expected), law(problem, apply_router_weight_on_input=on_input))


def test_results_go_where_they_are_asked_to(xp):
    problem = make_problem(7, 2, 4, 33, 20, "bfloat16")
    method, layer = ready(problem, xp)
    x, weights, ids = routed(problem, xp)
    expected = method.apply(layer, x, weights, ids)
    out = xp.empty(x.shape, x.dtype)
    assert method.apply(layer, x, weights, ids, out=out) is out and out.tobytes() == expected.tobytes()
    x = x.copy()
    assert method.apply(layer, x, weights, ids, inplace=True) is x and x.tobytes() == expected.tobytes()
    x = on(xp, problem.hidden_states)
    pieces = method.apply(layer, x, weights, ids, workspace_limit=4000, activation="silu")
    assert pieces.tobytes() == expected.tobytes()
    workspace = xp.empty(cumoe.plan(7, 33, 20, 4, 2, device=device_of(xp)).workspace_bytes, np.uint8)
    assert method.apply(layer, x, weights, ids, workspace=workspace).tobytes() == expected.tobytes()


def test_wrong_calls_are_named():
    problem = make_problem(3, 2, 4, 8, 16)
    method, layer = ready(problem)
    x, weights, ids = routed(problem)
    with raises(ValueError, "activation must be that of the config = 'silu', got 'gelu'"):
        method.apply(layer, x, weights, ids, activation="gelu")
    with raises(ValueError, "out must be None with inplace=True, got ndarray"):
        method.apply(layer, x, weights, ids, inplace=True, out=np.empty_like(x))
    frozen = x.copy()
    frozen.flags.writeable = False
    with raises(ValueError, "x must be writeable, got a read-only array; pass a copy"):
        method.apply(layer, frozen, weights, ids, inplace=True)
    assert frozen.tobytes() == x.tobytes()
    with pytest.raises(ValueError, match=r"^topk_ids must be in 0\.\.3, or -1 to skip, got 4 for token 0, choice 1$"):
        method.apply(layer, x, weights, np.array([[0, 4]] * 3), check=True)


def test_tensors_go_in_and_out():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make_problem(7, 2, 4, 33, 20, "bfloat16", bias=True)
    method, layer = ready(problem)
    expected = method.apply(layer, *routed(problem))
    x = torch.from_numpy(problem.hidden_states.view(np.int16)).view(torch.bfloat16)
    weights, ids = torch.from_numpy(problem.topk_weights), torch.from_numpy(problem.topk_ids)
    out = method.apply(layer, x, weights, ids)
    assert out.dtype is torch.bfloat16 and out.view(torch.int16).numpy().tobytes() == expected.tobytes()
    tokens = x.clone()
    assert method.apply(layer, tokens, weights, ids, inplace=True) is tokens and torch.equal(tokens, out)
    tensors = types.SimpleNamespace(
        **{
            name: torch.from_numpy(getattr(layer, name).view(np.int16)).view(torch.bfloat16)
            for name in ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
        }
    )
    method.process_weights_after_loading(tensors)
    assert torch.equal(method.apply(tensors, x, weights, ids), out)


# -- routing inside ---------------------------------------------------------------------------------


def logits_for(problem, seed=3):
    shape = len(problem.hidden_states), problem.w1.shape[0]
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


ROUTING = {
    "plain": {},
    "no renormalize": {"renormalize": False, "routed_scaling_factor": 2.5},
    "sigmoid, bias": {"scoring_func": "sigmoid", "e_score_correction_bias": np.linspace(-1, 1, 8, dtype=np.float32)},
    "grouped": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "custom": {"custom_routing_function": cumoe.llama4_routing},
}


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("by_layer", [False, True])
def test_monolithic_is_routing_and_apply(xp, routing, by_layer):
    problem = make_problem(9, 2, 8, 24, 16, "bfloat16")
    method, layer = ready(problem, xp)
    x, logits, options = on(xp, problem.hidden_states), on(xp, logits_for(problem)), ROUTING[routing] | {"top_k": 3}
    options = {name: on(xp, value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    weights, ids = cumoe.select_experts(x, logits, **options)
    assert ids.shape == (9, 3)
    expected = method.apply(layer, x, weights, ids)
    if by_layer:
        for name, value in options.items():
            setattr(layer, name, value)
        options = {}
    out = method.apply_monolithic(layer, x, logits, **options)
    assert out.tobytes() == expected.tobytes()


def test_monolithic_passes_everything_on():
    problem = make_problem(9, 2, 8, 24, 16)
    method, layer = ready(problem)
    x, logits = problem.hidden_states.copy(), logits_for(problem)
    weights, ids = cumoe.select_experts(x, logits, 2)
    expected = method.apply(layer, x, weights, ids, apply_router_weight_on_input=True)
    expected[4] = 0
    padding = np.arange(9) == 4
    out = method.apply_monolithic(
        layer, x, logits, apply_router_weight_on_input=True, inplace=True, routing={"is_padding": padding}
    )
    assert out is x and out.tobytes() == expected.tobytes()
    table = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.int32), (5, 1)), axis=1)[:, :2]
    hashed = {"hash_indices_table": table, "input_ids": np.arange(9) % 5}
    weights, ids = cumoe.select_experts(problem.hidden_states, logits, 2, scoring_func="sqrtsoftplus", **hashed)
    expected = method.apply(layer, problem.hidden_states, weights, ids)
    out = method.apply_monolithic(layer, problem.hidden_states, logits, scoring_func="sqrtsoftplus", routing=hashed)
    assert out.tobytes() == expected.tobytes()


def test_monolithic_refuses_experts_that_compute_nothing():
    problem = make_problem(2, 2, 4, 8, 16)
    method, layer = ready(problem)
    with raises(NotImplementedError, "no way to route zero_expert_type here; call select_experts, apply and add"):
        method.apply_monolithic(layer, problem.hidden_states, logits_for(problem), routing={"zero_expert_type": "copy"})


# -- experts of other ranks -------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    ep_size=st.integers(1, 6),
    strategy=st.sampled_from(("linear", "round_robin")),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_parts_of_all_ranks_sum_to_the_whole(xp, sizes, ep_size, strategy, bias, seed):
    num_tokens, num_experts, hidden_size, intermediate_size = sizes  # some ranks may own nothing
    problem = make_problem(num_tokens, 1, num_experts, hidden_size, intermediate_size, bias=bias, seed=seed)
    total = np.zeros_like(problem.hidden_states)
    for rank in range(ep_size):
        method, layer, expert_map = rank_of(problem, ep_size, rank, strategy, xp)
        total += back(method.apply(layer, *routed(problem, xp), expert_map=expert_map))
    whole, layer = ready(problem, xp)
    # k = 1: every token has one owner, the others add zero
    np.testing.assert_array_equal(total, back(whole.apply(layer, *routed(problem, xp))))


def test_a_rank_without_experts_contributes_nothing(xp):
    problem = make_problem(3, 1, 2, 8, 16, bias=True)
    method, layer, expert_map = rank_of(problem, 3, 2, "linear", xp)
    assert layer.w13_weight.shape == (0, 32, 8) and (expert_map == -1).all()
    x, weights, ids = routed(problem, xp)
    out = xp.full_like(x, np.nan)
    assert not method.apply(layer, x, weights, ids, expert_map=expert_map).any()
    assert method.apply(layer, x, weights, ids, out=out) is out and not out.any()


def test_other_ranks_need_a_map():
    method, layer, _ = rank_of(make_problem(3, 1, 4, 8, 16), 2, 0, "linear")
    message = "expert_map must be given for num_local_experts = 2 of 4 experts, got None; see determine_expert_map"
    with raises(ValueError, message):
        method.apply(layer, *routed(make_problem(3, 1, 4, 8, 16)))
