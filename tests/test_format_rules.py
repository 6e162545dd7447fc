"""Quantisers on numbers worked out by hand: tie points, and edges of scales."""

import math

import ml_dtypes
import numpy as np
import pytest
from sides import back, on

import cumoe
from cumoe import GroupShape, Quantized

MATRIX, ROW = (-1, -1), (1, -1)
F32 = np.float32


def up(number):
    return np.nextafter(F32(number), F32(np.inf))


def down(number):
    return np.nextafter(F32(number), F32(-np.inf))


def row(*numbers, size=None):
    out = np.zeros((1, size or len(numbers)), F32)
    out[0, : len(numbers)] = numbers
    return out


def scale_of(absmax, scheme, group=None, size=32, **options):
    return cumoe.quantize(row(-absmax, size=size), scheme, group, **options).scale.ravel()[0]


def codes(x, scheme, group=None, **options):
    values = cumoe.quantize(x, scheme, group, **options).values
    return (cumoe.unpack_int4(values) if values.dtype == np.uint8 else values).ravel()


@pytest.mark.parametrize("group", [MATRIX, ROW])
def test_fp8_scale_of_a_matrix_or_a_row_has_a_floor(group):
    smallest = F32(1) / F32(448 * 512)
    assert scale_of(0, "fp8", group) == scale_of(1e-3, "fp8", group) == smallest
    assert scale_of(896, "fp8", group) == 2
    assert scale_of(100, "fp8", group) == F32(100) / F32(448)


@pytest.mark.parametrize("group", [(1, 128), (128, 128), (1, 4)])
def test_fp8_scale_of_a_group_has_another_floor(group):
    assert scale_of(0, "fp8", group) == F32(1e-10) / F32(448)
    assert scale_of(1e-3, "fp8", group) == F32(1e-3) / F32(448)


def test_scale_ub_cuts():
    x = row(1, 2, 100)
    quantized = cumoe.quantize(x, "fp8", ROW, scale_ub=4.0)
    assert quantized.scale[0, 0] == F32(4) / F32(448)
    assert cumoe.dequantize(quantized).tolist() == [[1, 2, 4]]
    assert cumoe.quantize(x, "fp8", ROW, scale_ub=1e300).scale == cumoe.quantize(x, "fp8", ROW).scale


def test_ue8m0_scales_are_the_power_of_two_above():
    for power in (-10, 0, 7):
        edge = F32(448 * 2.0**power)
        assert scale_of(edge, "fp8", (1, 128), use_ue8m0=True) == 2.0**power
        assert scale_of(up(edge), "fp8", (1, 128), use_ue8m0=True) == 2.0 ** (power + 1)
        assert scale_of(down(edge), "fp8", (1, 128), use_ue8m0=True) == 2.0**power
    assert scale_of(0, "fp8", ROW, use_ue8m0=True) == 2.0**-17


def test_a_static_fp8_scale_is_inverted_and_a_dynamic_one_divides():
    """Multiples of a step in rows of every size: many quotients are tie points, or would be without rounding."""
    top = np.arange(1, 65, dtype=F32)
    x = np.minimum(np.arange(65, dtype=F32), top[:, None]) * F32(0.125)
    s = x.max(axis=1, keepdims=True) / F32(448)
    quotient, product = ((y.astype("float8_e4m3fn")).view(np.uint8) for y in (x / s, x * (F32(1) / s)))
    assert (quotient != product).any()
    dynamic = cumoe.quantize(x, "fp8", ROW)
    np.testing.assert_array_equal(dynamic.scale, s)
    np.testing.assert_array_equal(dynamic.values.view(np.uint8), quotient)
    np.testing.assert_array_equal(cumoe.quantize(x, "fp8", ROW, scale=s).values.view(np.uint8), product)


def test_int8_rounds_half_away_half_even_or_toward_zero():
    x = row(127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 126.5, -126.5, up(0.5), 1.9999999)
    assert codes(x, "int8", ROW).tolist() == [127, 1, 2, 3, -1, -2, -3, 0, 127, -127, 1, 2]
    assert codes(x, "int8", MATRIX).tolist() == [127, 0, 2, 2, 0, -2, -2, 0, 126, -126, 1, 2]
    assert codes(x, "int8", (1, 12)).tolist() == [127, 0, 1, 2, 0, -1, -2, 0, 126, -126, 0, 1]
    one = np.ones((1, 1), F32)
    for group in (MATRIX, ROW, (1, 12)):
        assert codes(x, "int8", group, scale=one).tolist() == codes(x, "int8", MATRIX).tolist()


def test_int8_saturates_under_a_static_scale():
    x = row(127.5, 128, 1e30, -127.5, -128.5, -1e30)
    assert codes(x, "int8", scale=np.ones((1, 1), F32)).tolist() == [127, 127, 127, -128, -128, -128]
    assert scale_of(0, "int8") == F32(1e-10) / F32(127)


def test_int4_uses_all_its_codes():
    numbers = np.arange(-8, 8, dtype=F32) * F32(0.25)
    x = np.concatenate([numbers, numbers])[None]
    quantized = cumoe.quantize(x, "int4", (1, 32))
    assert quantized.scale.tolist() == [[0.25]]
    assert codes(x, "int4", (1, 32)).tolist() == [*range(16), *range(16)]
    assert scale_of(8, "int4", (1, 32)) == 1  # -8 is code 0
    assert cumoe.quantize(row(7, size=32), "int4", (1, 32)).scale == 1


def test_int4_zero_points_pack_along_n():
    x = np.zeros((2, 64), F32)
    x[0, :2], x[0, 32:34], x[1, :2], x[1, 32:34] = (0, 15), (-15, 0), (-5, 10), (-1, 2)
    quantized = cumoe.quantize(x, "int4", (1, 32), zero_points=True)
    assert quantized.scale.tolist() == [[1, 1], [1, F32(0.2)]]
    assert quantized.zero_points.tolist() == [[0 | 5 << 4, 15 | 5 << 4]]
    np.testing.assert_array_equal(cumoe.dequantize(quantized), np.where(x == 2, F32(10) * F32(0.2), x))


def test_int4_ties_go_to_even():
    one = np.ones((1, 1), F32)
    x = row(0.5, 1.5, -0.5, -1.5, up(0.5), down(0.5), 7.5, 100, -8.5, -100, size=32)
    assert codes(x, "int4", (1, 32), scale=one)[:10].tolist() == [8, 10, 8, 6, 9, 8, 15, 15, 0, 0]


def test_int4_scales_have_the_dtype_of_the_numbers():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = np.full((1, 32), 1e-3, dtype)
        assert cumoe.quantize(x, "int4", (1, 32)).scale.dtype == dtype
        assert (cumoe.quantize(x * 0, "int4", (1, 32)).scale > 0).all()
    smallest = 2.0**-24
    assert float(cumoe.quantize(np.zeros((1, 32), np.float16), "int4", (1, 32)).scale[0, 0]) == smallest


def test_uint8_has_its_zero_in_the_middle(xp):
    x = row(127, -127, 0, 0.5, 1.5, -0.5, -1.5, 63.5, up(0.5), down(-0.5))
    quantized = cumoe.quantize(on(xp, x), "uint8", ROW)
    assert back(quantized.scale).tolist() == [[1]]
    assert quantized.zero_points is None
    assert back(quantized.values).tolist() == [[255, 1, 128, 128, 130, 128, 126, 192, 129, 127]]
    one = on(xp, np.ones((1, 1), ml_dtypes.bfloat16))
    beyond = on(xp, row(127.5, 300, 1e30, -128, -128.5, -1e30))
    assert back(cumoe.quantize(beyond, "uint8", ROW, scale=one).values).tolist() == [[255, 255, 255, 0, 0, 0]]
    assert scale_of(0, "uint8", ROW) == F32(1e-10) / F32(127)


def test_uint8_zero_points_have_a_byte_each(xp):
    x = np.concatenate([row(0, 255, 10), row(-255, 0, -10), row(-55, 200, 0)])  # three rows: nothing is packed
    quantized = cumoe.quantize(on(xp, x), "uint8", ROW, zero_points=True)
    assert back(quantized.scale).tolist() == [[1], [1], [1]]
    assert back(quantized.zero_points).tolist() == [[0], [255], [55]]
    assert back(quantized.values).tolist() == [[0, 255, 10], [0, 255, 245], [0, 255, 55]]
    assert back(cumoe.dequantize(quantized)).tolist() == x.tolist()
    given = cumoe.quantize(on(xp, x), "uint8", ROW, scale=quantized.scale, zero_points=quantized.zero_points)
    assert back(given.values).tolist() == back(quantized.values).tolist()


@pytest.mark.parametrize(
    ("absmax", "code"),
    [
        (0, 0), (1e-45, 0), (2.0**-126, 0), (2.0**-124, 1), (1, 125), (4, 127), (6, 127), (down(7), 127), (7, 128),
        (8, 128), (3.4e38, 253),
    ],
)  # fmt: skip
def test_mxfp4_scale(absmax, code):
    assert scale_of(absmax, "mxfp4").view(np.uint8) == code


@pytest.mark.parametrize(
    ("absmax", "code"),
    [
        (0, 0), (1e-45, 0), (448 * 2.0**-127, 0), (up(448 * 2.0**-127), 1), (448, 127), (up(448), 128),
        (down(448), 127), (1, 119), (3.4e38, 247),
    ],
)  # fmt: skip
def test_mxfp8_scale(absmax, code):
    assert scale_of(absmax, "mxfp8").view(np.uint8) == code


TIES = ((0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4))


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_fp4_tie_points(scheme):
    """Those that the public kernels state, and the numbers beside them."""
    size = 32
    x = row(*(point for point, _ in TIES), *(-point for point, _ in TIES), 6.5, 1e30, -1e30, -0.1, size=size)
    static = {"scale": np.full((1, 1), 127, np.uint8).view("float8_e8m0fnu")}
    if scheme == "nvfp4":
        static = {"scale": np.ones((1, 2), "float8_e4m3fn"), "global_scale": np.ones((), F32)}
    values = [value for _, value in TIES]
    numbers = cumoe.dequantize(cumoe.quantize(x, scheme, **static))[0]
    assert numbers[:14].tolist() == [*values, *(-value for value in values)]
    assert numbers[14:17].tolist() == [6, 6, -6]
    assert math.copysign(1, numbers[17]) == -1  # a small negative number is the negative zero
    for move, neighbour in ((up, 1), (down, 0)):
        table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        beside = row(*(move(point) for point, _ in TIES), size=size)
        got = cumoe.dequantize(cumoe.quantize(beside, scheme, **static))[0, :7]
        assert got.tolist() == [table[i + neighbour] for i in range(7)]


def test_nvfp4_scales():
    x = row(6, size=16)
    x = np.concatenate([x, x / 2, x * 0], axis=1)
    quantized = cumoe.quantize(x, "nvfp4")
    assert quantized.global_scale.shape == ()
    assert quantized.global_scale == 448
    assert quantized.scale.astype(F32).tolist() == [[448, 224, 0]]
    np.testing.assert_array_equal(cumoe.dequantize(quantized), x)
    larger = cumoe.quantize(x, "nvfp4", global_scale=np.array([1000], F32))
    assert larger.scale.astype(F32).tolist() == [[448, 448, 0]]  # saturates
    assert cumoe.quantize(x * 0, "nvfp4").global_scale == F32(2688) / F32(1e-10)


def test_the_scale_codes_0_and_255():
    zero_codes = np.zeros((1, 16), np.uint8)
    for code, expected in ((0, 0), (1, 0), (127, 0), (200, 0), (254, 0), (255, np.nan)):
        quantized = Quantized(zero_codes, np.full((1, 1), code, np.uint8), "mxfp4", GroupShape(1, 32))
        np.testing.assert_array_equal(cumoe.dequantize(quantized), expected)
    ones = Quantized(zero_codes + 2, np.zeros((1, 1), np.uint8), "mxfp4", GroupShape(1, 32))
    assert (cumoe.dequantize(ones)[0, ::2] == F32(2.0**-127)).all()
