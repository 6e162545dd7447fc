"""The layer: against the float64 law at its bound, and the properties that callers rely on, bit by bit."""

import threading

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, make_problem, problems

import cumoe
from cumoe import _plan
from cumoe._call import enter_call
from cumoe._kernel_choice import choose_kernel
from cumoe.reference import experts
from cumoe.reference.act import ACTIVATIONS

# parameters of the activations that have no default for them
PARAMETERS = {"swigluoai_uninterleave": {"limit": 7.0}, "situ": {"beta": 3.0}}


def quant_config(problem, xp=np):
    """Biases and clamp of a problem, or None."""
    given = PARAMETERS.get(problem.activation, {})
    if problem.w1_bias is None and not given:
        return None
    w1_bias, w2_bias = (None if b is None else xp.asarray(b) for b in (problem.w1_bias, problem.w2_bias))
    return cumoe.FusedMoEQuantConfig.make(
        w1_bias=w1_bias, w2_bias=w2_bias, gemm1_beta=given.get("beta"), gemm1_clamp_limit=given.get("limit")
    )


def run(problem, xp=np, **keywords):
    """`fused_experts` of a problem on the side of `xp`, NumPy out."""
    arrays = [xp.asarray(array) for array in problem[:5]]
    keywords.setdefault("expert_map", None if problem.expert_map is None else xp.asarray(problem.expert_map))
    keywords.setdefault("quant_config", quant_config(problem, xp))
    out = cumoe.fused_experts(*arrays, activation=problem.activation, **keywords)
    return out if xp is np else out.get()


def any_layout(xp, dtype):
    """A kernel that takes rows wherever they begin, so that one layout has the bits of another."""
    return None if xp is np else "fma" if dtype == "float32" else "mma"


def law(problem, **keywords):
    """The reference of a problem."""
    keywords.setdefault("expert_map", problem.expert_map)
    return experts.fused_experts(
        *problem[:5],
        activation=problem.activation,
        **PARAMETERS.get(problem.activation, {}),
        w1_bias=problem.w1_bias,
        w2_bias=problem.w2_bias,
        **keywords,
    )


def assert_within(out, bounded):
    """Every element within its bound."""
    ratio = experts.ratio(out, bounded)
    assert out.shape == bounded.value.shape
    assert ratio.max(initial=0) <= 1, f"{ratio.max()} at {np.unravel_index(ratio.argmax(), ratio.shape)}"


@given(problem=problems(), on_input=st.sampled_from((False, False, True, "accumulator")))
def test_equals_reference(xp, problem, on_input):
    out = run(problem, xp, apply_router_weight_on_input=on_input)
    assert out.dtype == problem.hidden_states.dtype
    assert_within(out, law(problem, apply_router_weight_on_input=on_input))


@given(problem=problems(activations=("silu", "swigluoai")), seed=st.integers(0, 1000))
def test_permuting_tokens_permutes_outputs(xp, problem, seed):
    order = np.random.default_rng(seed).permutation(len(problem.hidden_states))
    shuffled = problem._replace(
        hidden_states=problem.hidden_states[order],
        topk_weights=problem.topk_weights[order],
        topk_ids=problem.topk_ids[order],
    )
    assert run(shuffled, xp).tobytes() == run(problem, xp)[order].tobytes()


@given(problem=problems(), cut=st.floats(0, 1))
def test_splitting_the_batch_changes_no_bit(xp, problem, cut):
    at = int(cut * len(problem.hidden_states))
    parts = [
        problem._replace(
            hidden_states=problem.hidden_states[part],
            topk_weights=problem.topk_weights[part],
            topk_ids=problem.topk_ids[part],
        )
        for part in (slice(at), slice(at, None))
    ]
    assert b"".join(run(part, xp).tobytes() for part in parts) == run(problem, xp).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_a_large_batch_changes_no_bit(xp, dtype):
    problem = make_problem(700, 2, 3, 96, 80, dtype)  # more rows of an expert than one task takes
    whole = run(problem, xp)
    for first, last in ((0, 1), (1, 20), (20, 333), (333, 700)):
        part = [array[first:last] if i in (0, 3, 4) else array for i, array in enumerate(problem[:5])]
        assert run(problem._replace(**dict(zip(problem._fields, part, strict=False))), xp).tobytes() == (
            whole[first:last].tobytes()
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_changes_no_bit(dtype):
    problem = make_problem(300, 3, 5, 130, 70, dtype, bias=True, skipped=0.1)
    default = numba.get_num_threads()
    try:
        results = set()
        for count in range(1, default + 1):
            numba.set_num_threads(count)
            results.add(run(problem).tobytes())
    finally:
        numba.set_num_threads(default)
    assert len(results) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_threads_at_once_get_the_same_bits(dtype):
    problem = make_problem(90, 2, 4, 64, 64, dtype)
    expected = run(problem).tobytes()
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(run(problem).tobytes() for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert set(results) == {expected}


@given(problem=problems(activations=("silu",)))
def test_doubling_the_weights_doubles_the_output(xp, problem):
    doubled = run(problem._replace(topk_weights=2 * problem.topk_weights), xp).astype(np.float64)
    expected = 2 * run(problem, xp).astype(np.float64)
    # float16 has subnormals in reach, whose step does not double: half a step for each y and for their sum
    steps = problem.topk_ids.shape[1] + 1 if problem.hidden_states.dtype == np.float16 else 0
    unbounded = ~np.isfinite(doubled)
    assert (np.abs(doubled - expected)[~unbounded] <= steps * 2.0**-24).all()
    assert (np.abs(expected[unbounded]) > 65504).all()


@given(problem=problems(), seed=st.integers(0, 1000))
def test_one_choice_of_weight_one_is_a_dense_layer(xp, problem, seed):
    """The fused path is compared bit by bit with product, activation, product."""
    num_tokens, num_experts = len(problem.hidden_states), len(problem.w1)
    expert = seed % num_experts
    problem = problem._replace(
        topk_weights=np.ones((num_tokens, 1), np.float32),
        topk_ids=np.full((num_tokens, 1), expert, np.int32),
        expert_map=None,
    )
    offsets = xp.asarray([0, num_tokens])
    biases = [None if b is None else xp.asarray(b[expert][None]) for b in (problem.w1_bias, problem.w2_bias)]
    x, w1, w2 = (xp.asarray(a) for a in (problem.hidden_states, problem.w1[[expert]], problem.w2[[expert]]))
    backend = any_layout(xp, problem.w1.dtype.name)  # 2I may suit a kernel that I does not suit
    h = cumoe.grouped_gemm(x, w1, offsets, bias=biases[0], backend=backend)
    a = cumoe.moe_activation(h, problem.activation, **PARAMETERS.get(problem.activation, {}))
    y = cumoe.grouped_gemm(a, w2, offsets, bias=biases[1], backend=backend)
    assert run(problem, xp, backend=backend).tobytes() == y.tobytes()


@given(problem=problems(activations=("silu", "relu2_no_mul")), ranks=st.integers(2, 4))
def test_partial_outputs_of_all_ranks_add_up_to_the_whole(xp, problem, ranks):
    problem = problem._replace(expert_map=None)
    num_experts = len(problem.w1)
    total, error = np.zeros(problem.hidden_states.shape), np.zeros(problem.hidden_states.shape)
    for rank in range(ranks):
        count, expert_map = cumoe.determine_expert_map(ranks, rank, num_experts)
        if count == 0:
            continue
        local = np.flatnonzero(np.asarray(expert_map) >= 0)
        biases = {
            name: None if (bias := getattr(problem, name)) is None else bias[local] for name in ("w1_bias", "w2_bias")
        }
        part = problem._replace(w1=problem.w1[local], w2=problem.w2[local], expert_map=expert_map, **biases)
        total += run(part, xp).astype(np.float64)
        error += law(part).error
    whole = law(problem)
    assert_within(total, experts.Bounded(whole.value, error))


@given(problem=problems())
def test_prepared_weights_give_the_same_bits(xp, problem):
    prepared = cumoe.prepare(
        xp.asarray(problem.w1),
        xp.asarray(problem.w2),
        activation=problem.activation,
        quant_config=quant_config(problem, xp),
    )
    arrays = [xp.asarray(array) for array in (problem.hidden_states, problem.topk_weights, problem.topk_ids)]
    expert_map = None if problem.expert_map is None else xp.asarray(problem.expert_map)
    out = cumoe.fused_experts(arrays[0], prepared, None, *arrays[1:], expert_map=expert_map)
    assert out.tobytes() == run(problem, xp).tobytes()


def test_preparing_into_old_memory_replaces_the_weights(xp):
    old, new = (make_problem(5, 2, 3, 48, 40, "bfloat16", seed=seed) for seed in (1, 2))
    prepared = cumoe.prepare(xp.asarray(old.w1), xp.asarray(old.w2))
    address = prepared.experts.w1.__array_interface__["data"] if xp is np else prepared.experts.w1.data.ptr
    again = cumoe.prepare(xp.asarray(new.w1), xp.asarray(new.w2), out=prepared)
    assert again is prepared
    assert address == (prepared.experts.w1.__array_interface__["data"] if xp is np else prepared.experts.w1.data.ptr)
    arrays = [xp.asarray(array) for array in (new.hidden_states, new.topk_weights, new.topk_ids)]
    assert cumoe.fused_experts(arrays[0], prepared, None, *arrays[1:]).tobytes() == run(new, xp).tobytes()


@given(problem=problems(), share=st.floats(0, 1))
def test_a_workspace_limit_changes_no_bit(xp, problem, share):
    (num_tokens, hidden_size), dtype = problem.hidden_states.shape, problem.w1.dtype.name
    sizes = _plan.Sizes(problem.topk_ids.shape[1], len(problem.w1), hidden_size, problem.w2.shape[2], dtype)
    kernel = choose_kernel(xp, None, dtype, hidden_size, problem.w2.shape[2])
    limit = _plan.scratch_bytes(sizes, _plan.share_out(xp, kernel, int(share * num_tokens), sizes))
    assert run(problem, xp, workspace_limit=limit).tobytes() == run(problem, xp).tobytes()


def test_scratch_stays_under_the_limit(monkeypatch):
    problem = make_problem(64, 2, 4, 64, 32)
    allocated = []
    empty = np.empty

    def counting(*arguments, **keywords):
        array = empty(*arguments, **keywords)
        allocated.append(array.nbytes)
        return array

    run(problem)  # compiled
    out = np.zeros_like(problem.hidden_states)
    monkeypatch.setattr(np, "empty", counting)
    checked = enter_call(*problem[:5], "silu", None, False, None, None, out, False, 20_000)
    allocated.clear()
    pieces = list(checked.pieces())
    assert len(pieces) > 1
    assert sum(allocated) <= 20_000


@settings(max_examples=25)
@given(problem=problems())
def test_what_is_not_a_result_is_never_read(problem):
    """All scratch starts as NaN, experts without tokens and tokens without experts are NaN."""
    used = np.unique(experts.local_experts(problem.topk_ids, len(problem.w1), problem.expert_map))
    w1, w2, x = problem.w1.copy(), problem.w2.copy(), problem.hidden_states.copy()
    idle = np.setdiff1d(np.arange(len(w1)), used)
    w1[idle], w2[idle] = np.nan, np.nan
    alone = (experts.local_experts(problem.topk_ids, len(w1), problem.expert_map) < 0).all(axis=1)
    x[alone] = np.nan
    clean = run(problem)
    assert (clean[alone] == 0).all()
    empty = np.empty

    def poisoned(*arguments, **keywords):
        array = empty(*arguments, **keywords)
        array.view(np.uint8).reshape(-1)[...] = 0xFF
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", poisoned)
        dirty = run(problem._replace(w1=w1, w2=w2, hidden_states=x))
    assert dirty.tobytes() == clean.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_written_and_may_be_read_only(xp, dtype):
    problem = make_problem(9, 2, 3, 32, 16, dtype, bias=True)
    expected = run(problem, xp)
    if xp is np:
        for array in problem[:7]:
            array.flags.writeable = False
    config = cumoe.biased_moe_quant_config(*(xp.asarray(bias) for bias in problem[5:7]))
    arrays = [xp.asarray(array) for array in problem[:5]]
    before = [array.tobytes() for array in (*arrays, config.w1_bias, config.w2_bias)]
    assert cumoe.fused_experts(*arrays, quant_config=config).tobytes() == expected.tobytes()
    assert [array.tobytes() for array in (*arrays, config.w1_bias, config.w2_bias)] == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(xp, dtype):
    problem, backend = make_problem(6, 2, 3, 40, 24, dtype), any_layout(xp, dtype)
    expected = run(problem, xp, backend=backend)

    def spread(array):  # rows apart in memory
        wide = np.full((*array.shape[:-1], array.shape[-1] + 5), 9).astype(array.dtype)
        wide[..., : array.shape[-1]] = array
        return xp.asarray(wide)[..., : array.shape[-1]]

    def turned(array):  # inner axis not contiguous
        return xp.asarray(np.ascontiguousarray(np.moveaxis(array, -1, 0))).transpose(*range(1, array.ndim), 0)

    for layout in (spread, turned):
        arrays = [layout(array) for array in problem[:5]]
        assert not arrays[1].flags.c_contiguous
        assert cumoe.fused_experts(*arrays, backend=backend).tobytes() == expected.tobytes()
        assert_within(cumoe.fused_experts(*arrays) if xp is np else cumoe.fused_experts(*arrays).get(), law(problem))


@pytest.mark.parametrize("ids", ["int32", "int64", "uint32"])
@pytest.mark.parametrize("weights", ["float32", "float64", "bfloat16"])
def test_every_dtype_of_the_router(xp, ids, weights):
    problem = make_problem(6, 2, 3, 32, 16)
    problem = problem._replace(topk_ids=problem.topk_ids.astype(ids), topk_weights=problem.topk_weights.astype(weights))
    assert_within(run(problem, xp), law(problem))


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
def test_no_tokens_or_no_choices(xp, shape):
    problem = make_problem(shape[0], shape[1], 3, 32, 16)
    out = run(problem, xp)
    assert out.shape == (shape[0], 32)
    assert (out == 0).all()


def test_an_output_that_is_given_is_written_and_returned(xp):
    problem = make_problem(6, 2, 3, 32, 16)
    arrays = [xp.asarray(array) for array in problem[:5]]
    out = xp.full((6, 32), np.nan, "float32")
    assert cumoe.fused_experts(*arrays, out=out) is out
    assert out.tobytes() == run(problem, xp).tobytes()


def test_fused_moe_is_routing_then_experts(xp):
    problem = make_problem(11, 2, 6, 32, 16)
    logits = xp.asarray(np.random.default_rng(0).standard_normal((11, 6), np.float32))
    x, w1, w2 = (xp.asarray(array) for array in problem[:3])
    for renormalize in (True, False):
        weights, ids = cumoe.fused_topk(logits, 3, renormalize=renormalize)
        expected = cumoe.fused_experts(x, w1, w2, weights, ids)
        got = cumoe.fused_moe(x, w1, w2, logits, top_k=3, renormalize=renormalize)
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_and_nan_tokens_stay_in_their_rows(xp, dtype):
    problem = make_problem(8, 2, 3, 40, 24, dtype)
    clean = run(problem, xp)
    x = problem.hidden_states.copy()
    x[2, 5], x[4] = np.nan, np.inf
    out = run(problem._replace(hidden_states=x), xp)
    rest = [0, 1, 3, 5, 6, 7]
    assert out[rest].tobytes() == clean[rest].tobytes()
    assert np.isnan(out[2].astype(np.float32)).all()
    assert not np.isfinite(out[4].astype(np.float32)).all()


@pytest.mark.parametrize("mutate", ["swap_gate_and_up", "lose_a_choice", "wrong_expert", "unweighted", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_rejects_wrong_answers(xp, dtype, mutate):
    problem = make_problem(16, 2, 4, 64, 48, dtype)
    wrong = {
        "swap_gate_and_up": lambda: problem._replace(w1=np.roll(problem.w1, 48, axis=1)),
        "lose_a_choice": lambda: problem._replace(topk_ids=np.where([[True, False]], problem.topk_ids, -1)),
        "wrong_expert": lambda: problem._replace(topk_ids=(problem.topk_ids + 1) % 4),
        "unweighted": lambda: problem._replace(topk_weights=np.ones_like(problem.topk_weights)),
        "zero": lambda: problem._replace(topk_weights=0 * problem.topk_weights),
    }[mutate]()
    arrays = [xp.asarray(array) for array in problem[:5]]
    assert cumoe.verify(xp.asarray(run(problem, xp)), *arrays, sample=None).ok
    found = cumoe.verify(xp.asarray(run(wrong, xp)), *arrays, sample=None)
    assert not found.ok
    assert found.max_ratio > 1
    assert str(found).startswith("OUTSIDE the bound")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation_has_an_epilogue(xp, dtype):
    for activation in ACTIVATIONS if xp is not np or dtype == "float32" else ("gelu", "relu2_no_mul"):
        problem = make_problem(3, 1, 2, 16, 16, dtype, activation)
        assert_within(run(problem, xp), law(problem))


def test_plan_counts_what_the_call_does():
    plan = cumoe.plan(100, 64, 32, 8, 2, dtype="bfloat16")
    assert plan.flops == 2 * 3 * 100 * 2 * 64 * 32
    assert 0 <= plan.workspace_bytes - (8 * 9 + 100 * 2 * (8 + 2 * (64 + 32))) <= 7 * 256
    assert plan.bytes == round(8 * (1 - 0.75**100) * 3 * 64 * 32 * 2) + 2 * 100 * 64 * 2
    assert plan.floor(1e9, 1e12) == plan.bytes / 1e9
    limited = cumoe.plan(100, 64, 32, 8, 2, workspace_limit=5000)
    assert limited.workspace_bytes <= 5000
    assert f"of at most {limited.tokens_per_piece} tokens" in limited.explain()
    assert f"kernel     {plan.kernel}" in plan.explain()
    for reason in plan.refused:
        assert reason in plan.explain()
