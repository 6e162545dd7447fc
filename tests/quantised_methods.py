"""Quantised layers through their method: what a loader writes, and the config that means the same."""

import types
from typing import NamedTuple

import numpy as np
from methods import config_of, routed
from sides import bits, on
from test_quantised_layer import config_on

import cumoe
from cumoe import GroupShape, QuantizedFusedMoEMethod

TENSOR, ROW = GroupShape(-1, -1), GroupShape(1, -1)
H, I = 160, 96
INTERLEAVED = ("swigluoai",)


class Kind(NamedTuple):
    """A scheme, its options, and how weights are made."""

    name: str
    scheme: str
    make: object  # (problem, biases) -> what is loaded, by name; codes for `fused_experts`; config
    options: dict

    def __str__(self):
        return self.name


class Loaded(NamedTuple):
    """Weights to load, and the same layer as arguments of `fused_experts`."""

    weights: dict
    w1: np.ndarray
    w2: np.ndarray
    quant_config: object


def both(part, first, second):
    return {f"w13_{part}": first, f"w2_{part}": second}


def shards_of(problem):
    """Gate and up rows, or all rows, of `w1`: a list of (E, I, H)."""
    if problem.activation.endswith("_no_mul"):
        return [problem.w1]
    if problem.activation in INTERLEAVED:
        return [problem.w1[:, 0::2], problem.w1[:, 1::2]]
    return list(np.split(problem.w1, 2, axis=1))


def together(problem, shards):
    """What belongs to the rows of shards (E, I, ...), in the order of the rows of `w1`."""
    if problem.activation in INTERLEAVED:
        first, second = shards
        return np.stack([first, second], axis=2).reshape(len(first), -1, *first.shape[2:])
    return np.concatenate(shards, axis=1)


def per_tensor(codes, build, static=False, **more):
    """Two scales for w13, of which the second is much larger."""

    def make(problem, biases):
        shards = [w * np.asarray(1 + 4 * place, w.dtype) for place, w in enumerate(shards_of(problem))]
        q1, q2 = [cumoe.quantize(w, codes, TENSOR) for w in shards], cumoe.quantize(problem.w2, codes, TENSOR)
        rows = [np.broadcast_to(q.scale[:, :, 0], q.values.shape[:2]) for q in q1]
        w1, scale2 = together(problem, [q.values for q in q1]), q2.scale.reshape(-1)
        weights = both("weight", w1, q2.values)
        weights |= both("weight_scale", np.stack([q.scale.reshape(-1) for q in q1], axis=1), scale2)
        given = {}
        if static:
            sizes = np.linspace(0.01, 0.02, len(w1), dtype=np.float32)
            weights |= both("input_scale", sizes, sizes[::-1] * np.float32(2))
            given = {"a1_scale": np.float32([0.02]), "a2_scale": np.float32([0.04])}
        config = build(together(problem, rows), scale2, **given, **more, **biases)
        return Loaded(weights, w1, q2.values, config)

    return make


def per_channel(codes, build, **more):
    def make(problem, biases):
        q1, q2 = (cumoe.quantize(w, codes, ROW) for w in (problem.w1, problem.w2))
        weights = both("weight", q1.values, q2.values) | both("weight_scale", q1.scale, q2.scale)
        return Loaded(weights, q1.values, q2.values, build(q1.scale, q2.scale, **more, **biases))

    return make


def per_block(codes, build):
    """The blocks of the up rows begin anew, if those are one piece."""
    shape = GroupShape(64, 32)

    def make(problem, biases):
        whole = problem.activation in INTERLEAVED
        q1 = [cumoe.quantize(w, codes, shape) for w in ([problem.w1] if whole else shards_of(problem))]
        q2 = cumoe.quantize(problem.w2, codes, shape)
        w1, scale1 = (np.concatenate(parts, axis=1) for parts in zip(*(q[:2] for q in q1), strict=True))
        weights = both("weight", w1, q2.values) | both("weight_scale_inv", scale1, q2.scale)
        return Loaded(weights, w1, q2.values, build(scale1, q2.scale, block_shape=[64, 32], **biases))

    return make


def int8_rows(problem, biases):
    q1, q2 = (cumoe.quantize(w, "int8", ROW) for w in (problem.w1, problem.w2))
    scales = q1.scale[..., 0], q2.scale[..., 0]
    weights = both("weight", q1.values, q2.values) | both("scale", *scales)
    return Loaded(weights, q1.values, q2.values, cumoe.int8_w8a16_moe_quant_config(*scales, **biases))


def grouped(codes, build, zeros=False):
    def make(problem, biases):
        q1, q2 = (cumoe.quantize(w, codes, (1, 32), zero_points=zeros) for w in (problem.w1, problem.w2))
        weights = both("qweight", q1.values, q2.values) | both("scales", q1.scale, q2.scale)
        points = {}
        if zeros:
            weights |= both("qzeros", q1.zero_points, q2.zero_points)
            points = {"w1_zp": q1.zero_points, "w2_zp": q2.zero_points}
        return Loaded(weights, q1.values, q2.values, build(q1.scale, q2.scale, **points, block_shape=[0, 32], **biases))

    return make


def int4_and_fp8(static=False):
    def make(problem, biases):
        q1, q2 = (cumoe.quantize(w, "int4", (1, 32)) for w in (problem.w1, problem.w2))
        words = (np.ascontiguousarray(q.values).view(np.int32) for q in (q1, q2))
        weights = both("weight_packed", *words) | both("weight_scale", q1.scale, q2.scale)
        (scale1, alphas1), (scale2, alphas2) = cumoe.w4a8_scales(q1.scale), cumoe.w4a8_scales(q2.scale)
        given = {"per_act_token_quant": not static}
        if static:
            weights |= both("input_scale", *(np.full(len(q1.values), size, np.float32) for size in (0.01, 0.03)))
            given |= {"a1_scale": np.float32([0.01]), "a2_scale": np.float32([0.03])}
        config = cumoe.int4_w4afp8_moe_quant_config(scale1, scale2, alphas1, alphas2, **given, **biases)
        return Loaded(weights, q1.values, q2.values, config)

    return make


def mxfp4(build, static=False):
    def make(problem, biases):
        q1, q2 = (cumoe.quantize(w, "mxfp4") for w in (problem.w1, problem.w2))
        scales = q1.scale.view(np.uint8), q2.scale.view(np.uint8)
        weights, given = both("weight", q1.values, q2.values) | both("weight_scale", *scales), {}
        if static:
            weights |= both("input_scale", *(np.full(len(q1.values), size, np.float32) for size in (0.01, 0.03)))
            given = {"a1_scale": np.float32([0.01]), "a2_scale": np.float32([0.03])}
        return Loaded(weights, q1.values, q2.values, build(*scales, **given, **biases))

    return make


def nvfp4(quantised_activations):
    """Each shard has a scale of its own, of the weight and of the input."""

    def make(problem, biases):
        shards = [w * np.asarray(1 + 4 * place, w.dtype) for place, w in enumerate(shards_of(problem))]
        q1, q2 = [cumoe.quantize(w, "nvfp4") for w in shards], cumoe.quantize(problem.w2, "nvfp4")
        one, experts = np.float32(1), len(q2.values)
        decode = [one / q.global_scale for q in (*q1, q2)]
        w1, scale1 = together(problem, [q.values for q in q1]), together(problem, [q.scale.view("u1") for q in q1])
        scales = scale1.view(q2.scale.dtype), q2.scale
        weights = both("weight", w1, q2.values) | both("weight_scale", *scales)
        weights |= both("weight_scale_2", np.stack(decode[:-1], axis=1), decode[-1])
        rows = [np.repeat(scale[:, None], problem.w2.shape[2], axis=1) for scale in decode[:-1]]
        alphas, build, gscales = together(problem, rows), cumoe.nvfp4_w4a16_moe_quant_config, ()
        second = decode[-1]
        if quantised_activations:
            inputs = np.linspace(0.002, 0.004, experts * len(q1), dtype=np.float32).reshape(experts, len(q1))
            weights |= both("input_scale", inputs, inputs[:, 0])
            alphas, second = alphas * inputs.max(axis=1)[:, None], second * inputs[:, 0]
            build, gscales = cumoe.nvfp4_moe_quant_config, (one / inputs.max(axis=1), one / inputs[:, 0])
        return Loaded(weights, w1, q2.values, build(alphas, second, *gscales, *scales, **biases))

    return make


def int8_block(scale1, scale2, **more):
    return cumoe.FusedMoEQuantConfig.make("int8", w1_scale=scale1, w2_scale=scale2, **more)


def fp8(*scales, **more):
    return cumoe.fp8_w8a8_moe_quant_config(*scales, **more)


def kind(name, scheme, make, **options):
    return Kind(name, scheme, make, options)


KINDS = (
    kind("fp8 tensor", "fp8_w8a8", per_tensor("fp8", fp8)),
    kind("fp8 static", "fp8_w8a8", per_tensor("fp8", fp8, True), static_activations=True),
    kind(
        "fp8 tensor, token",
        "fp8_w8a8",
        per_tensor("fp8", fp8, per_act_token_quant=True),
        per_act_token_quant=True,
    ),
    kind(
        "fp8 token",
        "fp8_w8a8",
        per_channel("fp8", fp8, per_act_token_quant=True, per_out_ch_quant=True),
        per_act_token_quant=True,
        per_out_ch_quant=True,
    ),
    kind("fp8 block", "fp8_w8a8", per_block("fp8", fp8), block_shape=(64, 32)),
    kind("fp8 w8a16 tensor", "fp8_w8a16", per_tensor("fp8", cumoe.fp8_w8a16_moe_quant_config)),
    kind("fp8 w8a16 channel", "fp8_w8a16", per_channel("fp8", cumoe.fp8_w8a16_moe_quant_config), per_out_ch_quant=True),
    kind("fp8 w8a16 block", "fp8_w8a16", per_block("fp8", cumoe.fp8_w8a16_moe_quant_config), block_shape=[64, 32]),
    kind("int8 tensor", "int8_w8a8", per_tensor("int8", cumoe.int8_w8a8_moe_quant_config)),
    kind(
        "int8 static", "int8_w8a8", per_tensor("int8", cumoe.int8_w8a8_moe_quant_config, True), static_activations=True
    ),
    kind(
        "int8 token",
        "int8_w8a8",
        per_channel("int8", cumoe.int8_w8a8_moe_quant_config, per_act_token_quant=True),
        per_act_token_quant=True,
        per_out_ch_quant=True,
    ),
    kind("int8 block", "int8_w8a8", per_block("int8", int8_block), block_shape=(64, 32)),
    kind("int8 w8a16", "int8_w8a16", int8_rows),
    kind("bytes", "int8_w8a16", grouped("uint8", cumoe.int8_w8a16_moe_quant_config), group_size=32),
    kind(
        "bytes, zero points",
        "int8_w8a16",
        grouped("uint8", cumoe.int8_w8a16_moe_quant_config, True),
        group_size=32,
        has_zero_points=True,
    ),
    kind("int4", "int4_w4a16", grouped("int4", cumoe.int4_w4a16_moe_quant_config), group_size=32),
    kind(
        "int4, zero points",
        "int4_w4a16",
        grouped("int4", cumoe.int4_w4a16_moe_quant_config, True),
        group_size=32,
        has_zero_points=True,
    ),
    kind("int4 fp8", "int4_w4afp8", int4_and_fp8(), group_size=32, per_act_token_quant=True),
    kind("int4 fp8 static", "int4_w4afp8", int4_and_fp8(True), group_size=32, static_activations=True),
    kind("mxfp4 w4a16", "mxfp4_w4a16", mxfp4(cumoe.mxfp4_w4a16_moe_quant_config)),
    kind("mxfp4 w4a4", "mxfp4_w4a4", mxfp4(cumoe.mxfp4_w4a4_moe_quant_config)),
    kind("mxfp4 mxfp8", "mxfp4_mxfp8", mxfp4(cumoe.mxfp4_mxfp8_moe_quant_config)),
    kind("mxfp4 w4a8", "mxfp4_w4a8", mxfp4(cumoe.mxfp4_w4a8_moe_quant_config)),
    kind("mxfp4 w4a8 static", "mxfp4_w4a8", mxfp4(cumoe.mxfp4_w4a8_moe_quant_config, True), static_activations=True),
    kind("nvfp4 w4a4", "nvfp4_w4a4", nvfp4(True)),
    kind("nvfp4 w4a16", "nvfp4_w4a16", nvfp4(False)),
)


def kind_of(name):
    return next(kind for kind in KINDS if kind.name == name)


def loaded(kind, problem):
    biases = {} if problem.w1_bias is None else {"w1_bias": problem.w1_bias, "w2_bias": problem.w2_bias}
    return kind.make(problem, biases)


def load(layer, weights, problem, xp=np):
    """Write weights and the biases of a problem into those of a layer."""
    if problem.w1_bias is not None:
        weights = weights | both("bias", problem.w1_bias, problem.w2_bias)
    for name, array in weights.items():
        into = getattr(layer, name)
        assert (into.shape, into.dtype) == (array.shape, array.dtype), name
        bits(into)[...] = on(xp, bits(np.ascontiguousarray(array)))


def unloaded(kind, problem, xp=np, **changes):
    """A method and a layer with new weights."""
    method = QuantizedFusedMoEMethod(config_of(problem, xp, **changes), kind.scheme, **kind.options)
    layer = types.SimpleNamespace()
    num_experts, hidden_size, intermediate_size = problem.w2.shape
    method.create_weights(layer, num_experts, hidden_size, intermediate_size, problem.w1.dtype)
    return method, layer


def ready(kind, problem, xp=np, **changes):
    """A method and a layer with the weights of a problem, processed."""
    method, layer = unloaded(kind, problem, xp, **changes)
    load(layer, loaded(kind, problem).weights, problem, xp)
    method.process_weights_after_loading(layer)
    return method, layer


def arguments(made, problem, xp=np):
    """The same layer as arguments of `fused_experts` and `verify`."""
    x, weights, ids = routed(problem, xp)
    named = {"activation": problem.activation, "quant_config": config_on(xp, made.quant_config)}
    return (x, on(xp, made.w1), on(xp, made.w2), weights, ids), named
