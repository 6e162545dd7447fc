"""Layers with the weights of a problem, through their method."""

import types

import numpy as np
from sides import device_of, on
from test_moe import PARAMETERS

import cumoe
from cumoe import FusedMoEConfig, FusedMoEParallelConfig, UnquantizedFusedMoEMethod

SINGLE = FusedMoEParallelConfig.make_no_parallel()


def config_of(problem, xp=np, **changes):
    """The config that a problem belongs to, on the side of `xp`."""
    given = PARAMETERS.get(problem.activation, {})
    num_local, hidden_size, intermediate_size = problem.w2.shape
    fields = {
        "num_experts": num_local if problem.expert_map is None else len(problem.expert_map),
        "experts_per_token": problem.topk_ids.shape[1],
        "hidden_dim": hidden_size,
        "num_local_experts": num_local,
        "moe_parallel_config": SINGLE,
        "in_dtype": problem.w1.dtype,
        "has_bias": problem.w1_bias is not None,
        "activation": problem.activation,
        "intermediate_size_per_partition": intermediate_size,
        "swiglu_limit": given.get("limit"),
        "activation_situ_beta": given.get("beta"),
        "device": device_of(xp),
    }
    return FusedMoEConfig(**fields | changes)


def load(layer, problem, xp=np):
    """Write the weights of a problem into those of a layer."""
    layer.w13_weight[...] = on(xp, problem.w1)
    layer.w2_weight[...] = on(xp, problem.w2)
    if problem.w1_bias is not None:
        layer.w13_bias[...] = on(xp, problem.w1_bias)
        layer.w2_bias[...] = on(xp, problem.w2_bias)


def ready(problem, xp=np, **changes):
    """A method and a layer with the weights of a problem, processed."""
    method, layer = UnquantizedFusedMoEMethod(config_of(problem, xp, **changes)), types.SimpleNamespace()
    num_experts, hidden_size, intermediate_size = problem.w2.shape
    method.create_weights(layer, num_experts, hidden_size, intermediate_size, problem.w1.dtype)
    load(layer, problem, xp)
    method.process_weights_after_loading(layer)
    return method, layer


def routed(problem, xp=np):
    """Tokens and choices of a problem, on the side of `xp`."""
    return tuple(on(xp, array) for array in (problem.hidden_states, problem.topk_weights, problem.topk_ids))


def rank_of(problem, ep_size, rank, strategy, xp=np, **changes):
    """Method, layer and map of one rank that owns some experts of a problem."""
    num_local, expert_map = cumoe.determine_expert_map(ep_size, rank, len(problem.w1), strategy)
    owned = slice(None) if expert_map is None else expert_map >= 0
    part = problem._replace(
        w1=problem.w1[owned],
        w2=problem.w2[owned],
        w1_bias=None if problem.w1_bias is None else problem.w1_bias[owned],
        w2_bias=None if problem.w2_bias is None else problem.w2_bias[owned],
    )
    method, layer = ready(part, xp, num_experts=len(problem.w1), num_local_experts=num_local, **changes)
    return method, layer, on(xp, expert_map)
