"""Wrong calls of the layer on quantised operands: the exact message, and nothing written to `out`."""

import dataclasses

import numpy as np
import pytest
from wrong_calls import LAYER, W1, W2, E, H, I, T, refused

import cumoe
from cumoe import FusedMoEQuantConfig, FusedMoEQuantDesc, GroupShape

ROW = GroupShape(1, -1)
FP8_1, FP8_2 = (cumoe.quantize(w, "fp8", ROW) for w in (W1, W2))
INT8_1, INT8_2 = (cumoe.quantize(w, "int8", ROW) for w in (W1, W2))
WIDE_1, WIDE_2 = np.ones((E, 128, 64), "float32"), np.ones((E, 64, 64), "float32")
INT4_1, INT4_2 = (cumoe.quantize(w, "int4", (1, 32), zero_points=True) for w in (WIDE_1, WIDE_2))
BYTES_1, BYTES_2 = (cumoe.quantize(w, "uint8", (1, 32), zero_points=True) for w in (WIDE_1, WIDE_2))
MX_1, MX_2 = (cumoe.quantize(w, "mxfp4") for w in (W1, W2))
NV_1, NV_2 = (cumoe.quantize(w, "nvfp4") for w in (W1, W2))
ONES, ONE = np.ones(E, "float32"), np.ones(1, "float32")

FP8 = cumoe.fp8_w8a8_moe_quant_config(FP8_1.scale, FP8_2.scale, None, None, True, True)
INT8 = cumoe.int8_w8a16_moe_quant_config(INT8_1.scale[..., 0], INT8_2.scale[..., 0])
INT4 = cumoe.int4_w4a16_moe_quant_config(
    INT4_1.scale, INT4_2.scale, INT4_1.zero_points, INT4_2.zero_points, block_shape=[0, 32]
)
BYTES = cumoe.int8_w8a16_moe_quant_config(
    BYTES_1.scale, BYTES_2.scale, BYTES_1.zero_points, BYTES_2.zero_points, block_shape=[0, 32]
)
MX = cumoe.mxfp4_w4a16_moe_quant_config(MX_1.scale, MX_2.scale)
NV = cumoe.nvfp4_moe_quant_config(ONES, ONES, ONE, ONE, NV_1.scale, NV_2.scale)


def layer(w1, w2, config):
    x = np.ones((T, 64), "float32") if w2.shape[1] == 64 else LAYER["hidden_states"]
    return LAYER | {"hidden_states": x, "w1": w1, "w2": w2, "quant_config": config}


LAYERS = {
    "fp8": layer(FP8_1.values, FP8_2.values, FP8),
    "int8": layer(INT8_1.values, INT8_2.values, INT8),
    "int4": layer(INT4_1.values, INT4_2.values, INT4),
    "bytes": layer(BYTES_1.values, BYTES_2.values, BYTES),
    "mxfp4": layer(MX_1.values, MX_2.values, MX),
    "nvfp4": layer(NV_1.values, NV_2.values, NV),
}


def change(config, name, **fields):
    """The config with one operand, as "w1", changed."""
    return dataclasses.replace(config, **{f"_{name}": dataclasses.replace(getattr(config, f"_{name}"), **fields)})


@pytest.mark.parametrize("name", LAYERS)
def test_unchanged_they_run(name):
    assert np.isfinite(cumoe.fused_experts(**LAYERS[name])).all()


AVAILABLE = "float8_e4m3fn, fp8, int8, int4, mxfp4, mxfp8, nvfp4"
ROWS_AVAILABLE = "float8_e4m3fn, fp8, int8, mxfp4, mxfp8, nvfp4"
SHAPES = "(E,), (E, N), (E, N, 1) or (E, N, K / group)"
ONLY_TENSOR = "only one scale a tensor can be static, this one is found for each row"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        # number formats
        (
            "mxfp4",
            {"w1": {"dtype": "mxfp6_e3m2"}},
            f"NotImplementedError: no kernel for w1 in 'mxfp6_e3m2'; available: {AVAILABLE}",
        ),
        (
            "mxfp4",
            {"w2": {"dtype": "mxfp6_e2m3"}},
            f"NotImplementedError: no kernel for w2 in 'mxfp6_e2m3'; available: {AVAILABLE}",
        ),
        (
            "mxfp4",
            {"a1": {"dtype": "mxfp6_e3m2"}},
            f"NotImplementedError: no kernel for activations of product 1 in 'mxfp6_e3m2'; available: {ROWS_AVAILABLE}",
        ),
        (
            "fp8",
            {"a2": {"dtype": "float8_e5m2"}},
            "NotImplementedError: no kernel for activations of product 2 in 'float8_e5m2'; "
            f"available: {ROWS_AVAILABLE}",
        ),
        (
            "fp8",
            {"w1": {"dtype": None}},
            "ValueError: quant_config must say how w1 is quantised; it quantises other operands only",
        ),
        # scales of weights
        ("fp8", {"w1": {"scale": None}}, "TypeError: w1_scale must be an array, got None"),
        ("nvfp4", {"w2": {"scale": None}}, "TypeError: w2_scale must be an array, got None"),
        (
            "fp8",
            {"w1": {"scale": object()}},
            "TypeError: w1_scale must be an array, got object; a PrecisionConfig is under w1_precision",
        ),
        (
            "fp8",
            {"w1": {"scale": np.ones((E, 3), "float32")}},
            f"ValueError: w1_scale must be {SHAPES} with E=4, N=48, K=32, got (4, 3)",
        ),
        (
            "fp8",
            {"w2": {"scale": np.ones((E, 2), "float32")}},
            f"ValueError: w2_scale must be {SHAPES} with E=4, N=32, K=24, got (4, 2)",
        ),
        (
            "fp8",
            {"w1": {"scale": np.ones((E, 3, 2), "float32"), "shape": GroupShape(16, 8)}},
            "ValueError: w1_scale must have shape (E, ceil(N / 16), ceil(K / 8)) = (4, 3, 4), got (4, 3, 2)",
        ),
        (
            "int4",
            {"w2": {"scale": np.ones((E, 64, 3), "float32")}},
            "ValueError: w2_scale must have shape (E, N, ceil(K / 32)) = (4, 64, 2), got (4, 64, 3)",
        ),
        (
            "mxfp4",
            {"w1": {"scale": np.ones((E, 48, 2), "uint8")}},
            "ValueError: w1_scale must have shape (E, N, ceil(K / 32)) = (4, 48, 1), got (4, 48, 2)",
        ),
        (
            "nvfp4",
            {"w1": {"scale": NV_1.scale[:, :, :1]}},
            "ValueError: w1_scale must have shape (E, N, ceil(K / 16)) = (4, 48, 2), got (4, 48, 1)",
        ),
        (
            "fp8",
            {"w1": {"scale": np.ones(E, "float16")}},
            "TypeError: w1_scale must be float32, float8_e8m0fnu or uint8, got float16",
        ),
        (
            "int8",
            {"w1": {"scale": np.ones(E, "uint8")}},
            "TypeError: w1_scale must be float32, float16 or bfloat16, got uint8",
        ),
        (
            "mxfp4",
            {"w1": {"scale": np.ones((E, 48, 1), "float32")}},
            "TypeError: w1_scale must be float8_e8m0fnu or uint8, got float32",
        ),
        # zero points
        (
            "int8",
            {"w1": {"zp": np.ones((E, 48, 1), "uint8")}},
            "ValueError: w1_zp must be None for 'int8' codes; zero points go with unsigned ones",
        ),
        (
            "fp8",
            {"w2": {"zp": np.ones((E, 32, 1), "uint8")}},
            "ValueError: w2_zp must be None for 'fp8' codes; zero points go with unsigned ones",
        ),
        ("mxfp4", {"w1": {"zp": np.ones((E, 48, 1), "uint8")}}, "ValueError: w1_zp must be None for 'mxfp4'"),
        (
            "int4",
            {"w1": {"zp": np.ones((E, 128, 2), "uint8")}},
            "ValueError: w1_zp must have shape (E, N / 2, K / group) = (4, 64, 2), got (4, 128, 2)",
        ),
        (
            "bytes",
            {"w1": {"zp": np.ones((E, 64, 2), "uint8")}},
            "ValueError: w1_zp must have shape (E, N, K / group) = (4, 128, 2), got (4, 64, 2)",
        ),
        ("int4", {"w2": {"zp": np.ones((E, 32, 2), "int8")}}, "TypeError: w2_zp must be uint8, got int8"),
        (
            "int4",
            {"w1": {"scale": np.ones((E, 4, 2), "float32"), "shape": GroupShape(32, 32)}},
            "ValueError: w1_zp must be None for scales of 32 rows",
        ),
        # scales of activations
        ("fp8", {"a1": {"scale": ONE}}, f"ValueError: a1_scale must be None: {ONLY_TENSOR}"),
        ("fp8", {"a2": {"scale": ONES}}, f"ValueError: a2_scale must be None: {ONLY_TENSOR}"),
        (
            "fp8",
            {"a1": {"scale": ONES, "shape": None}},
            "ValueError: a1_scale must have one element, got shape (4,); take the largest",
        ),
        (
            "fp8",
            {"a1": {"scale": np.ones(1, "int32"), "shape": None}},
            "TypeError: a1_scale must be float32, float16 or bfloat16, got int32",
        ),
        ("int8", {"a1": {"scale": ONE}}, "ValueError: a1_scale must be None for activations that are not quantised"),
        (
            "int8",
            {"a2": {"alpha_or_gscale": ONE}},
            "ValueError: a2_gscale must be None for activations that are not quantised",
        ),
        ("fp8", {"a1": {"alpha_or_gscale": ONE}}, "ValueError: a1_gscale must be None for 'fp8'"),
        # two levels of scales
        ("nvfp4", {"a1": {"alpha_or_gscale": None}}, "TypeError: a1_gscale must be an array, got None"),
        (
            "nvfp4",
            {"a2": {"alpha_or_gscale": np.ones(3, "float32")}},
            "ValueError: a2_gscale must have shape (1,) or (E,) = (4,), got (3,)",
        ),
        (
            "nvfp4",
            {"a1": {"alpha_or_gscale": ONE.astype("float16")}},
            "TypeError: a1_gscale must be float32, got float16",
        ),
        ("nvfp4", {"w1": {"alpha_or_gscale": None}}, "TypeError: g1_alphas must be an array, got None"),
        (
            "nvfp4",
            {"w2": {"alpha_or_gscale": np.ones((E, 2), "float32")}},
            "ValueError: g2_alphas must be (E,) or (E, N) with E=4, N=32, got shape (4, 2)",
        ),
        (
            "nvfp4",
            {"w1": {"alpha_or_gscale": ONES.astype("float16")}},
            "TypeError: g1_alphas must be float32, got float16",
        ),
    ],
)
def test_parts_of_a_config(name, changes, message):
    given = dict(LAYERS[name])
    for operand, fields in changes.items():
        given["quant_config"] = change(given["quant_config"], operand, **fields)
    given["out"] = np.full(given["hidden_states"].shape, 7, "float32")
    refused(cumoe.fused_experts, given, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("int8", {"w1": W1}, "TypeError: w1 must be int8 or uint8, got float32"),
        ("fp8", {"w2": INT8_2.values}, "TypeError: w2 must be float8_e4m3fn or uint8, got int8"),
        ("mxfp4", {"w1": MX_1.values.view("int8")}, "TypeError: w1 must be uint8, got int8"),
        ("int8", {"w1": INT8_1.values[0]}, "ValueError: w1 must have 3 axes (E, 2I, H), got shape (48, 32)"),
        (
            "int8",
            {"w1": INT8_1.values[:, :24]},
            "ValueError: w1 must be (E, 2I, H) = (4, 48, 32), got (4, 24, 32)",
        ),
        (
            "mxfp4",
            {"w1": MX_1.values[:, :, :8]},
            "ValueError: w1 must be (E, 2I, H) = (4, 48, 32) (K counts the codes, two a byte), got (4, 48, 16)",
        ),
        ("int8", {"w2": INT8_2.values[:3]}, "ValueError: w1 must be (E, 2I, H) = (3, 48, 32), got (4, 48, 32)"),
        (
            "int8",
            {"w1": INT8_1.values[:0], "w2": INT8_2.values[:0]},
            "ValueError: w1 and w2 must have E >= 1, got sizes (0, 48, 32) and (0, 32, 24)",
        ),
        (
            "fp8",
            {"hidden_states": LAYER["hidden_states"].astype("float64")},
            "TypeError: hidden_states must be float32, float16 or bfloat16, got float64",
        ),
        (
            "fp8",
            {"hidden_states": LAYER["hidden_states"][:, :31]},
            "ValueError: hidden_states must have shape (T, H) = (5, 32), got (5, 31)",
        ),
    ],
)
def test_codes(name, changes, message):
    given = LAYERS[name] | changes | {"out": np.full((T, H), 7, "float32")}
    refused(cumoe.fused_experts, given, message)


def test_scales_of_another_library():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    config = change(INT8, "w1", scale=torch.from_numpy(INT8_1.scale))
    given = LAYERS["int8"] | {"quant_config": config}
    with pytest.raises(TypeError, match=r"^arguments must be all NumPy .* w1_scale: torch"):
        cumoe.fused_experts(**given)


def test_preparing():
    codes = {"w1": INT8_1.values, "w2": INT8_2.values, "quant_config": INT8}
    prepared = cumoe.prepare(**codes)
    message = "ValueError: backend must be None for quantised weights: codes serve every kernel; name it in the call"
    refused(cumoe.prepare, codes | {"backend": "portable"}, message)
    message = (
        "ValueError: out must have been prepared with scales and zero points of the same shapes, and activations that"
        " are quantised alike; prepare it anew"
    )
    by_expert = cumoe.int8_w8a16_moe_quant_config(ONES, ONES)
    refused(cumoe.prepare, codes | {"quant_config": by_expert, "out": prepared}, message)
    refused(cumoe.prepare, {"w1": FP8_1.values, "w2": FP8_2.values, "quant_config": FP8, "out": prepared}, message)
    assert prepared.intermediate_size == I
    on_rows = cumoe.int8_w8a8_moe_quant_config(INT8_1.scale, INT8_2.scale, per_act_token_quant=True)
    by_row = cumoe.prepare(**codes | {"quant_config": on_rows})
    for given, out in ((INT8, by_row), (on_rows, cumoe.prepare(**codes))):
        refused(cumoe.prepare, codes | {"quant_config": given, "out": out}, message)


def test_a_config_that_quantises_tokens_only():
    only_tokens = FusedMoEQuantConfig(*[FusedMoEQuantDesc("int8")] * 2, *[FusedMoEQuantDesc()] * 2)
    message = "ValueError: quant_config must say how w1 is quantised; it quantises other operands only"
    refused(cumoe.fused_experts, LAYER | {"quant_config": only_tokens}, message)
