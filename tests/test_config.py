"""The layer's configuration: sizes, parallel groups, routing method."""

import dataclasses
import pickle
import re

import pytest

import cumoe
from cumoe import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

SINGLE = FusedMoEParallelConfig.make_no_parallel()


def moe_config(**changes):
    sizes = {
        "num_experts": 8,
        "experts_per_token": 2,
        "hidden_dim": 64,
        "num_local_experts": 8,
        "moe_parallel_config": SINGLE,
        "in_dtype": "bfloat16",
    }
    return FusedMoEConfig(**sizes | changes)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# (tp, dp, expert parallel) -> for each device: TP, DP, EP as (size, rank); then use_ep, use_all2all_kernels
ROWS = [
    ((1, 1, False), [((1, 0), (1, 0), (1, 0))], False, False),
    ((1, 1, True), [((1, 0), (1, 0), (1, 0))], False, False),
    ((2, 1, False), [((2, 0), (1, 0), (1, 0)), ((2, 1), (1, 0), (1, 0))], False, False),
    ((1, 2, False), [((2, 0), (2, 0), (1, 0)), ((2, 1), (2, 1), (1, 0))], False, False),
    (
        (2, 2, False),
        [((4, 0), (2, 0), (1, 0)), ((4, 1), (2, 0), (1, 0)), ((4, 2), (2, 1), (1, 0)), ((4, 3), (2, 1), (1, 0))],
        False,
        False,
    ),
    ((2, 1, True), [((1, 0), (1, 0), (2, 0)), ((1, 0), (1, 0), (2, 1))], True, False),
    ((1, 2, True), [((1, 0), (2, 0), (2, 0)), ((1, 0), (2, 1), (2, 1))], True, True),
    (
        (2, 2, True),
        [((1, 0), (2, 0), (4, 0)), ((1, 0), (2, 0), (4, 1)), ((1, 0), (2, 1), (4, 2)), ((1, 0), (2, 1), (4, 3))],
        True,
        True,
    ),
]


@pytest.mark.parametrize(("asked", "devices", "use_ep", "all2all"), ROWS, ids=[str(row[0]) for row in ROWS])
def test_make_gives_the_documented_groups(asked, devices, use_ep, all2all):
    tp_size, dp_size, enable = asked
    assert len(devices) == tp_size * dp_size
    for device, (tp, dp, ep) in enumerate(devices):
        config = FusedMoEParallelConfig.make(
            tp_size,
            dp_size,
            enable_expert_parallel=enable,
            tp_rank=device % tp_size,
            dp_rank=device // tp_size,
        )
        assert (config.tp_size, config.tp_rank) == tp
        assert (config.dp_size, config.dp_rank) == dp
        assert (config.ep_size, config.ep_rank) == ep
        assert config.use_ep is use_ep
        assert config.use_all2all_kernels is all2all


def test_make_flattens_context_parallel_ranks_between_data_and_tensor():
    seen = []
    for dp_rank in range(2):
        for pcp_rank in range(3):
            for tp_rank in range(2):
                config = FusedMoEParallelConfig.make(
                    2,
                    2,
                    enable_expert_parallel=True,
                    tp_rank=tp_rank,
                    dp_rank=dp_rank,
                    pcp_size=3,
                    pcp_rank=pcp_rank,
                )
                assert config.ep_size == 12 and config.pcp_size == 3 and config.pcp_rank == pcp_rank
                seen.append(config.ep_rank)
    assert seen == list(range(12))


@pytest.mark.parametrize(("groups", "expected"), [({"pcp_size": 2}, True), ({"tp_size": 2, "sp_size": 2}, True)])
def test_context_and_sequence_parallel_move_tokens_too(groups, expected):
    config = FusedMoEParallelConfig.make(**groups, enable_expert_parallel=True)
    assert config.use_all2all_kernels is expected
    assert not FusedMoEParallelConfig.make(**groups).use_all2all_kernels


FLAGS = {
    "pplx": "use_pplx_kernels",
    "deepep_high_throughput": "use_deepep_ht_kernels",
    "deepep_low_latency": "use_deepep_ll_kernels",
    "deepep_v2": "use_deepep_v2_kernels",
    "mori_high_throughput": "use_mori_kernels",
    "mori_low_latency": "use_mori_kernels",
    "nixl_ep": "use_nixl_ep_kernels",
    "flashinfer_nvlink_two_sided": "use_fi_nvl_two_sided_kernels",
    "flashinfer_all2allv": "use_fi_nvl_two_sided_kernels",
    "flashinfer_nvlink_one_sided": "use_fi_nvl_one_sided_kernels",
    "allgather_reducescatter": "use_ag_rs_all2all_kernels",
    "naive": None,
    "moonep": None,
    "passthrough": None,
}


@pytest.mark.parametrize("backend", FLAGS)
def test_each_all2all_backend_sets_its_own_flag(backend):
    with_all2all = FusedMoEParallelConfig.make(1, 2, enable_expert_parallel=True, all2all_backend=backend)
    without = FusedMoEParallelConfig.make(2, 1, enable_expert_parallel=True, all2all_backend=backend)
    for flag in set(FLAGS.values()) - {None}:
        assert getattr(with_all2all, flag) is (flag == FLAGS[backend])
        assert getattr(without, flag) is False
        assert getattr(moe_config(moe_parallel_config=with_all2all), flag) is (flag == FLAGS[backend])
    batched = backend in ("deepep_low_latency", "nixl_ep")
    assert with_all2all.use_batched_activation_format is batched
    assert with_all2all.needs_round_robin_routing_tables is batched


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"tp_size": 0}, ValueError, "tp_size must be >= 1, got 0"),
        ({"tp_rank": 1}, ValueError, "tp_rank must be in 0..0, got 1"),
        ({"dp_size": 2, "dp_rank": 2}, ValueError, "dp_rank must be in 0..1, got 2"),
        ({"pcp_size": 2.0}, TypeError, "pcp_size must be an int, got float"),
        ({"sp_size": 0}, ValueError, "sp_size must be >= 1, got 0"),
        ({"tp_size": True}, TypeError, "tp_size must be an int, got bool"),
    ],
)
def test_make_refuses_impossible_groups(arguments, kind, message):
    with raises(kind, message):
        FusedMoEParallelConfig.make(**arguments)


def test_parallel_config_refuses_contradictions():
    with raises(ValueError, "ep_size must be 1 without use_ep, got 2"):
        FusedMoEParallelConfig(1, 1, 2, 0, 0, 0, use_ep=False)
    with raises(ValueError, "ep_rank must be in 0..1, got 2"):
        FusedMoEParallelConfig(1, 1, 2, 0, 0, 2, use_ep=True)
    with pytest.raises(ValueError, match=r"^all2all_backend must be allgather_reducescatter, .* got 'nccl'$"):
        FusedMoEParallelConfig.make(all2all_backend="nccl")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SINGLE.tp_size = 2


def test_config_defaults():
    config = moe_config()
    assert config.max_num_tokens == 256 and config.has_bias is False
    assert config.is_act_and_mul is True and config.activation == "silu" and config.w13_num_shards == 2
    assert config.router_logits_dtype == "bfloat16"
    assert config.hidden_dim_unpadded == 64 and config.num_logical_experts == 8
    assert config.moe_backend == "auto" and config.device == "cpu"
    assert config.routing_method is RoutingMethodType.Unspecified
    assert config.intermediate_size is None and config.intermediate_size_per_partition_unpadded is None
    assert config.swiglu_limit is config.swiglu_alpha is config.swiglu_beta is None
    assert config.use_flashinfer_cutlass_kernels is False
    assert FusedMoEConfig(8, 2, 64, 8, SINGLE, "bfloat16", 7, True) == moe_config(max_num_tokens=7, has_bias=True)


def test_config_passes_its_parallel_config_through():
    parallel = FusedMoEParallelConfig.make(
        2, 3, enable_expert_parallel=True, tp_rank=1, dp_rank=2, sp_size=2, all2all_backend="deepep_low_latency"
    )
    config = moe_config(moe_parallel_config=parallel, num_local_experts=1)
    for group in ("tp", "dp", "ep", "pcp"):
        assert getattr(config, f"{group}_size") == getattr(parallel, f"{group}_size")
        assert getattr(config, f"{group}_rank") == getattr(parallel, f"{group}_rank")
    assert (config.ep_size, config.ep_rank, config.sp_size) == (6, 5, 2)
    assert config.use_ep and config.is_sequence_parallel and config.use_all2all_kernels
    assert config.use_deepep_ll_kernels and config.needs_round_robin_routing_tables


@pytest.mark.parametrize(
    ("given", "activation", "gated"),
    [
        ({}, "silu", True),
        ({"activation": "relu2_no_mul"}, "relu2_no_mul", False),
        ({"is_act_and_mul": False}, "silu_no_mul", False),
        ({"is_act_and_mul": False, "activation": "gelu"}, "gelu_no_mul", False),
        ({"is_act_and_mul": False, "activation": "gelu_no_mul"}, "gelu_no_mul", False),
        ({"is_act_and_mul": True, "activation": "swigluoai"}, "swigluoai", True),
    ],
)
def test_activation_and_is_act_and_mul_agree(given, activation, gated):
    config = moe_config(**given)
    assert (config.activation, config.is_act_and_mul) == (activation, gated)
    assert config.w13_num_shards == 1 + gated


def test_width_follows_from_either_size():
    halves = FusedMoEParallelConfig.make(2)
    config = moe_config(moe_parallel_config=halves, intermediate_size=96)
    assert config.intermediate_size_per_partition == config.intermediate_size_per_partition_unpadded == 48
    config = moe_config(moe_parallel_config=halves, intermediate_size_per_partition=48)
    assert config.intermediate_size == 96
    config = moe_config(moe_parallel_config=halves, intermediate_size=97, tp_shard_with_padding=True)
    assert config.intermediate_size_per_partition == 49


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be >= 1, got 0"),
        ({"experts_per_token": 9}, ValueError, "experts_per_token must be in 1..8, got 9"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim must be >= 1, got 0"),
        ({"num_local_experts": 9}, ValueError, "num_local_experts must be in 0..8, got 9"),
        ({"hidden_dim_unpadded": 65}, ValueError, "hidden_dim_unpadded must be in 1..64, got 65"),
        ({"num_logical_experts": 9}, ValueError, "num_logical_experts must be in 1..8, got 9"),
        (
            {"intermediate_size": 32, "intermediate_size_per_partition_unpadded": 33},
            ValueError,
            "intermediate_size_per_partition_unpadded must be in 1..32, got 33",
        ),
        ({"max_num_tokens": 0}, ValueError, "max_num_tokens must be >= 1, got 0"),
        ({"in_dtype": None}, TypeError, "in_dtype must be a dtype or a name, got None"),
        ({"in_dtype": 4}, TypeError, "dtype must be a NumPy, ml_dtypes or torch dtype or a name, got int"),
        (
            {"moe_parallel_config": None},
            TypeError,
            "moe_parallel_config must be a FusedMoEParallelConfig, got NoneType",
        ),
        (
            {"activation": "silu_no_mul", "is_act_and_mul": True},
            ValueError,
            "activation must be gated when is_act_and_mul is True, got 'silu_no_mul'",
        ),
        (
            {"intermediate_size": 97, "moe_parallel_config": FusedMoEParallelConfig.make(2)},
            ValueError,
            "intermediate_size must be a multiple of tp_size = 2, got 97; or set tp_shard_with_padding=True",
        ),
        (
            {"intermediate_size": 96, "intermediate_size_per_partition": 95},
            ValueError,
            "intermediate_size_per_partition must be intermediate_size / tp_size = 96, got 95",
        ),
    ],
)
def test_config_refuses_impossible_sizes(changes, kind, message):
    with raises(kind, message):
        moe_config(**changes)


def test_routing_method_is_accepted_by_name():
    assert moe_config(routing_method="DeepSeekV3").routing_method is RoutingMethodType.DeepSeekV3
    assert moe_config(routing_method=RoutingMethodType.Llama4).routing_method is RoutingMethodType.Llama4
    with pytest.raises(ValueError, match=r"^routing_method must be Default, .* or Simulated, got 'deepseek'$"):
        moe_config(routing_method="deepseek")


def test_config_is_frozen_and_pickles():
    config = moe_config(intermediate_size=96)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 4
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, has_bias=True).has_bias


def test_routing_method_numbers():
    numbers = {method.name: method.value for method in RoutingMethodType}
    assert numbers == {
        "Default": 0,
        "Renormalize": 1,
        "DeepSeekV3": 2,
        "Llama4": 3,
        "RenormalizeNaive": 4,
        "TopK": 5,
        "SigmoidRenorm": 6,
        "MiniMax2": 7,
        "Sigmoid": 8,
        "Unspecified": 9,
        "DeepseekV4": 100,
        "Custom": 101,
        "Simulated": 102,
    }


@pytest.mark.parametrize(
    ("scoring_func", "renormalize", "groups", "bias", "name"),
    [
        ("softmax", False, None, False, "Default"),
        ("softmax", True, None, False, "RenormalizeNaive"),
        ("softmax", True, 8, True, "Unspecified"),
        ("sigmoid", False, None, False, "Sigmoid"),
        ("sigmoid", True, 8, False, "SigmoidRenorm"),
        ("sigmoid", True, 8, True, "DeepSeekV3"),
        ("sigmoid", True, 0, True, "MiniMax2"),
        ("sigmoid", True, None, True, "MiniMax2"),
        ("sigmoid", False, 8, True, "Unspecified"),
        ("sqrtsoftplus", True, None, True, "DeepseekV4"),
        ("sqrtsoftplus", True, None, False, "DeepseekV4"),
        ("sqrtsoftplus", False, None, True, "Unspecified"),
        ("tanh", True, None, False, "Unspecified"),
    ],
)
def test_get_routing_method_type(scoring_func, renormalize, groups, bias, name):
    assert cumoe.get_routing_method_type(scoring_func, 2, renormalize, groups, bias).name == name


def test_torch_dtypes_and_devices_are_held_untouched():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    config = moe_config(in_dtype=torch.bfloat16, device=torch.device("cpu"))
    assert config.in_dtype is config.router_logits_dtype is torch.bfloat16 and config.device == torch.device("cpu")
