"""How the operands are quantised: group shapes, descriptors, builders."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest

import cumoe
from cumoe import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, FusedMoEQuantDesc, GroupShape
from cumoe.config import _get_config_dtype_str, _quant_flags_to_group_shape


class PrecisionConfig:
    """Stands for the class of triton_kernels: it holds scales, but is no array."""


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_group_shapes():
    assert GroupShape.PER_TENSOR == (-1, -1) and GroupShape.PER_TOKEN == (1, -1) and GroupShape.PER_CHANNEL == (-1, 1)
    shapes = (*(GroupShape.PER_TENSOR, GroupShape.PER_TOKEN, GroupShape.PER_CHANNEL), GroupShape(1, 128))
    for kind, name in enumerate(("is_per_tensor", "is_per_token", "is_per_channel", "is_per_group")):
        assert [getattr(shape, name)() for shape in shapes] == [i == kind for i in range(4)]
    assert not GroupShape(128, 128).is_per_group() and not GroupShape(1, 0).is_per_group()
    assert repr(GroupShape(row=128, col=64)) == "GroupShape(row=128, col=64)"


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        ((None, False, False, None), (None, None)),
        (("int8", False, False, None), (GroupShape.PER_TENSOR, None)),
        (("int8", True, False, None), (GroupShape.PER_TOKEN, None)),
        ((None, True, False, None), (GroupShape.PER_TOKEN, None)),
        (("int8", False, True, None), (GroupShape.PER_TENSOR, GroupShape.PER_TOKEN)),
        (("int8", True, True, None), (GroupShape.PER_TOKEN, GroupShape.PER_TOKEN)),
        (("int8", False, False, [128, 64]), (GroupShape(128, 64), GroupShape(128, 64))),
        ((None, False, False, [1, 32]), (GroupShape(1, 32), GroupShape(1, 32))),
    ],
)
def test_quant_flags_to_group_shape(flags, shapes):
    assert _quant_flags_to_group_shape(*flags) == shapes


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"use_fp8_w8a8": True, "use_int8_w8a16": True}, "fp8_w8a8"),
        ({"use_fp8_w8a16": True}, "fp8_w8a16"),
        ({"use_int8_w8a16": True, "use_int4_w4a16": True}, "int8_w8a16"),
        ({"use_int4_w4a16": True, "use_mxfp4_w4a4": True}, "int4_w4a16"),
        ({"use_mxfp4_w4a4": True}, "mxfp4_w4a4"),
        ({}, "float32"),
    ],
)
def test_config_dtype_str_takes_the_first_match(flags, name):
    assert _get_config_dtype_str(np.float32, **flags) == name
    assert _get_config_dtype_str("bfloat16", **flags) == (None if name == "float32" else name)


SCALE = np.ones((8, 4, 2), np.float32)


def test_unquantized_config_has_nothing():
    config = FUSED_MOE_UNQUANTIZED_CONFIG
    for name in (
        "a1_scale",
        "a2_scale",
        "w1_scale",
        "w2_scale",
        "w1_precision",
        "w2_precision",
        "a1_gscale",
        "a2_gscale",
    ):
        assert getattr(config, name) is None
    for name in ("g1_alphas", "g2_alphas", "w1_zp", "w2_zp", "w1_bias", "w2_bias", "block_shape", "ocp_mx_scheme"):
        assert getattr(config, name) is None
    for name in dir(config):
        if name.startswith(("use_", "is_per", "is_block", "per_", "is_quantized")):
            assert getattr(config, name) is False, name
    assert config.quant_dtype is None and config.weight_quant_dtype is None
    assert config.is_scale_swizzled is True and config.is_scale_transposed is False and config.mx_alignment == 0
    assert config.config_name("bfloat16") is None and config.config_name(np.float32) == "float32"
    assert config.scale_shape(4, 8) is None and config.batched_scale_shape(2, 4, 8) is None


def test_make_sets_every_array_in_its_place():
    operands = ("w1_scale", "w2_scale", "a1_scale", "a2_scale", "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale")
    operands += ("w1_bias", "w2_bias", "w1_zp", "w2_zp")
    given = {name: np.zeros(1, np.float32) for name in operands}
    config = FusedMoEQuantConfig.make("nvfp4", **given)
    for name, array in given.items():
        assert getattr(config, name) is array, name


def test_fields_of_the_later_version():
    config = FusedMoEQuantConfig.make(
        "mxfp8",
        is_scale_swizzled=False,
        is_scale_transposed=True,
        gemm1_alpha=1.702,
        gemm1_beta=1.0,
        gemm1_clamp_limit=7.0,
        mx_alignment=128,
    )
    assert (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit) == (1.702, 1.0, 7.0)
    assert (config.is_scale_swizzled, config.is_scale_transposed, config.mx_alignment) == (False, True, 128)


def test_block_shape_may_be_a_tuple_and_reads_back_as_a_list():
    assert FusedMoEQuantConfig.make("int8", block_shape=(np.int64(128), 64)).block_shape == [128, 64]


@pytest.mark.parametrize("dtype", [np.int8, np.dtype("int8"), "int8"])
def test_dtypes_are_compared_by_name(dtype):
    config = FusedMoEQuantConfig.make(dtype)
    assert config.use_int8_w8a8 and not config.use_fp8_w8a8 and config.quant_dtype is dtype
    assert FusedMoEQuantConfig.make(weight_dtype=dtype).use_int8_w8a16


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"])
def test_float8_dtypes_are_compared_by_name(dtype):
    assert FusedMoEQuantConfig.make(dtype).use_fp8_w8a8
    assert FusedMoEQuantConfig.make(weight_dtype=dtype).use_fp8_w8a16


def test_torch_dtypes_and_tensors_are_held_untouched():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scale = torch.ones(8, 4)
    config = FusedMoEQuantConfig.make(torch.float8_e4m3fn, w1_scale=scale, a1_scale=scale, w1_bias=scale)
    assert config.use_fp8_w8a8 and config.quant_dtype is torch.float8_e4m3fn
    assert config.w1_scale is config.a1_scale is config.w1_bias is scale
    assert FusedMoEQuantConfig.make(torch.int8).use_int8_w8a8
    assert config.config_name(torch.float32) == "fp8_w8a8"
    assert FUSED_MOE_UNQUANTIZED_CONFIG.config_name(torch.float32) == "float32"
    assert FUSED_MOE_UNQUANTIZED_CONFIG.config_name(torch.bfloat16) is None
    assert "<float32 (8, 4)>" in repr(config)


def test_arrays_are_never_compared_or_read():
    unreadable = np.broadcast_to(np.float32(np.nan), (8, 4))  # read-only; == on it is an array without a truth value
    first, second = (cumoe.int8_w8a8_moe_quant_config(unreadable, unreadable) for _ in range(2))
    assert first != second and len({first, second, first}) == 2
    assert first.w1_scale is unreadable
    assert repr(first._w1) == "FusedMoEQuantDesc(dtype=dtype('int8'), scale=<float32 (8, 4)>)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        first._w1.scale = None


def test_precision_configs_have_their_own_properties():
    precision = PrecisionConfig()
    config = cumoe.mxfp4_w4a16_moe_quant_config(precision, precision)
    assert config.w1_precision is config.w2_precision is precision
    with raises(TypeError, "w1_scale must be an array, got PrecisionConfig; a PrecisionConfig is under w1_precision"):
        _ = config.w1_scale
    arrays = cumoe.mxfp4_w4a16_moe_quant_config(SCALE, SCALE)
    with raises(TypeError, "w2_precision must be a PrecisionConfig, got an array; arrays are under w2_scale"):
        _ = arrays.w2_precision
    with raises(TypeError, "a1_scale must be an array, got PrecisionConfig"):
        _ = cumoe.fp8_w8a8_moe_quant_config(SCALE, SCALE, precision).a1_scale


NOT_A_BLOCK = (
    "block_shape must name the rows and columns of a block, got {}; "
    "pass None with per_act_token_quant=True for one scale a token, or alone for one a tensor"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_shape": [-1, -1]}, NOT_A_BLOCK.format([-1, -1])),
        ({"block_shape": [1, -1]}, NOT_A_BLOCK.format([1, -1])),
        ({"block_shape": [128]}, "block_shape must be [rows, columns], each >= -1, got [128]"),
        ({"block_shape": [128, -2]}, "block_shape must be [rows, columns], each >= -1, got [128, -2]"),
        (
            {"block_shape": [128, 128], "per_act_token_quant": True},
            "block_shape must be None when per_act_token_quant is set, got [128, 128]",
        ),
        (
            {"block_shape": [128, 128], "per_out_ch_quant": True},
            "block_shape must be None when per_out_ch_quant is set, got [128, 128]",
        ),
    ],
)
def test_make_refuses_illegal_blocks(arguments, message):
    with raises(ValueError, message):
        FusedMoEQuantConfig.make("int8", **arguments)


def test_make_refuses_unknown_formats():
    with pytest.raises(ValueError, match=r"^quant_dtype must be nvfp4, mxfp4, .* or int8, got 'int4'$"):
        FusedMoEQuantConfig.make("int4")
    with pytest.raises(ValueError, match=r"^quant_dtype must be .*, got 'float32'$"):
        FusedMoEQuantConfig.make(np.float32)
    with pytest.raises(ValueError, match=r"^weight_dtype must be nvfp4, mxfp4, .* or int4, got 'int3'$"):
        FusedMoEQuantConfig.make(weight_dtype="int3")
    with raises(TypeError, "_a1 must be a FusedMoEQuantDesc, got NoneType"):
        FusedMoEQuantConfig(None, None, None, None)


def test_scale_shape_needs_columns():
    config = FusedMoEQuantConfig.make("int8", block_shape=[128, -1])
    with raises(ValueError, "block_shape must have >= 1 columns to cut a row into blocks, got [128, -1]"):
        config.scale_shape(4, 256)


def test_everything_is_found_in_both_places():
    public = [name for name in cumoe.config.__all__ if not name.startswith("_") and name != "DEFAULT_MAX_NUM_TOKENS"]
    assert len(public) == 24
    for name in public:
        assert getattr(cumoe, name) is getattr(cumoe.config, name)
    assert FusedMoEQuantDesc is cumoe.config.FusedMoEQuantDesc
