"""The life of a layer until it runs: backend, weights, preparing."""

import re
import types

import ml_dtypes
import numpy as np
import pytest
from methods import config_of, load, ready, routed
from sides import back, device_of, on
from strategies import make_problem
from test_moe import assert_within, law

import cumoe
from cumoe import FUSED_MOE_UNQUANTIZED_CONFIG, UnquantizedFusedMoEMethod
from cumoe.method import select_backend


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# -- backend ----------------------------------------------------------------------------------------


def some_config(**changes):
    return config_of(make_problem(1, 2, 4, 8, 16), **changes)


def test_auto_takes_the_backend_of_the_device():
    method = UnquantizedFusedMoEMethod(some_config())
    assert method.backend == "cpu"
    assert method.refused_backends == {"rawkernels": "device is 'cpu', it runs on cuda"}
    assert select_backend(some_config(moe_backend="cpu")) == (method.backend, method.refused_backends)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda:1"}, "device is 'cuda:1', it runs on cpu"),
        ({"in_dtype": np.float64}, "in_dtype is float64, its kernels take float32, float16, bfloat16"),
        ({"is_lora_enabled": True}, "is_lora_enabled is set, its kernels have no adapters"),
    ],
)
def test_a_backend_asked_for_is_refused_with_its_reason(changes, reason):
    with raises(NotImplementedError, f"moe_backend 'cpu' cannot run: {reason}"):
        UnquantizedFusedMoEMethod(some_config(moe_backend="cpu", **changes))


def test_all_reasons_are_told_when_nobody_can_run():
    with raises(
        NotImplementedError,
        "no moe_backend can run: rawkernels: device is 'cpu', it runs on cuda; "
        "cpu: is_lora_enabled is set, its kernels have no adapters",
    ):
        UnquantizedFusedMoEMethod(some_config(is_lora_enabled=True))
    with raises(NotImplementedError, "moe_backend 'rawkernels' cannot run: device is 'cpu', it runs on cuda"):
        UnquantizedFusedMoEMethod(some_config(moe_backend="rawkernels"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_backend": "triton"}, "moe_backend must be auto, rawkernels or cpu, got 'triton'"),
        (
            {"activation": "swigluoai_uninterleave"},
            "limit must be given for 'swigluoai_uninterleave', got None; "
            "set quant_config.gemm1_clamp_limit or moe_config.swiglu_limit",
        ),
        (
            {"swiglu_alpha": 2.0},
            "moe_config.swiglu_alpha must be None for 'silu', which does not use it, got 2.0",
        ),
    ],
)
def test_what_no_backend_could_mean_is_refused(changes, message):
    with raises(ValueError, message):
        UnquantizedFusedMoEMethod(some_config(**changes))


def test_unknown_activation_and_wrong_config_are_refused():
    with pytest.raises(ValueError, match=r"^activation must be silu, .* got 'swish'$"):
        UnquantizedFusedMoEMethod(some_config(activation="swish"))
    with raises(TypeError, "moe must be a FusedMoEConfig, got dict"):
        UnquantizedFusedMoEMethod({})


def test_the_gpu_side_runs_on_cuda_devices():
    """Chosen where there is one; else told why not."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.is_available():
        method = UnquantizedFusedMoEMethod(some_config(device="cuda"))
        assert method.backend == "rawkernels"
        assert method.refused_backends == {"cpu": "device is 'cuda', it runs on cpu"}
        with raises(NotImplementedError, "moe_backend 'cpu' cannot run: device is 'cuda:0', it runs on cpu"):
            UnquantizedFusedMoEMethod(some_config(device="cuda:0", moe_backend="cpu"))
        return
    with raises(
        NotImplementedError,
        "no moe_backend can run: rawkernels: device 'cuda' needs a CUDA device and its driver, there is none here; "
        "cpu: device is 'cuda', it runs on cpu",
    ):
        UnquantizedFusedMoEMethod(some_config(device="cuda"))


def test_properties():
    method = UnquantizedFusedMoEMethod(some_config())
    assert method.supports_eplb is True and method.allow_inplace is True and method.is_monolithic is True
    assert method.topk_indices_dtype is None
    assert method.moe_quant_config is None and method.maybe_make_prepare_finalize() is None


# -- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", np.float16, np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16])
@pytest.mark.parametrize(("activation", "shards"), [("silu", 2), ("swigluoai", 2), ("relu2_no_mul", 1)])
def test_create_weights(xp, dtype, activation, shards):
    config = some_config(activation=activation, has_bias=True, device=device_of(xp))
    method, layer = UnquantizedFusedMoEMethod(config), types.SimpleNamespace()
    method.create_weights(layer, 4, 8, 16, dtype, weight_loader=len, quant_method="none")
    shapes = {name: weight.shape for name, weight in vars(layer).items()}
    assert shapes == {
        "w13_weight": (4, 16 * shards, 8),
        "w13_bias": (4, 16 * shards),
        "w2_weight": (4, 8, 16),
        "w2_bias": (4, 8),
    }
    for weight in vars(layer).values():
        assert weight.dtype == np.dtype(dtype)
        assert isinstance(weight, cumoe.Parameter if xp is np else xp.ndarray)
        assert weight.weight_loader is len and weight.quant_method == "none"
        assert weight[1:].weight_loader is len
    assert not back(layer.w13_bias).any() and not back(layer.w2_bias).any()


def test_create_weights_without_bias_and_with_torch_dtypes():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    method, layer = UnquantizedFusedMoEMethod(some_config(in_dtype=torch.bfloat16)), types.SimpleNamespace()
    method.create_weights(layer, 4, 8, 16, torch.bfloat16)
    assert set(vars(layer)) == {"w13_weight", "w2_weight"}
    assert layer.w13_weight.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ((5, 8, 16, "float32"), ValueError, "num_experts must be num_local_experts of the config = 4, got 5"),
        ((4, 9, 16, "float32"), ValueError, "hidden_size must be hidden_dim of the config = 8, got 9"),
        (
            (4, 8, 17, "float32"),
            ValueError,
            "intermediate_size_per_partition must be intermediate_size_per_partition of the config = 16, got 17",
        ),
        ((4, 8, 16, "float64"), TypeError, "params_dtype must be float32, float16 or bfloat16, got float64"),
        ((4, 8, 0, "float32"), ValueError, "intermediate_size_per_partition must be >= 1, got 0"),
    ],
)
def test_create_weights_refuses_other_sizes(sizes, kind, message):
    with raises(kind, message):
        UnquantizedFusedMoEMethod(some_config()).create_weights(types.SimpleNamespace(), *sizes)


def test_processing_needs_weights():
    method, layer = UnquantizedFusedMoEMethod(some_config(has_bias=True)), types.SimpleNamespace()
    with raises(ValueError, "layer must have w13_weight; call create_weights or set it"):
        method.process_weights_after_loading(layer)
    method.create_weights(layer, 4, 8, 16, "float32")
    del layer.w2_bias
    with raises(ValueError, "layer must have w2_bias; call create_weights or set it"):
        method.process_weights_after_loading(layer)


def test_running_needs_processed_weights():
    problem = make_problem(3, 2, 4, 8, 16)
    method, layer = UnquantizedFusedMoEMethod(config_of(problem)), types.SimpleNamespace()
    method.create_weights(layer, 4, 8, 16, "float32")
    with raises(ValueError, "layer must have prepared_experts; call process_weights_after_loading first"):
        method.apply(layer, *routed(problem))


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_new_weights_are_prepared_in_place(xp, dtype, bias):
    old = make_problem(5, 2, 4, 33, 20, dtype, bias=bias)
    new = make_problem(5, 2, 4, 33, 20, dtype, bias=bias, seed=1)
    method, layer = ready(old, xp)
    weights = {name: (value, address(value)) for name, value in vars(layer).items() if name != "prepared_experts"}
    prepared = layer.prepared_experts
    panels = address(prepared.experts.w1), address(prepared.experts.w2)
    load(layer, new, xp)
    method.process_weights_after_loading(layer)
    for name, (value, place) in weights.items():
        assert getattr(layer, name) is value and address(value) == place
    assert layer.prepared_experts is prepared
    assert (address(prepared.experts.w1), address(prepared.experts.w2)) == panels
    expected = back(method.apply(ready(new, xp)[1], *routed(new, xp)))
    assert back(method.apply(layer, *routed(new, xp))).tobytes() == expected.tobytes()
    assert_within(expected, law(new))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 21}, "out must have intermediate_size = 21, got 20"),
        ({"hidden_size": 32}, "out must have hidden_size = 32, got 33"),
        ({"num_experts": 5}, "out must have num_experts = 5, got 4"),
        ({"dtype": "float16"}, "out must have dtype = 'float16', got 'float32'"),
        ({"activation": "gelu"}, "out must have activation = 'gelu', got 'silu'"),
        ({"bias": False}, "out must have been prepared with no w1_bias, like quant_config; prepare it anew"),
    ],
)
def test_weights_of_another_kind_are_not_prepared_in_place(changes, message):
    sizes = {"num_experts": 4, "hidden_size": 33, "intermediate_size": 20, "bias": True}
    _, layer = ready(make_problem(1, 2, **sizes))
    before = layer.prepared_experts.experts.w1.tobytes()
    method, other = ready(make_problem(1, 2, **sizes | changes, seed=1))
    other.prepared_experts = layer.prepared_experts
    with raises(ValueError, message):
        method.process_weights_after_loading(other)
    assert layer.prepared_experts.experts.w1.tobytes() == before


def test_processing_does_not_change_full_sized_weights(xp):
    problem = make_problem(3, 2, 4, 8, 16, bias=True)
    _, layer = ready(problem, xp)
    for name, array in (
        ("w13_weight", problem.w1),
        ("w2_weight", problem.w2),
        ("w13_bias", problem.w1_bias),
        ("w2_bias", problem.w2_bias),
    ):
        assert back(getattr(layer, name)).tobytes() == array.tobytes()


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "gelu_no_mul"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_cleared(xp, activation, bias, dtype):
    small = make_problem(6, 2, 4, 24, 12, dtype, activation, bias)
    hidden, width = 32, 16
    method = UnquantizedFusedMoEMethod(
        config_of(
            small,
            xp,
            hidden_dim=hidden,
            hidden_dim_unpadded=24,
            intermediate_size_per_partition=width,
            intermediate_size_per_partition_unpadded=12,
        )
    )
    layer = types.SimpleNamespace()
    method.create_weights(layer, 4, hidden, width, dtype)
    for array in vars(layer).values():
        array.view(np.uint8)[...] = 0xFF  # NaN: what no loader writes
    rows = np.arange(len(small.w1[0]))
    if activation == "silu":
        rows = np.concatenate([np.arange(12), width + np.arange(12)])
    loaded = {name: back(array).copy() for name, array in vars(layer).items()}
    loaded["w13_weight"][:, rows, :24] = small.w1
    loaded["w2_weight"][:, :24, :12] = small.w2
    if bias:
        loaded["w13_bias"][:, rows] = small.w1_bias
        loaded["w2_bias"][:, :24] = small.w2_bias
    for name, array in loaded.items():
        getattr(layer, name)[...] = on(xp, np.asarray(array))
    method.process_weights_after_loading(layer)
    x = np.zeros((6, hidden), dtype)
    x[:, :24] = small.hidden_states
    out = back(method.apply(layer, on(xp, x), *routed(small, xp)[1:]))
    assert_within(np.ascontiguousarray(out[:, :24]), law(small))
    assert not out[:, 24:].any()


def test_quant_config_carries_biases_and_parameters():
    method, layer = ready(make_problem(1, 2, 4, 8, 16))
    assert method.moe_quant_config is method.get_fused_moe_quant_config(layer) is FUSED_MOE_UNQUANTIZED_CONFIG
    method, layer = ready(make_problem(1, 2, 4, 8, 16, bias=True, activation="swigluoai"), swiglu_alpha=2.0)
    config = method.get_fused_moe_quant_config(layer)
    assert config.w1_bias is layer.w13_bias and config.w2_bias is layer.w2_bias
    assert (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit) == (2.0, None, None)
    method, layer = ready(make_problem(1, 2, 4, 8, 16, activation="situ"), activation_situ_linear_beta=4.0)
    config = method.get_fused_moe_quant_config(layer)
    assert config.w1_bias is None and (config.gemm1_beta, config.gemm1_clamp_limit) == (3.0, 4.0)
