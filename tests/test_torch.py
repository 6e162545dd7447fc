"""torch tensors go in without a copy, are never written, and the same kind comes out, with the bits of the side."""

import gc

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
import pytest
from sides import back, gpu, on
from strategies import DTYPES, make_problem

import cumoe
from cumoe import _arrays

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where the tensors are."""
    if request.param == "cuda":
        gpu()
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
    return request.param


def namespace(device):
    """The array library of a side."""
    return np if device == "cpu" else gpu()


def tensor(array, device="cpu"):
    """A torch tensor over the memory of a NumPy array, or a copy on the GPU."""
    narrow = array.dtype == "bfloat16"
    host = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(array)
    return host.to(device)


def tensors_of(given, device="cpu", layout=lambda t: t):
    return {key: layout(tensor(value, device)) for key, value in given.items()}


def array(value):
    """What a function gave, as NumPy arrays and plain values."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(array(one) for one in value)
    if not isinstance(value, torch.Tensor):
        return back(value)
    value = value.cpu()
    return value.view(torch.int16).numpy().view("bfloat16") if value.dtype == torch.bfloat16 else value.numpy()


def bits(value):
    """Dtype, shape and bytes of everything in a result."""
    if isinstance(value, tuple):
        return tuple(bits(one) for one in value)
    return (value.dtype.name, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def native(call, given, device):
    """What a call gives for the own arrays of the side, as NumPy arrays."""
    xp = namespace(device)
    return array(call({key: on(xp, value) for key, value in given.items()}))


def inputs(dtype):
    """NumPy arguments of all calls, by name."""
    problem = make_problem(11, 2, 4, 48, 40, dtype, bias=True, skipped=0.1)
    rng = np.random.default_rng(1)
    given = {name: getattr(problem, name) for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")}
    given |= {"w1_bias": problem.w1_bias, "w2_bias": problem.w2_bias}
    given |= {"router_logits": rng.standard_normal((11, 4), np.float32).astype(dtype)}
    given |= {"expert_map": np.array([1, -1, 0, 3, 2, -1], np.int32), "group_offsets": np.array([0, 2, 2, 7, 11])}
    given |= {"rows": rng.standard_normal((22, 48), np.float32).astype(dtype)}
    given |= {"inv_permuted_idx": rng.permutation(22).reshape(11, 2).astype(np.int32)}
    return given | {"expected": cumoe.fused_experts(*problem[:5])}


LAYER = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")


def layer(a):
    return [a[name] for name in LAYER]


def biased(a):
    return cumoe.biased_moe_quant_config(a["w1_bias"], a["w2_bias"])


# name -> the call; `out` is None or an array to be written
CALLS = {
    "fused_experts": lambda a, out=None: cumoe.fused_experts(*layer(a), out=out),
    "fused_experts with biases": lambda a, out=None: cumoe.fused_experts(*layer(a), quant_config=biased(a), out=out),
    "fused_experts with a map": lambda a, out=None: cumoe.fused_experts(
        *layer(a), expert_map=a["expert_map"], out=out, check=False
    ),
    "prepare": lambda a, out=None: cumoe.fused_experts(
        a["hidden_states"], cumoe.prepare(a["w1"], a["w2"]), None, a["topk_weights"], a["topk_ids"], out=out
    ),
    "fused_moe": lambda a, out=None: cumoe.fused_moe(*layer(a)[:3], a["router_logits"], top_k=2, out=out, check=True),
    "grouped_gemm": lambda a, out=None: cumoe.grouped_gemm(
        a["hidden_states"], a["w1"], a["group_offsets"], bias=a["w1_bias"], out=out
    ),
    "silu_and_mul": lambda a, out=None: cumoe.silu_and_mul(a["hidden_states"], out=out),
    "moe_unpermute": lambda a, out=None: cumoe.moe_unpermute(
        a["rows"], a["topk_weights"], a["inv_permuted_idx"], out=out
    ),
    "moe_sum": lambda a, out=None: cumoe.moe_sum(a["rows"].reshape(11, 2, 48), a["topk_ids"], out=out),
}
OTHER_CALLS = {
    "fused_topk": lambda a: cumoe.fused_topk(a["router_logits"], 2, return_token_expert_indices=True),
    "grouped_topk": lambda a: cumoe.grouped_topk(a["router_logits"], 2, num_expert_group=2, topk_group=1),
    "select_experts": lambda a: cumoe.select_experts(a["hidden_states"], a["router_logits"], 2),
    "moe_align_block_size": lambda a: cumoe.moe_align_block_size(a["topk_ids"], 8, 6, expert_map=a["expert_map"]),
    "moe_permute": lambda a: cumoe.moe_permute(a["hidden_states"], None, a["topk_ids"], 6, 4, a["expert_map"]),
    "moe_batch": lambda a: cumoe.moe_batch(a["hidden_states"], a["topk_ids"], 4, 11),
    "verify": lambda a: cumoe.verify(a["expected"], *layer(a)),
}
ALL = CALLS | OTHER_CALLS


def turned(t):
    """The same numbers, the inner axis not contiguous."""
    return t if t.ndim < 2 else t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("layout", [lambda t: t, turned], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_tensors_in_tensors_out_same_bits(device, name, dtype, layout):
    given = inputs(dtype)
    expected = bits(native(ALL[name], given, device))
    tensors = tensors_of(given, device, layout)
    before = [bits(array(t)) for t in tensors.values()]
    found = ALL[name](tensors)
    for one in found if isinstance(found, tuple) else (found,):
        assert one is None or isinstance(one, torch.Tensor | cumoe.Verification)
        assert not isinstance(one, torch.Tensor) or one.device.type == device
    assert bits(array(found)) == expected
    assert [bits(array(t)) for t in tensors.values()] == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_a_given_tensor_is_written_and_returned(device, name, dtype):
    given = inputs(dtype)
    expected = native(CALLS[name], given, device)
    out = torch.full(expected.shape, torch.nan, dtype=tensor(expected).dtype, device=device)
    address = out.data_ptr()
    assert CALLS[name](tensors_of(given, device), out=out) is out
    assert out.data_ptr() == address
    assert bits(array(out)) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_numpy_inputs_may_be_read_only_and_are_not_written(name, dtype):
    given = inputs(dtype)
    expected = bits(ALL[name](given))
    before = {key: bits(value) for key, value in given.items()}
    for value in given.values():
        value.flags.writeable = False
    assert bits(ALL[name](given)) == expected
    assert {key: bits(value) for key, value in given.items()} == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_read_the_tensors_themselves(device, dtype, monkeypatch):
    given = tensors_of(inputs(dtype), device)
    out = torch.empty_like(given["hidden_states"])
    seen = []
    room = _arrays.room(namespace(device), "grouped_gemm")
    run = room.grouped_gemm

    def spy(x, permuted_idx, top_k, input_scale, weights, *others):
        seen.append(tuple(one.ctypes.data if device == "cpu" else one.data.ptr for one in (x, weights)))
        run(x, permuted_idx, top_k, input_scale, weights, *others)

    monkeypatch.setattr(room, "grouped_gemm", spy)
    cumoe.fused_experts(*layer(given), out=out)
    assert seen[0] == (given["hidden_states"].data_ptr(), given["w1"].data_ptr())
    assert seen[1][1] == given["w2"].data_ptr()


def test_results_outlive_their_inputs(device):
    given = inputs("bfloat16")
    expected = bits(native(CALLS["fused_experts"], given, device))
    tensors = {key: tensor(value.copy(), device) for key, value in given.items()}
    out = cumoe.fused_experts(*layer(tensors))
    prepared = cumoe.prepare(tensors["w1"], tensors["w2"])
    del tensors["w1"], tensors["w2"]
    gc.collect()
    again = cumoe.fused_experts(tensors["hidden_states"], prepared, None, tensors["topk_weights"], tensors["topk_ids"])
    assert bits(array(out)) == bits(array(again)) == expected


def test_one_preparation_serves_both_libraries(device):
    given, xp = inputs("bfloat16"), namespace(device)
    tensors, own = tensors_of(given, device), {key: on(xp, value) for key, value in given.items()}
    prepared = cumoe.prepare(tensors["w1"], tensors["w2"])
    results = [
        cumoe.fused_experts(one["hidden_states"], prepared, None, one["topk_weights"], one["topk_ids"])
        for one in (own, tensors)
    ]
    assert isinstance(results[0], xp.ndarray)
    assert isinstance(results[1], torch.Tensor)
    assert bits(array(results[0])) == bits(array(results[1]))


def test_a_routing_function_gets_the_tensors_themselves(device):
    given = tensors_of(inputs("bfloat16"), device)
    seen = []

    def route(hidden_states, gating_output, topk, renormalize):
        seen.extend([hidden_states, gating_output])
        return torch.topk(torch.softmax(gating_output.float(), dim=-1), topk)

    x, logits = given["hidden_states"], given["router_logits"]
    out = cumoe.fused_moe(x, given["w1"], given["w2"], logits, top_k=2, custom_routing_function=route)
    assert seen[0] is x
    assert seen[1] is logits
    weights, ids = route(x, logits, 2, False)
    assert torch.equal(out, cumoe.fused_experts(x, given["w1"], given["w2"], weights, ids))


def test_parameters_that_are_frozen_are_tensors_like_others(device):
    given = tensors_of(inputs("float32"), device)
    expected = cumoe.fused_experts(*layer(given))
    for name in ("w1", "w2"):
        given[name] = torch.nn.Parameter(given[name], requires_grad=False)
    with torch.inference_mode():
        assert torch.equal(cumoe.fused_experts(*layer(given)), expected)
