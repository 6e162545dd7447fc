"""Layers in every quantisation scheme: weights of a problem as codes, and the config that says what they mean."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  names the small floats
import numpy as np

import cumoe
from cumoe import GroupShape

TENSOR, ROW, BLOCK = (-1, -1), (1, -1), (128, 128)


class Case(NamedTuple):
    """A scheme by name, the sizes that it takes, and how it is built."""

    name: str
    multiple: int  # of H and of I
    weights: tuple  # scheme of `quantize`, its group, its other arguments
    build: object  # (q1, q2, problem, biases) -> config

    def __str__(self):
        return self.name


class Layer(NamedTuple):
    """Arguments of `fused_experts` in a scheme, NumPy arrays."""

    w1: np.ndarray
    w2: np.ndarray
    quant_config: object


def _flat(q):
    """Scales of one a tensor as (E,)."""
    return q.scale.reshape(-1)


def _scales(q1, q2):
    return (_flat(q1), _flat(q2)) if tuple(q1.group_shape) == TENSOR else (q1.scale, q2.scale)


def _fp8(q1, q2, problem, biases, **more):
    scales = _scales(q1, q2)
    return cumoe.fp8_w8a8_moe_quant_config(*scales, **more, **biases)


def _int8(q1, q2, problem, biases, **more):
    scales = _scales(q1, q2)
    return cumoe.int8_w8a8_moe_quant_config(*scales, **more, **biases)


def _static(*sizes):
    return {f"a{i}_scale": np.array([size], np.float32) for i, size in enumerate(sizes, 1)}


def _mx(builder):
    return lambda q1, q2, problem, biases: builder(q1.scale, q2.scale, **biases)


def _nvfp4(q1, q2, problem, biases, by_expert):
    count = len(q1.values)
    gscales = [np.float32(2688 / 8) * np.ones(count if by_expert else 1, np.float32) for _ in range(2)]
    if by_expert:
        gscales = [gscale * (1 + np.arange(count, dtype=np.float32) / 7) for gscale in gscales]
    alphas = [1 / (q.global_scale * gscale) for q, gscale in zip((q1, q2), gscales, strict=True)]
    return cumoe.nvfp4_moe_quant_config(*alphas, *gscales, q1.scale, q2.scale, **biases)


def _int4(q1, q2, problem, biases, group):
    zeros = {"w1_zp": q1.zero_points, "w2_zp": q2.zero_points}
    builder = cumoe.int4_w4a16_moe_quant_config if q1.scheme == "int4" else cumoe.int8_w8a16_moe_quant_config
    return builder(q1.scale, q2.scale, **zeros, block_shape=[0, group], **biases)


def _case(name, scheme, group, build, multiple=2, **more):
    return Case(name, multiple, (scheme, group, more), build)


def _with(build, **more):
    return lambda *arguments: build(*arguments, **more)


CASES = (
    _case("fp8 tensor, dynamic", "fp8", TENSOR, _fp8),
    _case("fp8 tensor, static", "fp8", TENSOR, _with(_fp8, **_static(0.01, 0.02))),
    _case("fp8 channel, token", "fp8", ROW, _with(_fp8, per_act_token_quant=True, per_out_ch_quant=True)),
    _case("fp8 block", "fp8", BLOCK, _with(_fp8, block_shape=[128, 128])),
    _case("fp8 small blocks", "fp8", (8, 16), _with(_fp8, block_shape=[8, 16]), 8),
    _case("fp8 block, powers of two", "fp8", BLOCK, _with(_fp8, block_shape=[128, 128]), use_ue8m0=True),
    _case(
        "fp8 w8a16, tensor",
        "fp8",
        TENSOR,
        lambda a, b, p, bias: cumoe.fp8_w8a16_moe_quant_config(_flat(a), _flat(b), **bias),
    ),
    _case(
        "fp8 w8a16, block",
        "fp8",
        BLOCK,
        lambda a, b, p, bias: cumoe.fp8_w8a16_moe_quant_config(a.scale, b.scale, [128, 128], **bias),
    ),
    _case("int8 tensor, dynamic", "int8", TENSOR, _int8),
    _case("int8 tensor, static", "int8", TENSOR, _with(_int8, **_static(0.03, 0.05))),
    _case("int8 channel, token", "int8", ROW, _with(_int8, per_act_token_quant=True)),
    _case(
        "int8 block",
        "int8",
        BLOCK,
        lambda a, b, p, bias: cumoe.FusedMoEQuantConfig.make(
            "int8", block_shape=[128, 128], w1_scale=a.scale, w2_scale=b.scale, **bias
        ),
    ),
    _case(
        "int8 w8a16",
        "int8",
        ROW,
        lambda a, b, p, bias: cumoe.int8_w8a16_moe_quant_config(a.scale[..., 0], b.scale[..., 0], **bias),
    ),
    _case("int8 w8a16, groups of bytes", "uint8", (1, 32), _with(_int4, group=32), 32),
    _case("int8 w8a16, zero points", "uint8", (1, 64), _with(_int4, group=64), 64, zero_points=True),
    *(
        _case(
            f"int4 {group}{', zero points' * zeros}",
            "int4",
            (1, group),
            _with(_int4, group=group),
            group,
            zero_points=zeros,
        )
        for group in (32, 64, 128)
        for zeros in (False, True)
    ),
    _case(
        "gptq 4 bits",
        "int4",
        (1, 64),
        lambda a, b, p, bias: cumoe.gptq_marlin_moe_quant_config(
            a.scale, b.scale, 4, 64, a.zero_points, b.zero_points, **bias
        ),
        64,
        zero_points=True,
    ),
    _case(
        "int4 w4afp8",
        "int4",
        (1, 32),
        lambda a, b, p, bias: cumoe.int4_w4afp8_moe_quant_config(
            a.scale,
            b.scale,
            np.full(a.scale.shape[:2], 1.5, np.float32),
            np.full(b.scale.shape[:2], 0.75, np.float32),
            per_act_token_quant=True,
            **bias,
        ),
        32,
    ),
    _case(
        "int4 w4a8",
        "int4",
        (1, 32),
        lambda a, b, p, bias: cumoe.FusedMoEQuantConfig.make(
            "int8", True, weight_dtype="int4", w1_scale=a.scale, w2_scale=b.scale, **bias
        ),
        32,
    ),
    _case("mxfp4 w4a16", "mxfp4", (1, 32), _mx(cumoe.mxfp4_w4a16_moe_quant_config)),
    _case("mxfp4 w4a4", "mxfp4", (1, 32), _mx(cumoe.mxfp4_w4a4_moe_quant_config)),
    _case("mxfp4 mxfp8", "mxfp4", (1, 32), _mx(cumoe.mxfp4_mxfp8_moe_quant_config)),
    _case("mxfp4 w4a8", "mxfp4", (1, 32), _mx(cumoe.mxfp4_w4a8_moe_quant_config)),
    _case("nvfp4", "nvfp4", (1, 16), _with(_nvfp4, by_expert=False)),
    _case("nvfp4, each expert's scale", "nvfp4", (1, 16), _with(_nvfp4, by_expert=True)),
    _case(
        "nvfp4 w4a16",
        "nvfp4",
        (1, 16),
        lambda a, b, p, bias: cumoe.nvfp4_w4a16_moe_quant_config(
            1 / a.global_scale, 1 / b.global_scale, a.scale, b.scale, **bias
        ),
    ),
)


def quantised(case, problem):
    """The weights of a problem in a scheme."""
    scheme, group, more = case.weights
    # scales of integers take the dtype of what is quantised
    q1, q2 = (cumoe.quantize(w, scheme, GroupShape(*group), **more) for w in (problem.w1, problem.w2))
    biases = {} if problem.w1_bias is None else {"w1_bias": problem.w1_bias, "w2_bias": problem.w2_bias}
    return Layer(q1.values, q2.values, case.build(q1, q2, problem, biases))
