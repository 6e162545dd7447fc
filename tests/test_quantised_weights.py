"""Weights of a quantised layer as they are made: names, shapes, dtypes; options and sizes that do not fit."""

import re
import types

import numpy as np
import pytest
from methods import config_of
from strategies import make_problem

import cumoe
from cumoe import QuantizedFusedMoEMethod


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def some_method(scheme, **options):
    return QuantizedFusedMoEMethod(config_of(make_problem(1, 2, 3, 64, 32)), scheme, **options)


FLOAT8, FLOAT32, BYTE = "float8_e4m3fn", "float32", "uint8"


@pytest.mark.parametrize(
    ("scheme", "options", "w13", "w2"),
    [
        (
            "fp8_w8a8",
            {"static_activations": True},
            {"weight": (FLOAT8, 64, 64), "weight_scale": (FLOAT32, 2), "input_scale": (FLOAT32,)},
            {"weight": (FLOAT8, 64, 32), "weight_scale": (FLOAT32,), "input_scale": (FLOAT32,)},
        ),
        (
            "fp8_w8a8",
            {"per_act_token_quant": True, "per_out_ch_quant": True},
            {"weight": (FLOAT8, 64, 64), "weight_scale": (FLOAT32, 64, 1)},
            {"weight": (FLOAT8, 64, 32), "weight_scale": (FLOAT32, 64, 1)},
        ),
        (
            "fp8_w8a16",
            {"block_shape": (24, 48)},
            {"weight": (FLOAT8, 64, 64), "weight_scale_inv": (FLOAT32, 4, 2)},
            {"weight": (FLOAT8, 64, 32), "weight_scale_inv": (FLOAT32, 3, 1)},
        ),
        (
            "int8_w8a8",
            {"per_out_ch_quant": True},
            {"weight": ("int8", 64, 64), "weight_scale": (FLOAT32, 64, 1)},
            {"weight": ("int8", 64, 32), "weight_scale": (FLOAT32, 64, 1)},
        ),
        (
            "int8_w8a16",
            {},
            {"weight": ("int8", 64, 64), "scale": (FLOAT32, 64)},
            {"weight": ("int8", 64, 32), "scale": (FLOAT32, 64)},
        ),
        (
            "int8_w8a16",
            {"group_size": 32, "has_zero_points": True},
            {"qweight": (BYTE, 64, 64), "scales": ("float16", 64, 2), "qzeros": (BYTE, 64, 2)},
            {"qweight": (BYTE, 64, 32), "scales": ("float16", 64, 1), "qzeros": (BYTE, 64, 1)},
        ),
        (
            "int4_w4a16",
            {"group_size": -1},
            {"qweight": (BYTE, 64, 32), "scales": ("float16", 64, 1)},
            {"qweight": (BYTE, 64, 16), "scales": ("float16", 64, 1)},
        ),
        (
            "int4_w4a16",
            {"group_size": 128, "has_zero_points": True},  # 32 is what divides H and I
            {"qweight": (BYTE, 64, 32), "scales": ("float16", 64, 2), "qzeros": (BYTE, 32, 2)},
            {"qweight": (BYTE, 64, 16), "scales": ("float16", 64, 1), "qzeros": (BYTE, 32, 1)},
        ),
        (
            "int4_w4afp8",
            {"group_size": 32},
            {"weight_packed": ("int32", 64, 8), "weight_scale": ("float16", 64, 2)},
            {"weight_packed": ("int32", 64, 4), "weight_scale": ("float16", 64, 1)},
        ),
        *(
            (
                scheme,
                {},
                {"weight": (BYTE, 64, 32), "weight_scale": (BYTE, 64, 2)},
                {"weight": (BYTE, 64, 16), "weight_scale": (BYTE, 64, 1)},
            )
            for scheme in ("mxfp4_w4a16", "mxfp4_w4a4", "mxfp4_mxfp8", "mxfp4_w4a8")
        ),
        (
            "nvfp4_w4a4",
            {},
            {
                "weight": (BYTE, 64, 32),
                "weight_scale": (FLOAT8, 64, 4),
                "weight_scale_2": (FLOAT32, 2),
                "input_scale": (FLOAT32, 2),
            },
            {
                "weight": (BYTE, 64, 16),
                "weight_scale": (FLOAT8, 64, 2),
                "weight_scale_2": (FLOAT32,),
                "input_scale": (FLOAT32,),
            },
        ),
        (
            "nvfp4_w4a16",
            {},
            {"weight": (BYTE, 64, 32), "weight_scale": (FLOAT8, 64, 4), "weight_scale_2": (FLOAT32, 2)},
            {"weight": (BYTE, 64, 16), "weight_scale": (FLOAT8, 64, 2), "weight_scale_2": (FLOAT32,)},
        ),
    ],
)
def test_create_weights(xp, scheme, options, w13, w2):
    config = config_of(make_problem(1, 2, 3, 64, 32, bias=True), xp)
    method, layer = QuantizedFusedMoEMethod(config, scheme, **options), types.SimpleNamespace()
    method.create_weights(layer, 3, 64, 32, "float16", weight_loader=len)
    arrays = {name: value for name, value in vars(layer).items() if hasattr(value, "shape")}
    expected = {f"w13_{part}": what for part, what in w13.items()} | {f"w2_{part}": what for part, what in w2.items()}
    expected |= {"w13_bias": ("float16", 64), "w2_bias": ("float16", 64)}
    assert {name: (array.dtype.name, *array.shape[1:]) for name, array in arrays.items()} == expected
    for array in arrays.values():
        assert len(array) == 3 and array.weight_loader is len
        assert isinstance(array, cumoe.Parameter if xp is np else xp.ndarray)


@pytest.mark.parametrize(
    ("scheme", "options", "methods"),
    [
        ("fp8_w8a8", {}, ["mine", "tensor"]),
        ("fp8_w8a8", {"per_out_ch_quant": True}, ["mine", "channel"]),
        ("fp8_w8a8", {"block_shape": (128, 128)}, ["mine", "block"]),
        ("fp8_w8a8", {"static_activations": True}, ["mine", "tensor", "tensor"]),
        ("int8_w8a16", {}, ["mine", "channel"]),
        ("int4_w4a16", {"group_size": 32}, ["group", "group"]),
        ("int4_w4afp8", {"group_size": 32}, ["mine", "group"]),
        ("mxfp4_w4a16", {}, ["mine", "group"]),
        ("nvfp4_w4a4", {}, ["mine", "block", "tensor", "tensor"]),
    ],
)
def test_scales_say_what_they_belong_to(scheme, options, methods):
    layer = types.SimpleNamespace()
    some_method(scheme, **options).create_weights(layer, 3, 64, 32, "float16", quant_method="mine")
    for prefix in ("w13_", "w2_"):
        assert [value.quant_method for name, value in vars(layer).items() if name.startswith(prefix)] == methods


@pytest.mark.parametrize(
    ("group_size", "sizes", "settled"),
    [(128, (256, 384), (128, 1)), (128, (256, 192), (64, 2)), (128, (96, 192), (32, 4)), (-1, (34, 30), (-1, 1))],
)
def test_groups_shrink_until_they_divide(group_size, sizes, settled):
    config = config_of(make_problem(1, 2, 3, *sizes))
    method, layer = (
        QuantizedFusedMoEMethod(config, "int4_w4a16", group_size=group_size, has_zero_points=True),
        types.SimpleNamespace(),
    )
    method.create_weights(layer, 3, *sizes, "float16")
    assert (layer.group_size, layer.group_size_div_factor) == settled
    groups = [1 if group_size == -1 else size // settled[0] for size in sizes]
    assert [layer.w13_scales.shape[2], layer.w2_scales.shape[2]] == groups
    assert [layer.w13_qzeros.shape[2], layer.w2_qzeros.shape[2]] == groups


# -- errors -----------------------------------------------------------------------------------------

NAMES = (
    "fp8_w8a8, fp8_w8a16, int8_w8a8, int8_w8a16, int4_w4a16, int4_w4afp8, mxfp4_w4a16, mxfp4_w4a4, mxfp4_mxfp8, "
    "mxfp4_w4a8, nvfp4_w4a4 or nvfp4_w4a16"
)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("fp8", {}, f"scheme must be {NAMES}, got 'fp8'"),
        ("fp8_w8a8", {"group_size": 32}, "group_size must be None for 'fp8_w8a8', got 32"),
        ("fp8_w8a8", {"has_zero_points": True}, "has_zero_points must be False for 'fp8_w8a8', got True"),
        ("fp8_w8a16", {"static_activations": True}, "static_activations must be False for 'fp8_w8a16', got True"),
        ("mxfp4_w4a4", {"block_shape": (1, 32)}, "block_shape must be None for 'mxfp4_w4a4', got [1, 32]"),
        ("nvfp4_w4a4", {"static_activations": True}, "static_activations must be False for 'nvfp4_w4a4', got True"),
        ("fp8_w8a8", {"per_act_token_quant": "yes"}, "per_act_token_quant must be False or True, got 'yes'"),
        (
            "fp8_w8a8",
            {"per_act_token_quant": True, "block_shape": (128, 128)},
            "block_shape must be None with per_act_token_quant = True, got [128, 128]",
        ),
        (
            "fp8_w8a16",
            {"per_out_ch_quant": True, "block_shape": (128, 128)},
            "block_shape must be None with per_out_ch_quant = True, got [128, 128]",
        ),
        (
            "fp8_w8a8",
            {"static_activations": True, "block_shape": (128, 128)},
            "block_shape must be None with static_activations = True, got [128, 128]",
        ),
        (
            "int8_w8a8",
            {"static_activations": True, "per_act_token_quant": True},
            "static_activations must be False with per_act_token_quant = True, got True",
        ),
        ("fp8_w8a8", {"block_shape": (128,)}, "block_shape must be [rows, columns], each >= 1, got [128]"),
        ("fp8_w8a8", {"block_shape": (0, 128)}, "block_shape must be [rows, columns], each >= 1, got [0, 128]"),
        ("int4_w4a16", {}, "group_size must be given for 'int4_w4a16', got None; -1 is one group a row"),
        ("int4_w4a16", {"group_size": 16}, "group_size must be -1, for one group a row, or >= 32, got 16"),
        ("int4_w4a16", {"group_size": 0}, "group_size must be -1, for one group a row, or >= 32, got 0"),
        (
            "int8_w8a16",
            {"has_zero_points": True},
            "has_zero_points must be False for 'int8_w8a16' without group_size, got True",
        ),
    ],
)
def test_options_that_do_not_fit(scheme, options, message):
    with raises(ValueError, message):
        some_method(scheme, **options)


def test_options_of_another_kind():
    with raises(TypeError, "block_shape must be two ints [rows, columns], got (1.5, 128)"):
        some_method("fp8_w8a8", block_shape=(1.5, 128))
    with raises(TypeError, "group_size must be an int, got str"):
        some_method("int4_w4a16", group_size="32")
    with raises(TypeError, "moe must be a FusedMoEConfig, got dict"):
        QuantizedFusedMoEMethod({}, "fp8_w8a8")


@pytest.mark.parametrize(
    ("scheme", "options", "sizes", "message"),
    [
        ("fp8_w8a8", {}, (3, 64, 31), None),
        ("mxfp4_w4a16", {}, (3, 63, 32), "hidden_size must be a multiple of 2, because two codes share a byte, got 63"),
        (
            "nvfp4_w4a4",
            {},
            (3, 64, 31),
            "intermediate_size_per_partition must be a multiple of 2, because two codes share a byte, got 31",
        ),
        (
            "int4_w4afp8",
            {"group_size": -1},
            (3, 60, 32),
            "hidden_size must be a multiple of 8, because eight codes share four bytes, got 60",
        ),
        (
            "int4_w4a16",
            {"group_size": 128},
            (3, 64, 48),
            "group_size must be such that hidden_size = 64 and intermediate_size_per_partition = 48 are multiples of "
            "it, or of its half >= 32 and so on, got 128",
        ),
    ],
)
def test_sizes_that_do_not_fit(scheme, options, sizes, message):
    method = QuantizedFusedMoEMethod(config_of(make_problem(1, 2, *sizes)), scheme, **options)
    if message is None:
        method.create_weights(types.SimpleNamespace(), *sizes, "float32")
        return
    with raises(ValueError, message):
        method.create_weights(types.SimpleNamespace(), *sizes, "float32")


def test_weights_of_the_config_only():
    with raises(ValueError, "hidden_size must be hidden_dim of the config = 64, got 65"):
        some_method("fp8_w8a8").create_weights(types.SimpleNamespace(), 3, 65, 32, "float32")
    with raises(TypeError, "params_dtype must be float32, float16 or bfloat16, got float64"):
        some_method("fp8_w8a8").create_weights(types.SimpleNamespace(), 3, 64, 32, "float64")
