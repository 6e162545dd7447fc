"""The kernels by name: each one that a side has, against the float64 law; those that it has not are told why."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import gpu
from strategies import GATED, UNGATED, make_problem, problems
from test_moe import assert_within, law, quant_config, run

import cumoe
from cumoe import _arrays, _kernel_choice
from cumoe.rawkernels import _load, pack
from cumoe.reference.rounding import TF32_UNIT

# name -> dtypes, and what sizes must be a multiple of
KERNELS = {
    "wgmma": (("bfloat16", "float16"), 8),
    "mma": (("bfloat16", "float16"), 1),
    "fma": (("float32",), 1),
    "tf32": (("float32",), 1),
}
CASES = [(kernel, dtype) for kernel, (dtypes, _) in KERNELS.items() for dtype in dtypes]


def side_of(kernel, dtype="bfloat16"):
    """CuPy, if the kernel runs on its device; else the test is skipped."""
    xp = gpu()
    reason = _arrays.room(xp, "pack").refusal(kernel, KERNELS[kernel][0][0], 64, 64, True, False)
    if reason is not None:
        pytest.skip(reason)
    return xp


def law_of(problem, kernel, **keywords):
    return law(problem, operand_unit=TF32_UNIT if kernel == "tf32" else 0.0, **keywords)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data())
def test_every_kernel_of_the_gpu_equals_the_reference(kernel, data):
    xp, (dtypes, multiple) = side_of(kernel), KERNELS[kernel]
    problem = data.draw(problems(dtypes=dtypes, max_tokens=150, multiple=multiple))
    scaled = kernel != "wgmma"  # it reads the tokens as they are
    on_input = data.draw(st.sampled_from((False, "accumulator", True) if scaled else (False, "accumulator")))
    out = run(problem, xp, backend=kernel, apply_router_weight_on_input=on_input)
    assert_within(out, law_of(problem, kernel, apply_router_weight_on_input=on_input))


@pytest.mark.parametrize("activation", GATED + UNGATED)
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_every_activation_with_biases(kernel, dtype, activation):
    xp = side_of(kernel)
    problem = make_problem(70, 2, 3, 72, 40, dtype, activation, bias=True, skipped=0.1)
    assert_within(run(problem, xp, backend=kernel), law_of(problem, kernel))


# rows of one expert around the edges of every tile
EDGES = (1, 7, 8, 9, 16, 17, 31, 33, 48, 63, 65, 80, 95, 97, 112, 127, 129, 160, 161, 192, 255, 257, 300, 513)


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_any_number_of_rows_has_the_same_bits(kernel, dtype):
    """Other tiles for more rows, but the same order of every sum: a row has its bits in any company."""
    xp = side_of(kernel)
    whole = make_problem(EDGES[-1], 1, 1, 264, 136, dtype)
    expected = run(whole, xp, backend=kernel)
    assert_within(expected, law_of(whole, kernel))
    for rows in EDGES:
        part = whole._replace(
            hidden_states=whole.hidden_states[:rows],
            topk_weights=whole.topk_weights[:rows],
            topk_ids=whole.topk_ids[:rows],
        )
        assert run(part, xp, backend=kernel).tobytes() == expected[:rows].tobytes(), rows


COUNTS = (0, 1, 7, 64, 70, 0, 128, 200, 333, 2)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(264, 136), (512, 1032), (8, 8), (1016, 24)])
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_uneven_experts(kernel, dtype, hidden_size, intermediate_size):
    """Experts of 0 to 333 rows, in an order of tokens that mixes them; sizes at and beside the blocks of K and N."""
    xp = side_of(kernel)
    problem = make_problem(sum(COUNTS), 1, len(COUNTS), hidden_size, intermediate_size, dtype, bias=True)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS), dtype=np.int32), COUNTS))
    problem = problem._replace(topk_ids=ids[:, None])
    assert_within(run(problem, xp, backend=kernel), law_of(problem, kernel))


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_the_same_bits_on_every_run(kernel, dtype):
    xp = side_of(kernel)
    problem = make_problem(500, 4, 16, 256, 128, dtype, bias=True, skipped=0.05)
    assert len({run(problem, xp, backend=kernel).tobytes() for _ in range(10)}) == 1


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_weights_packed_for_a_kernel(kernel, dtype):
    xp = side_of(kernel)
    problem = make_problem(40, 2, 4, 64, 48, dtype, bias=True)
    expected = run(problem, xp, backend=kernel)
    x, w1, w2, weights, ids = (xp.asarray(array) for array in problem[:5])
    prepared = cumoe.prepare(w1, w2, quant_config=quant_config(problem, xp), backend=kernel)
    assert prepared.kernel == kernel and prepared.device.startswith("cuda:")
    assert cumoe.fused_experts(x, prepared, None, weights, ids).tobytes() == expected.tobytes()
    for other in _arrays.room(xp, "pack").kernel_names():  # one layout for all of them
        if dtype in KERNELS[other][0]:
            side_of(other)
            out = cumoe.fused_experts(x, prepared, None, weights, ids, backend=other)
            assert out.tobytes() == run(problem, xp, backend=other).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_hoppers_kernel_cannot_read_another_one_does(dtype):
    """Rows that begin anywhere, odd sizes, weights on the input: chosen before the call, and told by the plan."""
    xp = side_of("wgmma")
    problem = make_problem(9, 2, 3, 64, 48, dtype)
    arrays = [xp.asarray(array) for array in problem[:5]]
    expected = law(problem)
    memory = xp.zeros(9 * 64 + 1, np.uint16)
    memory[1:] = arrays[0].view(np.uint16).reshape(-1)
    moved = memory[1:].reshape(9, 64).view(problem.w1.dtype)
    with pytest.raises(
        NotImplementedError, match=r"\(wgmma: rows must ascend and begin at multiples of 16 bytes\); available: mma$"
    ):
        cumoe.fused_experts(moved, *arrays[1:], backend="wgmma")
    prepared = cumoe.prepare(*arrays[1:3])
    assert prepared.kernel == "wgmma"
    for weights in (arrays[1:3], (prepared, None)):
        assert_within(cumoe.fused_experts(moved, *weights, *arrays[3:]).get(), expected)
        on_input = cumoe.fused_experts(arrays[0], *weights, *arrays[3:], apply_router_weight_on_input=True)
        assert_within(on_input.get(), law(problem, apply_router_weight_on_input=True))
    with pytest.raises(NotImplementedError, match="reads the tokens as they are"):
        cumoe.fused_experts(*arrays, backend="wgmma", apply_router_weight_on_input=True)
    backwards = [array[::-1].copy()[::-1] for array in arrays[1:3]]
    assert cumoe.prepare(*backwards).kernel == "wgmma"  # in order, in its copy
    assert cumoe.fused_experts(arrays[0], *backwards, *arrays[3:]).tobytes() == (
        cumoe.fused_experts(*arrays, backend="mma").tobytes()
    )
    odd = cumoe.plan(9, 63, 48, 3, 2, dtype=dtype, device="cuda")
    assert odd.kernel == "mma"
    assert odd.refused == ("wgmma: the sizes of the matrices must be multiples of 8, got 63 and 48",)
    assert cumoe.plan(9, 64, 48, 3, 2, dtype=dtype, device="cuda").refused == ()


@pytest.mark.parametrize(
    ("start", "shape", "strides", "aligned"),
    [
        (512, (3, 4, 8), (64, 16, 2), True),
        (512, (3, 4, 8), (0, 16, 2), True),
        (512, (1, 4, 8), (-2, 16, 2), True),  # there is no second one
        (512, (3, 4, 8), (-64, 16, 2), False),
        (512, (3, 4, 8), (64, -16, 2), False),
        (512, (3, 4, 8), (72, 16, 2), False),
        (520, (3, 4, 8), (64, 16, 2), False),
    ],
)
def test_rows_that_a_tensor_map_can_tell(start, shape, strides, aligned):
    array = SimpleNamespace(data=SimpleNamespace(ptr=start), shape=shape, strides=strides)
    assert _kernel_choice.rows_are_aligned(array) == aligned


def test_a_plan_of_the_gpu():
    cp = gpu()
    plan = cumoe.plan(100, 64, 32, 8, 2, dtype="float32", device="cuda")
    assert (plan.kernel, plan.device) == ("fma", "cuda")
    assert "tf32: rounds the factors to 11 bits, for callers who ask for it by name" in plan.refused
    assert plan.tiles and all(f"tiles      {line}" in plan.explain() for line in plan.tiles)
    named = cumoe.plan(100, 64, 32, 8, 2, dtype="float32", device="cuda:0", backend="tf32")
    assert named.kernel == "tf32"
    assert "fma: can run, tf32 was asked for" in named.refused
    assert not any(reason.startswith("tf32") for reason in named.refused)
    last = cp.cuda.runtime.getDeviceCount() - 1
    with pytest.raises(ValueError, match=rf"^device must be one of {last + 1} here, got 'cuda:{last + 1}'$"):
        cumoe.plan(1, 64, 32, 8, 2, device=f"cuda:{last + 1}")
    cumoe.plan(1, 64, 32, 8, 2, device=f"cuda:{last}")
    assert cp.cuda.runtime.getDevice() == 0
    needed = [cumoe.plan(t, 64, 32, 8, 2, device="cuda").workspace_bytes for t in range(2000)]
    assert needed == sorted(needed)  # a workspace for many tokens does for fewer
    assert needed[0] == 0


def test_kernels_of_the_cpu_by_name():
    problem = make_problem(20, 2, 3, 40, 24)
    names = cumoe.plan(1, 1, 1, 1, 1, dtype="float32").refused
    assert_within(run(problem, backend="portable"), law(problem))
    prepared = cumoe.prepare(problem.w1, problem.w2, backend="portable")
    assert prepared.kernel == "portable" and prepared.device == "cpu"
    x, _, _, weights, ids = problem[:5]
    out = cumoe.fused_experts(x, prepared, None, weights, ids)
    assert out.tobytes() == run(problem, backend="portable").tobytes()
    assert cumoe.fused_experts(x, prepared, None, weights, ids, backend="portable").tobytes() == out.tobytes()
    assert cumoe.plan(20, 40, 24, 3, 2, dtype="float32", backend="portable").kernel == "portable"
    best = cumoe.plan(20, 40, 24, 3, 2, dtype="float32")
    by_name = cumoe.plan(20, 40, 24, 3, 2, dtype="float32", backend="portable").refused
    assert set(best.refused) <= set(by_name)
    assert (f"{best.kernel}: can run, portable was asked for" in by_name) == (best.kernel != "portable")
    assert cumoe.plan(20, 40, 24, 3, 2, dtype="float32", backend=best.kernel).refused == best.refused
    a, offsets = problem.hidden_states, np.array([0, 5, 5, 20])
    expected = cumoe.grouped_gemm(a, problem.w1, offsets).astype(np.float64)
    np.testing.assert_allclose(cumoe.grouped_gemm(a, problem.w1, offsets, backend="portable"), expected, atol=1e-5)
    assert any(reason.startswith("amx: ") for reason in names)


def test_a_kernel_that_cannot_run_is_refused():
    problem = make_problem(4, 2, 3, 16, 8)
    reason = r"amx: multiplies bfloat16 only, the weights are float32"
    message = rf"^no kernel for backend='amx' \({reason}\); available: .*portable$"
    x, w1, w2, weights, ids = problem[:5]
    prepared = cumoe.prepare(w1, w2, backend="portable")
    for call in (
        lambda: cumoe.fused_experts(x, w1, w2, weights, ids, backend="amx"),
        lambda: cumoe.fused_experts(x, prepared, None, weights, ids, backend="amx"),
        lambda: cumoe.fused_moe(x, w1, w2, np.zeros((4, 3), np.float32), top_k=1, backend="amx"),
        lambda: cumoe.prepare(w1, w2, backend="amx"),
        lambda: cumoe.grouped_gemm(x, w1, np.array([0, 1, 2, 4]), backend="amx"),
        lambda: cumoe.plan(4, 16, 8, 3, 2, dtype="float32", backend="amx"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    with pytest.raises(ValueError, match=r"^backend must be amx, avx512bf16, avx512, avx2 or portable, got 'wgmma'$"):
        cumoe.fused_experts(x, w1, w2, weights, ids, backend="wgmma")
    best = cumoe.prepare(w1, w2)
    if best.kernel != "portable":
        message = f"^backend must be that of w1 = '{best.kernel}', got 'portable'; prepare w1 for it$"
        with pytest.raises(ValueError, match=message):
            cumoe.fused_experts(x, best, None, weights, ids, backend="portable")
        with pytest.raises(ValueError, match=f"^out must have kernel = '{best.kernel}', got 'portable'$"):
            cumoe.prepare(w1, w2, out=prepared, backend=best.kernel)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_that_is_too_old_has_no_kernel(monkeypatch, dtype):
    monkeypatch.setattr(_load, "capability", lambda device=None: 75)
    message = r"^the kernels need compute capability 8\.0, the device has 7\.5$"
    with pytest.raises(NotImplementedError, match=message):
        pack.best_kernel(dtype, 64, 64, True, False)
    with pytest.raises(NotImplementedError, match=message):
        pack.refused_kernels(dtype, 64, 64, True, False)


def test_verify_knows_tf32():
    """Products of rounded factors are outside the bound of exact ones, and within theirs."""
    problem = make_problem(16, 2, 4, 16, 8)  # few products, so that the bound is tight

    def rounded(array):
        bits = array.view(np.uint32)
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint32(0x1FFF)).view(np.float32)

    coarse = problem._replace(
        hidden_states=rounded(problem.hidden_states), w1=rounded(problem.w1), w2=rounded(problem.w2)
    )
    out = run(coarse)
    assert not cumoe.verify(out, *problem[:5]).ok
    assert cumoe.verify(out, *problem[:5], backend="tf32").ok
    with pytest.raises(ValueError, match=r"^backend must be tf32, amx, .*, got 'exact'$"):
        cumoe.verify(out, *problem[:5], backend="exact")
