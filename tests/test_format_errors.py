"""What a wrong call of a quantiser is told, word by word."""

import numpy as np
import pytest
from sides import on

import cumoe
from cumoe import Quantized

ROW = (1, -1)
F32 = np.float32
X = np.ones((2, 4, 64), F32)
Q = cumoe.quantize(X, "int4", (1, 32))
NV = cumoe.quantize(X, "nvfp4")


def to(xp, arguments):
    """The same arguments with their arrays on `xp`."""
    return [on(xp, one) if isinstance(one, np.ndarray) else one for one in arguments]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, "fp4"), {}, "ValueError: scheme must be fp8, int8, int4, uint8, mxfp4, mxfp8 or nvfp4, got 'fp4'"),
        ((X.astype(np.float64), "fp8"), {}, "TypeError: x must be float32, float16 or bfloat16, got float64"),
        ((X[0, 0], "fp8"), {}, "ValueError: x must have at least 2 axes (..., N, K), got shape (64,)"),
        (
            (X[..., :63], "mxfp4"),
            {},
            "ValueError: x must have an even last axis K for 'mxfp4', got shape (2, 4, 63)",
        ),
        (
            (X[:, :3], "int4"),
            {"zero_points": True},
            "ValueError: x must have an even axis N for zero points, got shape (2, 3, 64)",
        ),
        (
            (X, "int4", (1, 16)),
            {},
            "ValueError: group_shape must be (1, 32), (1, 64) or (1, 128) for 'int4', got (1, 16)",
        ),
        ((X, "nvfp4", (1, 32)), {}, "ValueError: group_shape must be (1, 16) for 'nvfp4', got (1, 32)"),
        (
            (X, "fp8", (-1, 1)),
            {},
            "ValueError: group_shape must be (-1, -1), (1, -1) or two sizes >= 1 for 'fp8', got (-1, 1)",
        ),
        ((X, "fp8", 128), {}, "TypeError: group_shape must be two ints (rows, columns), got 128"),
        (
            (X, "fp8", (128, 128)),
            {"scale": np.ones((2, 1, 2), F32)},
            "ValueError: scale must have shape (..., ceil(N / 128), ceil(K / 128)) = (2, 1, 1), got (2, 1, 2)",
        ),
        (
            (X, "int8"),
            {"scale": np.ones((2, 1), F32)},
            "ValueError: scale must have shape (..., N, 1) = (2, 4, 1), got (2, 1)",
        ),
        ((X, "mxfp4"), {"scale": X}, "TypeError: scale must be float8_e8m0fnu or uint8, got float32"),
        ((X, "fp8"), {"zero_points": True}, "ValueError: zero_points must be False for 'fp8'"),
        (
            (X, "int4", (1, 32)),
            {"zero_points": np.zeros((2, 4, 2), np.uint8)},
            "ValueError: zero_points must have shape (..., N/2, Kb) = (2, 2, 2), got (2, 4, 2)",
        ),
        (
            (X, "uint8", (1, 32)),
            {"zero_points": np.zeros((2, 2, 2), np.uint8)},
            "ValueError: zero_points must have shape (..., Nb, Kb) = (2, 4, 2), got (2, 2, 2)",
        ),
        ((X, "mxfp4"), {"global_scale": X[0, 0]}, "ValueError: global_scale must be None for 'mxfp4'"),
        (
            (X, "nvfp4"),
            {"global_scale": X[0]},
            "ValueError: global_scale must have shape (...) = (2,), got (4, 64)",
        ),
        (
            (X, "nvfp4"),
            {"scale": NV.scale},
            "ValueError: global_scale must be given with scale for 'nvfp4', got None",
        ),
        ((X, "int8"), {"use_ue8m0": True}, "ValueError: use_ue8m0 must be False for 'int8'"),
        ((X, "int8"), {"scale_ub": 1.0}, "ValueError: scale_ub must be None for 'int8'"),
        ((X, "fp8"), {"scale_ub": 1.0}, "ValueError: scale_ub must be None for group_shape (-1, -1)"),
        (
            (X, "fp8", ROW),
            {"scale_ub": 1.0, "scale": X[..., :1]},
            "ValueError: scale_ub must be None with a static scale",
        ),
        ((X, "fp8", ROW), {"scale_ub": "1"}, "TypeError: scale_ub must be a number, got str"),
        ((X, "fp8", ROW), {"scale_ub": 0}, "ValueError: scale_ub must be > 0, got 0"),
        (
            ([1.0], "fp8"),
            {},
            "TypeError: x must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
        ),
        (
            (X, "int4"),
            {"zero_points": "yes"},
            "TypeError: zero_points must be a NumPy, CuPy or DLPack array, got str; use numpy.asarray",
        ),
    ],
)
def test_wrong_calls_of_quantize(xp, arguments, options, message):
    arguments, options = to(xp, arguments), dict(zip(options, to(xp, options.values()), strict=True))
    with pytest.raises((TypeError, ValueError)) as raised:
        cumoe.quantize(*arguments, **options)
    assert f"{type(raised.value).__name__}: {raised.value}" == message


@pytest.mark.parametrize(
    ("quantized", "options", "message"),
    [
        (tuple(Q), {}, "TypeError: quantized must be a Quantized, got tuple"),
        (Q, {"dtype": "float64"}, "ValueError: dtype must be float32, float16 or bfloat16, got 'float64'"),
        (Q._replace(values=X), {}, "TypeError: values must be uint8, got float32"),
        (Q._replace(scale=None), {}, "TypeError: scale must be an array, got None"),
        (
            Q._replace(scale=Q.scale[..., :1]),
            {},
            "ValueError: scale must have shape (..., N, ceil(K / 32)) = (2, 4, 2), got (2, 4, 1)",
        ),
        (Q._replace(global_scale=X), {}, "ValueError: global_scale must be None for 'int4'"),
        (NV._replace(global_scale=None), {}, "TypeError: global_scale must be an array, got None"),
        (
            NV._replace(zero_points=NV.values),
            {},
            "ValueError: zero_points must be None for 'nvfp4'",
        ),
        (
            Q._replace(values=Q.values[0, 0]),
            {},
            "ValueError: values must have at least 2 axes (..., N, K), got shape (32,)",
        ),
        (
            Q._replace(scheme="awq"),
            {},
            "ValueError: scheme must be fp8, int8, int4, uint8, mxfp4, mxfp8 or nvfp4, got 'awq'",
        ),
    ],
)
def test_wrong_calls_of_dequantize(xp, quantized, options, message):
    quantized = type(quantized)._make(to(xp, quantized)) if isinstance(quantized, Quantized) else quantized
    with pytest.raises((TypeError, ValueError)) as raised:
        cumoe.dequantize(quantized, **options)
    assert f"{type(raised.value).__name__}: {raised.value}" == message
