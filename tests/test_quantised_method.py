"""The life of a quantised layer of every scheme: loaded, processed and run."""

import re
import types

import numpy as np
import pytest
from methods import config_of, routed
from quantised_methods import KINDS, H, I, arguments, kind_of, load, loaded, ready, unloaded
from sides import back, device_of, on
from strategies import make_problem
from test_method import address
from test_modular import BATCHED, STANDARD, exchanging

import cumoe
from cumoe import QuantizedFusedMoEMethod
from cumoe.method import BatchedExperts, ExpertTokensMetadata

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def some_problem(dtype="bfloat16", seed=0, **changes):
    return make_problem(7, 2, 4, H, I, **{"dtype": dtype, "seed": seed} | changes)


# -- running ----------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_mul"])
def test_equals_the_layer_of_the_builder(xp, kind, activation):
    problem = some_problem(activation=activation, bias=True)
    given, named = arguments(loaded(kind, problem), problem, xp)
    expected = cumoe.fused_experts(*given, **named)
    method, layer = ready(kind, problem, xp)
    out = method.apply(layer, *routed(problem, xp), check=True)
    assert back(out).tobytes() == back(expected).tobytes()
    verified = cumoe.verify(out, *given, **named, sample=None)
    assert verified.ok, str(verified)


@each_kind
def test_routing_inside(xp, kind):
    problem = some_problem()
    method, layer = ready(kind, problem, xp)
    logits = on(xp, np.random.default_rng(0).standard_normal((7, 4), np.float32))
    x = on(xp, problem.hidden_states)
    weights, ids = cumoe.fused_topk(logits, 2)
    expected = method.apply(layer, x, weights, ids)
    assert back(method.apply_monolithic(layer, x, logits)).tobytes() == back(expected).tobytes()


@each_kind
def test_new_weights_are_prepared_in_place(xp, kind):
    old, new = some_problem(bias=True), some_problem(bias=True, seed=1)
    method, layer = ready(kind, old, xp)
    weights = {name: (value, address(value)) for name, value in vars(layer).items() if hasattr(value, "shape")}
    prepared = layer.prepared_experts
    places = address(prepared.experts.w1), address(prepared.experts.w2), address(prepared.experts.scheme.w1.factor)
    load(layer, loaded(kind, new).weights, new, xp)
    method.process_weights_after_loading(layer)
    for name, (value, place) in weights.items():
        assert getattr(layer, name) is value and address(value) == place
    assert layer.prepared_experts is prepared
    experts = prepared.experts
    assert (address(experts.w1), address(experts.w2), address(experts.scheme.w1.factor)) == places
    given, named = arguments(loaded(kind, new), new, xp)
    expected = back(cumoe.fused_experts(*given, **named))
    assert back(method.apply(layer, *routed(new, xp))).tobytes() == expected.tobytes()


def test_the_config_holds_the_weights_of_the_layer_and_the_parameters():
    problem = some_problem(activation="swigluoai", bias=True)
    method, layer = ready(kind_of("fp8 block"), problem, swiglu_alpha=2.0)
    config = method.moe_quant_config
    assert config.w1_scale is layer.w13_weight_scale_inv and config.w2_scale is layer.w2_weight_scale_inv
    assert config.w1_bias is layer.w13_bias and config.w2_bias is layer.w2_bias
    assert (config.gemm1_alpha, config.block_shape, config.config_name("bfloat16")) == (2.0, [64, 32], "fp8_w8a8")


def test_padding_contributes_nothing(xp):
    """Smaller codes in the corner of larger weights: what is beyond stays as it was made."""
    kind, small = kind_of("mxfp4 w4a16"), some_problem("float32", bias=True)
    given, named = arguments(loaded(kind, small), small, xp)
    expected = back(cumoe.fused_experts(*given, **named))
    config = config_of(
        small,
        xp,
        hidden_dim=192,
        hidden_dim_unpadded=H,
        intermediate_size_per_partition=128,
        intermediate_size_per_partition_unpadded=I,
    )
    method, layer = QuantizedFusedMoEMethod(config, kind.scheme), types.SimpleNamespace()
    method.create_weights(layer, 4, 192, 128, "float32")
    weights = loaded(kind, small).weights
    for name, rows in (("w13_weight", H // 2), ("w13_weight_scale", H // 32)):
        for half in range(2):
            part = weights[name][:, half * I : half * I + I]
            getattr(layer, name)[:, half * 128 : half * 128 + I, :rows] = on(xp, np.ascontiguousarray(part))
    layer.w2_weight[:, :H, : I // 2] = on(xp, weights["w2_weight"])
    layer.w2_weight_scale[:, :H, : I // 32] = on(xp, weights["w2_weight_scale"])
    layer.w13_bias[:, :I], layer.w13_bias[:, 128 : 128 + I] = (on(xp, half) for half in np.split(small.w1_bias, 2, 1))
    layer.w2_bias[:, :H] = on(xp, small.w2_bias)
    method.process_weights_after_loading(layer)
    x = np.zeros((7, 192), np.float32)
    x[:, :H] = small.hidden_states
    out = back(method.apply(layer, on(xp, x), *routed(small, xp)[1:]))
    verified = cumoe.verify(on(xp, np.ascontiguousarray(out[:, :H])), *given, **named, sample=None)
    assert verified.ok, str(verified)
    assert expected.shape == (7, H) and not out[:, H:].any()


def test_tensors_in_the_layer():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for name in ("fp8 static", "int4 fp8", "nvfp4 w4a4", "int4, zero points"):
        kind, problem = kind_of(name), some_problem("float32")
        method, layer = ready(kind, problem)
        expected = method.apply(layer, *routed(problem))
        tensors = types.SimpleNamespace()
        for part in method._options.names:
            array = np.asarray(getattr(layer, part))
            if array.dtype.name == "float8_e4m3fn":
                setattr(tensors, part, torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn))
            else:
                setattr(tensors, part, torch.from_numpy(array))
        method.process_weights_after_loading(tensors)
        out = method.apply(tensors, *(torch.from_numpy(array) for array in routed(problem)))
        assert isinstance(out, torch.Tensor) and out.numpy().tobytes() == expected.tobytes()


# -- ranks ------------------------------------------------------------------------------------------


def exchanging_rank(kind, problem, xp, backend):
    """A rank that exchanges tokens, and the map of its experts."""
    method, layer = ready(kind, problem, xp, moe_parallel_config=exchanging(0, backend=backend), max_num_tokens=20)
    return method, layer, on(xp, np.arange(len(problem.w1), dtype=np.int32))


@each_kind
def test_standard_steps_give_the_bits_of_the_plain_layer(xp, kind):
    problem = some_problem(skipped=0.2)
    plain, layer = ready(kind, problem, xp)
    expected = back(plain.apply(layer, *routed(problem, xp)))
    method, layer, expert_map = exchanging_rank(kind, problem, xp, STANDARD)
    assert back(method.apply(layer, *routed(problem, xp), expert_map=expert_map)).tobytes() == expected.tobytes()


PER_ROW = ("fp8 token", "fp8 block", "fp8 static", "int8 token", "int4", "int4 fp8", "mxfp4 w4a16", "mxfp4 w4a4")


@pytest.mark.parametrize("name", [*PER_ROW, "mxfp4 mxfp8", "nvfp4 w4a4", "nvfp4 w4a16"])
def test_batched_steps(xp, name):
    kind = kind_of(name)
    for dtype in ("float32", "bfloat16"):
        problem = some_problem(dtype, bias=True, skipped=0.2)
        method, layer, expert_map = exchanging_rank(kind, problem, xp, BATCHED)
        assert isinstance(method.experts, BatchedExperts)
        out = method.apply(layer, *routed(problem, xp), expert_map=expert_map)
        given, named = arguments(loaded(kind, problem), problem, xp)
        verified = cumoe.verify(out, *given, **named, sample=None)
        assert verified.ok, str(verified)
        # nothing is rounded between the second product and the weight; a GPU adds each weighted row in one operation
        if dtype == "float32" and xp is np:
            np.testing.assert_array_equal(back(out), back(cumoe.fused_experts(*given, **named)))


@pytest.mark.parametrize("name", ["fp8 tensor", "int8 tensor", "mxfp4 w4a8", "fp8 token", "nvfp4 w4a4"])
@pytest.mark.parametrize("prepared", [False, True])
def test_batched_experts_read_used_slots_only(xp, name, prepared):
    problem = some_problem("float32")
    made = loaded(kind_of(name), problem)
    (_, w1, w2, *_), named = arguments(made, problem, xp)
    config = named["quant_config"]
    weights = (cumoe.prepare(w1, w2, quant_config=config), None) if prepared else (w1, w2)
    counts = np.array([2, 0, 5, 1], np.int32)
    x = np.random.default_rng(0).standard_normal((4, 5, H), np.float32)
    outs = []
    for filler in (0, np.nan, 1e30):
        x[np.arange(5)[None, :] >= counts[:, None]] = filler
        out = xp.full((4, 5, H), np.nan, np.float32)
        meta = ExpertTokensMetadata(on(xp, counts))
        BatchedExperts(5, 1, config).apply(out, on(xp, x), *weights, None, None, expert_tokens_meta=meta)
        outs.append(back(out))
    assert np.isfinite(outs[0]).all() and outs[0][2].any()
    assert outs[0].tobytes() == outs[1].tobytes() == outs[2].tobytes()


@each_kind
def test_a_rank_without_experts(kind):
    problem = some_problem("float32")
    config = config_of(problem, num_local_experts=0)
    method, layer = QuantizedFusedMoEMethod(config, kind.scheme, **kind.options), types.SimpleNamespace()
    method.create_weights(layer, 0, H, I, "float32")
    method.process_weights_after_loading(layer)
    assert not method.apply(layer, *routed(problem)).any()


# -- before it runs ---------------------------------------------------------------------------------


@each_kind
def test_new_weights_contribute_nothing(kind):
    problem = some_problem("float32")
    method, layer = unloaded(kind, problem)
    method.process_weights_after_loading(layer)
    assert not method.apply(layer, *routed(problem)).any()


@each_kind
def test_processing_needs_every_weight(kind):
    problem = some_problem(bias=True)
    method, layer = unloaded(kind, problem)
    for name in [name for name, value in vars(layer).items() if hasattr(value, "shape")]:
        partly = types.SimpleNamespace(**{other: value for other, value in vars(layer).items() if other != name})
        with raises(ValueError, f"layer must have {name}; call create_weights or set it"):
            method.process_weights_after_loading(partly)
    with raises(ValueError, "layer must have prepared_experts; call process_weights_after_loading first"):
        method.apply(layer, *routed(problem))


def test_weights_of_another_scheme_are_not_prepared_in_place():
    problem = some_problem()
    _, layer = ready(kind_of("int4"), problem)
    method, other = ready(kind_of("fp8 block"), problem)
    other.prepared_experts = layer.prepared_experts
    with pytest.raises(
        ValueError, match=r"^out must have been prepared with scales and zero points of the same shapes"
    ):
        method.process_weights_after_loading(other)


def test_the_device_decides_the_backend(xp):
    method = QuantizedFusedMoEMethod(config_of(some_problem(), xp), "int8_w8a16")
    assert (method.scheme, method.backend) == ("int8_w8a16", "cpu" if xp is np else "rawkernels")
    assert method.is_monolithic is (device_of(xp) == "cpu")
    assert method.moe_quant_config is method.experts is method.prepare_finalize is None
