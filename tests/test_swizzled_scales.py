"""Scales of weights in blocks of 128 x 4: a layer that says so has the bits of the one by row."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import CASES, quantised
from sides import back, on
from strategies import make_problem, problems
from test_quantised_layer import arguments, check

import cumoe

FIXED = [case for case in CASES if case.weights[0] in ("mxfp4", "nvfp4")]
CASE = {case.name: case for case in CASES}


def swizzled(config):
    """The same config with its weights' scales in blocks, and the word for it."""
    descs = {
        name: dataclasses.replace(desc, scale=cumoe.swizzle_scales(desc.scale), is_scale_swizzled=True)
        for name, desc in (("_w1", config._w1), ("_w2", config._w2))
    }
    return dataclasses.replace(config, **descs)


@pytest.mark.parametrize("case", FIXED, ids=str)
@settings(max_examples=5)
@given(data=st.data())
def test_the_bits_of_a_layer_are_those_by_row(xp, case, data):
    problem = data.draw(problems(("bfloat16",), ("silu", "swigluoai", "relu2_no_mul"), 12, case.multiple))
    layer = quantised(case, problem)
    given, named = arguments(xp, problem, layer)
    expected = back(cumoe.fused_experts(*given, **named)).tobytes()
    named["quant_config"] = swizzled(named["quant_config"])
    out = cumoe.fused_experts(*given, **named)
    assert back(out).tobytes() == expected
    check(out, given, named)
    x, w1, w2, *choices = given
    prepared = cumoe.prepare(w1, w2, quant_config=named["quant_config"], activation=problem.activation)
    out = cumoe.fused_experts(x, prepared, None, *choices, expert_map=named["expert_map"])
    assert back(out).tobytes() == expected


def test_weights_of_mxfp8(xp):
    """What kernels read is the same; they are not run."""
    problem, prepared = make_problem(5, 2, 3, 64, 96, "bfloat16"), []
    q1, q2 = (cumoe.quantize(on(xp, w), "mxfp8") for w in (problem.w1, problem.w2))
    config = cumoe.ocp_mx_moe_quant_config(None, q1.scale, q2.scale, weight_dtype="mxfp8")
    for one in (config, swizzled(config)):
        scheme = cumoe.prepare(q1.values, q2.values, quant_config=one).experts.scheme
        prepared.append([back(weight.format.scale).tobytes() for weight in (scheme.w1, scheme.w2)])
    assert prepared[0] == prepared[1]


SCALE = np.zeros((4, 128, 4), np.uint8)
E4M3 = SCALE.view("float8_e4m3fn")
ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    "config",
    [
        cumoe.mxfp4_w4a16_moe_quant_config(SCALE, SCALE, is_weight_scale_swizzled=True),
        cumoe.mxfp4_w4a4_moe_quant_config(SCALE, SCALE, is_weight_scale_swizzled=True),
        cumoe.mxfp4_mxfp8_moe_quant_config(SCALE, SCALE, is_weight_scale_swizzled=True),
        cumoe.mxfp4_w4a8_moe_quant_config(SCALE, SCALE, is_weight_scale_swizzled=True),
        cumoe.ocp_mx_moe_quant_config(None, SCALE, SCALE, "mxfp8", is_weight_scale_swizzled=True),
        cumoe.nvfp4_moe_quant_config(ONES, ONES, ONES, ONES, E4M3, E4M3, is_weight_scale_swizzled=True),
        cumoe.nvfp4_w4a16_moe_quant_config(ONES, ONES, E4M3, E4M3, is_weight_scale_swizzled=True),
    ],
)
def test_builders_say_it_of_both_weights_and_of_no_activation(config):
    assert config._w1.is_scale_swizzled and config._w2.is_scale_swizzled
    assert not config._a1.is_scale_swizzled and not config._a2.is_scale_swizzled
    assert "is_scale_swizzled=True" in repr(config._w1)
    assert "is_scale_swizzled" not in repr(config._a1)


def refused(layer, config, message):
    problem = make_problem(3, 2, 3, 64, 32, "bfloat16")
    (x, _, _, *choices), _ = arguments(np, problem, layer)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cumoe.fused_experts(x, layer.w1, layer.w2, *choices, quant_config=config)


def test_what_is_wrong_is_said():
    problem = make_problem(3, 2, 3, 64, 32, "bfloat16")
    layer = quantised(CASE["nvfp4 w4a16"], problem)
    config = swizzled(layer.quant_config)
    by_row = "w1_scale must have shape (E, N, ceil(K / 16)) = (3, 64, 4), got (3, 128, 4)"
    forgotten = dataclasses.replace(config, _w1=dataclasses.replace(config._w1, is_scale_swizzled=False))
    refused(layer, forgotten, f"{by_row}; these look swizzled, which is_weight_scale_swizzled=True says")
    wrong = dataclasses.replace(config, _w2=dataclasses.replace(config._w2, scale=layer.quant_config.w2_scale))
    message = "w2_scale must have shape (E, 128 ceil(N / 128), 4 ceil(K / 64)) = (3, 128, 4), got (3, 64, 2)"
    refused(layer, wrong, message)
    tokens = dataclasses.replace(config, _a2=dataclasses.replace(config._a2, is_scale_swizzled=True))
    refused(layer, tokens, "a2 must have is_scale_swizzled False: it is of weights, got True")
    layer = quantised(CASE["int8 w8a16"], problem)
    desc = dataclasses.replace(layer.quant_config._w1, is_scale_swizzled=True)
    message = "w1_scale must not be swizzled for 'int8'; available: mxfp4, mxfp8, nvfp4"
    refused(layer, dataclasses.replace(layer.quant_config, _w1=desc), message)


@pytest.mark.parametrize("said", [False, True])
def test_the_layout_is_found_whatever_the_config_says(xp, said):
    """At these sizes blocks have the shape of rows, so that only numbers tell."""
    problem = make_problem(6, 2, 3, 256, 128, "bfloat16", skipped=0.1)
    problem = problem._replace(w1=problem.w1 * np.exp2(np.arange(256) % 5 - 2).astype("bfloat16"))
    rows = np.exp2(np.arange(256) % 3).astype("bfloat16")[:, None]
    problem = problem._replace(w1=problem.w1 * rows, w2=problem.w2 * rows)
    layer = quantised(CASE["nvfp4 w4a16"], problem)
    given, named = arguments(xp, problem, layer)
    expected = cumoe.fused_experts(*given, **named)
    x, w1, w2, *choices = given
    for right, answer in ((named["quant_config"], "NK"), (swizzled(named["quant_config"]), "swizzled")):
        assert right.w1_scale.shape == named["quant_config"].w1_scale.shape
        descs = {name: dataclasses.replace(getattr(right, name), is_scale_swizzled=said) for name in ("_w1", "_w2")}
        config = dataclasses.replace(right, **descs)
        layout = cumoe.detect_layout(w1, w2, x, *choices, expected, quant_config=config)
        assert layout.scale_order == answer
        assert layout.is_documented == (answer == "NK")
        *codes, converted = layout.convert(w1, w2, config)
        assert not converted._w1.is_scale_swizzled and not converted._w2.is_scale_swizzled
        again = cumoe.fused_experts(x, *codes, *choices, quant_config=converted)
        assert back(again).tobytes() == back(expected).tobytes()


def test_a_checkpoint_in_blocks_runs(xp):
    """What `from_modelopt_nvfp4` reads of blocks is the operand by row."""
    problem = make_problem(5, 2, 3, 64, 32, "bfloat16")
    given, named = arguments(xp, problem, quantised(CASE["nvfp4 w4a16"], problem))
    config, read = named["quant_config"], []
    for codes, scale, alphas in zip(
        given[1:3], (config.w1_scale, config.w2_scale), (config.g1_alphas, config.g2_alphas), strict=True
    ):
        blocks = cumoe.swizzle_scales(scale)
        read.append(cumoe.from_modelopt_nvfp4(codes, blocks, alphas, is_scale_swizzled=True))
    scales = [one.scale for one in read]
    again = cumoe.nvfp4_w4a16_moe_quant_config(config.g1_alphas, config.g2_alphas, *scales)
    expected = back(cumoe.fused_experts(*given, **named)).tobytes()
    x, _, _, *choices = given
    out = cumoe.fused_experts(x, *(one.values for one in read), *choices, quant_config=again)
    assert back(out).tobytes() == expected
