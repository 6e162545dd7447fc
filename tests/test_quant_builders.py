"""Each builder against the table of what its config says."""

import re

import numpy as np
import pytest

import cumoe

SCALE = np.ones((8, 4, 2), np.float32)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# builder arguments -> what the config says; everything not listed is False or None
E4M3 = ("float8_e4m3fn", "float8_e4m3fn")
S2 = {"w1_scale": SCALE, "w2_scale": SCALE}
SCHEMES = {
    "fp8 tensor": (
        cumoe.fp8_w8a8_moe_quant_config,
        S2,
        E4M3,
        {"use_fp8_w8a8", "is_per_tensor"},
        "fp8_w8a8",
        None,
        (1, 1),
    ),
    "fp8 token channel": (
        cumoe.fp8_w8a8_moe_quant_config,
        S2 | {"per_act_token_quant": True, "per_out_ch_quant": True},
        E4M3,
        {"use_fp8_w8a8", "is_per_act_token", "per_act_token_quant", "per_out_ch_quant"},
        "fp8_w8a8",
        None,
        (5, 1),
    ),
    "fp8 block": (
        cumoe.fp8_w8a8_moe_quant_config,
        S2 | {"block_shape": [128, 128], "a1_scale": SCALE, "a2_scale": SCALE},
        E4M3,
        {"use_fp8_w8a8", "is_block_quantized"},
        "fp8_w8a8",
        [128, 128],
        (5, 3),
    ),
    "int8": (
        cumoe.int8_w8a8_moe_quant_config,
        S2,
        ("int8",) * 2,
        {"use_int8_w8a8", "is_per_tensor"},
        None,
        None,
        (1, 1),
    ),
    "int8 token": (
        cumoe.int8_w8a8_moe_quant_config,
        S2 | {"a1_scale": None, "a2_scale": None, "per_act_token_quant": True},
        ("int8",) * 2,
        {"use_int8_w8a8", "is_per_act_token", "per_act_token_quant"},
        None,
        None,
        (5, 1),
    ),
    "int8 w8a16": (cumoe.int8_w8a16_moe_quant_config, S2, (None, "int8"), {"use_int8_w8a16"}, "int8_w8a16", None, None),
    "int8 w8a16 group": (
        cumoe.int8_w8a16_moe_quant_config,
        S2 | {"w1_zp": SCALE, "w2_zp": SCALE, "block_shape": [0, 128]},
        (None, "int8"),
        {"use_int8_w8a16", "is_block_quantized"},
        "int8_w8a16",
        [0, 128],
        None,
    ),
    "int4 w4a16 group": (
        cumoe.int4_w4a16_moe_quant_config,
        S2 | {"w1_zp": SCALE, "w2_zp": SCALE, "block_shape": [0, 32]},
        (None, "int4"),
        {"use_int4_w4a16", "is_block_quantized"},
        "int4_w4a16",
        [0, 32],
        None,
    ),
    "int4 w4a16 channel": (
        cumoe.int4_w4a16_moe_quant_config,
        S2 | {"block_shape": [0, -1]},
        (None, "int4"),
        {"use_int4_w4a16", "is_block_quantized"},
        "int4_w4a16",
        [0, -1],
        None,
    ),
    "mxfp4 w4a16": (cumoe.mxfp4_w4a16_moe_quant_config, S2, (None, "mxfp4"), {"use_mxfp4_w4a16"}, None, None, None),
    "mxfp4 w4a4": (
        cumoe.mxfp4_w4a4_moe_quant_config,
        S2,
        ("mxfp4", "mxfp4"),
        {"use_mxfp4_w4a4", "is_per_tensor"},
        "mxfp4_w4a4",
        None,
        (1, 1),
    ),
    "mxfp4": (
        cumoe.mxfp4_moe_quant_config,
        S2,
        ("mxfp4", "mxfp4"),
        {"use_mxfp4_w4a4", "is_per_tensor"},
        "mxfp4_w4a4",
        None,
        (1, 1),
    ),
    "mxfp4 w4a4 block": (
        cumoe.mxfp4_w4a4_moe_quant_config,
        S2 | {"block_shape": [1, 32]},
        ("mxfp4", "mxfp4"),
        {"use_mxfp4_w4a4", "is_block_quantized"},
        "mxfp4_w4a4",
        [1, 32],
        (5, 10),
    ),
    "mxfp4 mxfp8": (cumoe.mxfp4_mxfp8_moe_quant_config, S2, ("mxfp8", "mxfp4"), set(), None, None, (1, 1)),
    "mxfp4 w4a8": (cumoe.mxfp4_w4a8_moe_quant_config, S2, ("fp8", "mxfp4"), {"use_mxfp4_w4a8"}, None, None, (1, 1)),
    "nvfp4": (
        cumoe.nvfp4_moe_quant_config,
        S2 | dict.fromkeys(("g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale"), SCALE),
        ("nvfp4", "nvfp4"),
        {"use_nvfp4_w4a4", "is_per_tensor"},
        None,
        None,
        (1, 1),
    ),
    "nvfp4 w4a16": (
        cumoe.nvfp4_w4a16_moe_quant_config,
        S2 | dict.fromkeys(("g1_alphas", "g2_alphas"), SCALE),
        (None, "nvfp4"),
        {"use_nvfp4_w4a16"},
        None,
        None,
        None,
    ),
    "fp8 w8a16": (
        cumoe.fp8_w8a16_moe_quant_config,
        S2 | {"block_shape": [128, 128]},
        (None, "float8_e4m3fn"),
        {"use_fp8_w8a16"},
        "fp8_w8a16",
        None,
        None,
    ),
    "int4 w4afp8": (
        cumoe.int4_w4afp8_moe_quant_config,
        S2 | dict.fromkeys(("g1_alphas", "g2_alphas"), SCALE) | {"per_act_token_quant": True, "per_out_ch_quant": True},
        ("float8_e4m3fn", "int4"),
        {"use_fp8_w8a8", "is_per_act_token", "per_act_token_quant", "per_out_ch_quant"},
        "fp8_w8a8",
        None,
        (5, 1),
    ),
    "gptq 4": (
        cumoe.gptq_marlin_moe_quant_config,
        S2 | {"weight_bits": 4, "group_size": 64},
        (None, "int4"),
        {"use_int4_w4a16", "is_block_quantized"},
        "int4_w4a16",
        [1, 64],
        None,
    ),
    "gptq 8 channel": (
        cumoe.gptq_marlin_moe_quant_config,
        S2 | {"weight_bits": 8, "group_size": -1},
        (None, "int8"),
        {"use_int8_w8a16"},
        "int8_w8a16",
        None,
        None,
    ),
    "biased": (
        cumoe.biased_moe_quant_config,
        {"w1_bias": SCALE[0], "w2_bias": SCALE[1]},
        (None, None),
        set(),
        None,
        None,
        None,
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_builders(scheme):
    builder, arguments, (a_dtype, w_dtype), true_flags, config_name, block_shape, scale_shape = SCHEMES[scheme]
    config = builder(**arguments)
    for desc, dtype in ((config._a1, a_dtype), (config._a2, a_dtype), (config._w1, w_dtype), (config._w2, w_dtype)):
        assert desc.dtype == dtype  # a NumPy dtype equals its name
    flags = {name for name in dir(config) if name.startswith(("use_", "is_per", "is_block", "per_"))}
    assert {name for name in flags if getattr(config, name)} == true_flags
    assert config.is_quantized is (a_dtype is not None)
    assert config.config_name("bfloat16") == config_name
    assert config.block_shape == block_shape
    assert config.scale_shape(5, 300) == scale_shape
    assert config.batched_scale_shape(3, 5, 300) == (scale_shape and (3, *scale_shape))
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            assert getattr(config, name) is value


def test_weight_shapes_of_the_builders():
    w8a16 = cumoe.int8_w8a16_moe_quant_config(SCALE, SCALE, block_shape=[0, 128])
    assert w8a16._a1.shape == w8a16._a2.shape == w8a16._w1.shape == w8a16._w2.shape == (0, 128)
    assert cumoe.mxfp4_w4a16_moe_quant_config(SCALE, SCALE)._w1.shape is None
    fp8 = cumoe.fp8_w8a16_moe_quant_config(SCALE, SCALE, block_shape=[128, 128])
    assert fp8._w1.shape == fp8._w2.shape == (128, 128) and fp8._a1.shape is None


OCP_MX = [
    "w_mxfp4",
    "w_mxfp4_a_mxfp4",
    "w_mxfp4_a_mxfp6_e3m2",
    "w_mxfp4_a_mxfp6_e2m3",
    "w_mxfp4_a_fp8",
    "w_mxfp6_e3m2",
    "w_mxfp6_e3m2_a_mxfp6_e3m2",
    "w_mxfp6_e3m2_a_fp8",
    "w_mxfp6_e2m3",
    "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "w_mxfp6_e2m3_a_fp8",
]


def test_ocp_mx_schemes():
    made = set()
    for weight in ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8"):
        for activation in (None, "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8"):
            config = cumoe.ocp_mx_moe_quant_config(activation, SCALE, SCALE, weight_dtype=weight)
            assert (config.quant_dtype, config.weight_quant_dtype) == (activation, weight)
            made.add(config.ocp_mx_scheme)
    assert made == {*OCP_MX, None}
    assert cumoe.ocp_mx_moe_quant_config("mxfp4", SCALE, SCALE).ocp_mx_scheme == "w_mxfp4_a_mxfp4"
    assert cumoe.fp8_w8a8_moe_quant_config(SCALE, SCALE).ocp_mx_scheme is None


def test_fixed_blocks_take_no_arguments():
    for name in ("a1_scale", "a2_scale"):
        with raises(ValueError, f"{name} must be None for mxfp8, whose blocks and scales are fixed, got ndarray"):
            cumoe.mxfp4_mxfp8_moe_quant_config(SCALE, SCALE, **{name: SCALE})
    with raises(ValueError, "block_shape must be None for mxfp4, whose blocks and scales are fixed, got list"):
        cumoe.mxfp4_w4a8_moe_quant_config(SCALE, SCALE, block_shape=[1, 32])


def test_builders_refuse_unknown_formats():
    with raises(ValueError, "weight_bits must be 4 or 8, got 3"):
        cumoe.gptq_marlin_moe_quant_config(SCALE, SCALE, 3, 64)
    with raises(ValueError, "group_size must be >= 1, got 0"):
        cumoe.gptq_marlin_moe_quant_config(SCALE, SCALE, 4, 0)
    with raises(ValueError, "weight_dtype must be mxfp4, mxfp6_e3m2, mxfp6_e2m3 or mxfp8, got 'fp8'"):
        cumoe.ocp_mx_moe_quant_config("fp8", SCALE, SCALE)
    with raises(ValueError, "quant_dtype must be mxfp4, mxfp6_e3m2, mxfp6_e2m3, mxfp8 or fp8, got 'nvfp4'"):
        cumoe.ocp_mx_moe_quant_config("nvfp4", SCALE, SCALE)
