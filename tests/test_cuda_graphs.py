"""
The layer in CUDA graphs, CuPy's and torch's: captured once, replayed with other inputs, the bits of a plain call.

Capturing is also the proof that a call neither waits for the device nor allocates on it: in the global mode that is
used here the driver refuses both.
"""

import types

import numpy as np
import pytest
from methods import config_of, load, ready
from sides import gpu, on
from strategies import make_problem
from test_moe import assert_within, law

import cumoe

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

GLOBAL = cupy.cuda.runtime.streamCaptureModeGlobal

# dtype, H, I, kernel: sizes that suit Hopper's kernel, and odd ones
KINDS = [
    ("bfloat16", 256, 136, None),
    ("bfloat16", 256, 136, "mma"),
    ("float16", 72, 64, None),
    ("bfloat16", 65, 33, None),
    ("float32", 96, 40, None),
    ("float32", 96, 40, "tf32"),
]


def capture(stream, call):
    """A graph of what a call launches, which has run before so that its kernels are there."""
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture(GLOBAL)
        try:
            call()
        finally:
            graph = stream.end_capture()
    return graph


class Layer:
    """A problem on the device, with an output and a workspace of the caller's."""

    def __init__(self, num_tokens, top_k, num_experts, hidden_size, intermediate_size, dtype, backend=None, **more):
        self.sizes = num_tokens, top_k, num_experts, hidden_size, intermediate_size, dtype
        self.backend, self.more = backend, more
        problem = self.draw(0)
        self.arrays = {name: on(cupy, getattr(problem, name)) for name in ("hidden_states", "topk_weights", "topk_ids")}
        self.logits = on(cupy, self.draw_logits(0))
        self.prepared = self.prepare(problem)
        self.out = cupy.empty(problem.hidden_states.shape, problem.hidden_states.dtype)
        sizes = num_tokens, hidden_size, intermediate_size, num_experts, top_k
        plan = cumoe.plan(*sizes, dtype=dtype, device="cuda", backend=backend)
        self.workspace = cupy.full(plan.workspace_bytes, 0xFF, np.uint8)

    def draw(self, seed):
        return make_problem(*self.sizes, seed=seed, bias=True, skipped=0.1, **self.more)

    def draw_logits(self, seed):
        num_tokens, _, num_experts, *_ = self.sizes
        return np.random.default_rng(seed).standard_normal((num_tokens, num_experts), np.float32)

    def prepare(self, problem, out=None):
        w1, w2, *biases = (on(cupy, one) for one in (problem.w1, problem.w2, problem.w1_bias, problem.w2_bias))
        config = cumoe.biased_moe_quant_config(*biases)
        return cumoe.prepare(w1, w2, quant_config=config, backend=self.backend, out=out)

    def change(self, seed):
        """Other inputs and weights, at the same addresses."""
        problem = self.draw(seed)
        for name, array in self.arrays.items():
            array[...] = on(cupy, getattr(problem, name))
        self.logits[...] = on(cupy, self.draw_logits(seed))
        assert self.prepare(problem, out=self.prepared) is self.prepared
        self.workspace.fill(0xFF)
        self.out.view(np.uint8).fill(0xFF)
        cupy.cuda.Device().synchronize()
        return problem

    def experts(self, **named):
        x, weights, ids = self.arrays.values()
        return cumoe.fused_experts(x, self.prepared, None, weights, ids, backend=self.backend, **named)

    def moe(self, **named):
        x, top_k = self.arrays["hidden_states"], self.sizes[1]
        return cumoe.fused_moe(x, self.prepared, None, self.logits, top_k=top_k, backend=self.backend, **named)

    @property
    def own_memory(self):
        return {"out": self.out, "workspace": self.workspace}


@pytest.mark.parametrize("num_tokens", [1, 33, 700])
@pytest.mark.parametrize(("dtype", "hidden_size", "intermediate_size", "backend"), KINDS)
def test_a_replay_has_the_bits_of_a_call(dtype, hidden_size, intermediate_size, backend, num_tokens):
    layer = Layer(num_tokens, 2, 5, hidden_size, intermediate_size, dtype, backend)
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, lambda: layer.experts(**layer.own_memory))
    for seed in (1, 2):
        problem = layer.change(seed)
        graph.launch(stream)
        stream.synchronize()
        assert layer.out.tobytes() == layer.experts().tobytes()
        if backend != "tf32":
            assert_within(layer.out.get(), law(problem))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_router_is_captured_too(dtype):
    layer = Layer(50, 3, 8, 64, 40, dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, lambda: layer.moe(**layer.own_memory))
    for seed in (1, 2):
        layer.change(seed)
        graph.launch(stream)
        stream.synchronize()
        assert layer.out.tobytes() == layer.moe().tobytes()


def test_more_pairs_than_one_block_sorts():
    """The sort's own scratch comes out of the workspace; 4096 tokens of 8 choices among 64 experts."""
    layer = Layer(4096, 8, 64, 64, 40, "bfloat16")
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, lambda: layer.experts(**layer.own_memory))
    layer.change(1)
    graph.launch(stream)
    stream.synchronize()
    assert layer.out.tobytes() == layer.experts().tobytes()


def test_pieces_are_captured():
    layer = Layer(200, 2, 5, 64, 40, "bfloat16")
    limit = cumoe.plan(60, 64, 40, 5, 2, device="cuda").workspace_bytes
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, lambda: layer.experts(**layer.own_memory, workspace_limit=limit))
    layer.change(1)
    graph.launch(stream)
    stream.synchronize()
    assert layer.out.tobytes() == layer.experts().tobytes()


def test_two_graphs_share_a_workspace():
    layers = [Layer(num_tokens, 2, 5, 64, 40, "bfloat16") for num_tokens in (70, 20)]
    stream, workspace = cupy.cuda.Stream(non_blocking=True), layers[0].workspace
    graphs = [capture(stream, lambda: one.experts(out=one.out, workspace=workspace)) for one in layers]  # noqa: B023
    for layer in layers:
        layer.change(1)
    for graph in (*graphs, *graphs[::-1]):
        graph.launch(stream)
    stream.synchronize()
    for layer in layers:
        assert layer.out.tobytes() == layer.experts().tobytes()


def test_weights_are_converted_nowhere_in_a_plain_call():
    """Unprepared weights, float32 biases and float32 choices are read as they are."""
    problem = make_problem(20, 2, 4, 64, 40, "bfloat16", bias=True)
    arrays = [on(cupy, array) for array in problem[:5]]
    config = cumoe.biased_moe_quant_config(*(on(cupy, bias.astype("float32")) for bias in problem[5:7]))
    out = cupy.empty((20, 64), problem.w1.dtype)
    workspace = cupy.empty(cumoe.plan(20, 64, 40, 4, 2, device="cuda").workspace_bytes, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    memory = {"out": out, "workspace": workspace}
    graph = capture(stream, lambda: cumoe.fused_experts(*arrays, quant_config=config, **memory))
    out.view(np.uint8).fill(0xFF)
    graph.launch(stream)
    stream.synchronize()
    assert_within(out.get(), law(problem._replace(w1_bias=config.w1_bias.get(), w2_bias=config.w2_bias.get())))


def test_a_call_with_its_own_memory_allocates_nothing():
    layer = Layer(40, 2, 5, 64, 40, "bfloat16")
    expected, routed = layer.experts().tobytes(), layer.moe().tobytes()

    def refuse(num_bytes):
        if num_bytes:
            raise MemoryError(f"{num_bytes} bytes")
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(0), 0)

    with cupy.cuda.using_allocator(refuse):
        assert layer.experts(**layer.own_memory) is layer.out
        assert layer.out.tobytes() == expected
        assert layer.moe(**layer.own_memory) is layer.out
        assert layer.out.tobytes() == routed
        with pytest.raises(MemoryError):
            layer.experts(out=layer.out)


def test_what_must_be_converted_takes_from_the_workspace():
    """Choices of other dtypes: with room for them they are converted there, without it the call says how much."""
    layer = Layer(40, 2, 5, 64, 40, "bfloat16")
    expected = layer.experts().tobytes()
    layer.arrays["topk_weights"] = layer.arrays["topk_weights"].astype(np.float64)
    larger = cupy.empty(layer.workspace.size + 1024, np.uint8)
    layer.experts(out=layer.out, workspace=larger)
    assert layer.out.tobytes() == expected
    with pytest.raises(ValueError, match=r"^workspace must have at least \d+ bytes, got 1000; see plan"):
        layer.experts(out=layer.out, workspace=larger[:1000])


def test_a_method_is_captured():
    problem = make_problem(30, 2, 4, 64, 40, "bfloat16", bias=True)
    method, holder = ready(problem, cupy)
    x, weights, ids = (on(cupy, one) for one in (problem.hidden_states, problem.topk_weights, problem.topk_ids))
    out = cupy.empty_like(x)
    workspace = cupy.empty(cumoe.plan(30, 64, 40, 4, 2, device="cuda").workspace_bytes, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, lambda: method.apply(holder, x, weights, ids, out=out, workspace=workspace))
    other = make_problem(30, 2, 4, 64, 40, "bfloat16", bias=True, seed=1)
    load(holder, other, cupy)
    method.process_weights_after_loading(holder)  # writes the weights that the graph reads
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    new = other._replace(hidden_states=problem.hidden_states, topk_weights=problem.topk_weights)
    assert_within(out.get(), law(new._replace(topk_ids=problem.topk_ids)))
    assert config_of(problem, cupy).device == "cuda"


# ---- torch ----


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    gpu()
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch


def tensors_of(torch, problem):
    """The arguments of `fused_experts` as CUDA tensors."""

    def tensor(array):
        if array.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
        return torch.from_numpy(array).cuda()

    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    return types.SimpleNamespace(**{name: tensor(getattr(problem, name)) for name in names})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_tokens", [1, 100])
def test_torch_captures_a_call(torch, dtype, num_tokens):
    old, new = (tensors_of(torch, make_problem(num_tokens, 2, 4, 64, 40, dtype, seed=seed)) for seed in (0, 1))
    prepared = cumoe.prepare(old.w1, old.w2)
    out = torch.empty_like(old.hidden_states)
    needed = cumoe.plan(num_tokens, 64, 40, 4, 2, dtype=dtype, device="cuda").workspace_bytes
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    logits = torch.randn(num_tokens, 4, device="cuda")

    def experts(**memory):
        return cumoe.fused_experts(old.hidden_states, prepared, None, old.topk_weights, old.topk_ids, **memory)

    def moe(**memory):
        return cumoe.fused_moe(old.hidden_states, prepared, None, logits, top_k=2, **memory)

    for call in (experts, moe):
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert call(out=out, workspace=workspace) is out
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            getattr(old, name).copy_(getattr(new, name))
        logits.normal_()
        cumoe.prepare(new.w1, new.w2, out=prepared)
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        torch.cuda.synchronize()
        assert torch.equal(replayed, call())


def test_torch_captures_among_its_own_work(torch):
    """Results go on in torch inside the graph, with nothing between the streams."""
    given = tensors_of(torch, make_problem(60, 2, 4, 64, 40, "bfloat16"))
    prepared = cumoe.prepare(given.w1, given.w2)
    x, out = torch.zeros_like(given.hidden_states), torch.empty_like(given.hidden_states)
    needed = cumoe.plan(60, 64, 40, 4, 2, device="cuda").workspace_bytes
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    choices = given.topk_weights, given.topk_ids
    cumoe.fused_experts(x, prepared, None, *choices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        half = given.hidden_states * 0.5
        x.copy_(half + half)
        cumoe.fused_experts(x, prepared, None, *choices, out=out, workspace=workspace)
        doubled = out + out
    graph.replay()
    torch.cuda.synchronize()
    expected = cumoe.fused_experts(given.hidden_states, prepared, None, *choices)
    assert torch.equal(doubled, expected + expected)


@pytest.mark.parametrize(
    ("scheme", "group"), [("fp8", (-1, -1)), ("fp8", (1, 128)), ("uint8", (1, -1)), ("nvfp4", None)]
)
def test_quantisers(scheme, group):
    first, second = (np.random.default_rng(seed).standard_normal((2, 260, 1024), np.float32) for seed in range(2))
    x, other, kept = on(cupy, first), on(cupy, second), []

    def call():
        kept.clear()  # so that the pool has the memory again
        kept.append(cumoe.quantize(x, scheme, group))
        kept.append(cumoe.dequantize(kept[0]))

    stream = cupy.cuda.Stream(non_blocking=True)
    graph = capture(stream, call)
    cupy.copyto(x, other)
    cupy.cuda.get_current_stream().synchronize()
    graph.launch(stream)
    stream.synchronize()
    expected = cumoe.quantize(second, scheme, group)
    np.testing.assert_array_equal(kept[0].values.get().view(np.uint8), expected.values.view(np.uint8))
    np.testing.assert_array_equal(kept[1].get(), cumoe.dequantize(expected))
