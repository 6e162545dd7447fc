"""Codes of the small formats, in the law and on every side: each one, every tie point, and random float32 patterns."""

import ml_dtypes
import numpy as np
import pytest
from sides import back, on

from cumoe import _arrays
from cumoe.reference import formats as law

E4M3, E2M1, E8M0 = (np.dtype(name) for name in ("float8_e4m3fn", "float4_e2m1fn", "float8_e8m0fnu"))
BYTES = np.arange(256, dtype=np.uint8)
NIBBLES = np.arange(16, dtype=np.uint8)

# dtype, its codes, the law's values, the law's encoder, the scheme whose codes these are
FLOATS = {
    "e4m3": (E4M3, BYTES, law.E4M3, law.e4m3, "mxfp8"),
    "e2m1": (E2M1, NIBBLES, law.E2M1, law.e2m1, "mxfp4"),
}


def encoded(xp, scheme, x):
    """Codes of `x` times one, as the side works them out; called past the front desk, for NaN and infinities."""
    x = np.concatenate([x, x[: len(x) % 2]])  # two share a byte
    out = xp.empty((1, 1, x.size // (2 if scheme == "mxfp4" else 1)), np.uint8)
    ones = on(xp, np.full((1, 1, 1), 127, np.uint8)), "uint8", None, on(xp, np.ones(1, np.float32))
    room = _arrays.room(xp, "formats")
    room.encode(on(xp, x.reshape(1, 1, -1)), "float32", *ones, 1, x.size, scheme, out)
    codes = back(out)[0, 0]
    return law.unpack(codes, -1) if scheme == "mxfp4" else codes


def decoded(xp, scheme, codes, scale=127):
    """Numbers of `codes`; those of `scale` too, if that is an array."""
    scale = np.broadcast_to(np.uint8(scale), codes.shape).reshape(1, -1, 1)
    codes = np.stack([codes, codes], axis=-1)
    stored = (law.pack(codes, -1) if scheme == "mxfp4" else codes).reshape(1, len(codes), -1)
    out = xp.empty((1, *codes.shape), np.float32)
    ones = on(xp, scale.copy()), "uint8", None, on(xp, np.ones(1, np.float32))
    _arrays.room(xp, "formats").decode(on(xp, stored), *ones, 1, 2, scheme, "float32", out)
    return back(out)[0, :, 0]


def assert_same_floats(got, expected):
    """The same bits; any NaN is a NaN."""
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), is_nan)
    np.testing.assert_array_equal(
        got[~is_nan].astype(np.float32).view(np.uint32), expected[~is_nan].astype(np.float32).view(np.uint32)
    )


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_has_the_value_of_ml_dtypes(xp, name):
    dtype, codes, values, _, scheme = FLOATS[name]
    expected = codes.view(dtype).astype(np.float32)
    assert_same_floats(values, expected)
    assert_same_floats(decoded(xp, scheme, codes), expected)


def test_every_scale_code_has_the_value_of_ml_dtypes(xp):
    expected = BYTES.view(E8M0).astype(np.float32)
    assert_same_floats(law.E8M0, expected)
    assert_same_floats(decoded(xp, "mxfp8", np.full(256, 0x38, np.uint8), BYTES), expected)  # 0x38 is 1
    assert expected[0] == 2.0**-127  # a subnormal of float32, not zero


def test_every_int4_code_has_the_value_of_ml_dtypes():
    values = law.decode(NIBBLES, np.ones(16, np.float32), "int4", np.full(16, 8, np.uint8))
    np.testing.assert_array_equal(values, np.arange(-8, 8, dtype=np.int8).astype(ml_dtypes.int4).astype(np.float32))
    np.testing.assert_array_equal(law.encode_unsigned(values, np.ones(16, np.float32), np.uint8(8), "int4"), NIBBLES)


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_survives_a_round_trip(xp, name):
    _, codes, values, encode, scheme = FLOATS[name]
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(encode(values)[numbers], codes[numbers])
    np.testing.assert_array_equal(encoded(xp, scheme, values.astype(np.float32))[numbers], codes[numbers])


@pytest.mark.parametrize("name", FLOATS)
def test_every_tie_point_goes_to_the_even_code(xp, name):
    _, _, values, encode, scheme = FLOATS[name]
    table = values[: np.nanargmax(values) + 1]
    middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(middle, (table[1:] + table[:-1]) / 2)  # a float32 can be the tie point
    lower = np.arange(len(middle))
    cases = [
        (middle, lower + lower % 2),
        (np.nextafter(middle, np.float32(0)), lower),
        (np.nextafter(middle, np.float32(np.inf)), lower + 1),
    ]
    for points, codes in cases:
        for signed, expected in ((points, codes), (-points, codes + len(values) // 2)):
            np.testing.assert_array_equal(encode(signed), expected)
            np.testing.assert_array_equal(encoded(xp, scheme, signed)[: len(signed)], expected)


@pytest.mark.parametrize("name", FLOATS)
def test_beyond_the_largest_it_saturates(xp, name):
    _, _, values, encode, scheme = FLOATS[name]
    largest = np.float32(np.nanmax(values))
    beyond = np.array([largest, largest * 1.01, largest * 1.2, largest * 4, 3e38, np.inf], np.float32)
    for x, wanted in ((beyond, largest), (-beyond, -largest)):
        np.testing.assert_array_equal(values[encode(x)], wanted)
        np.testing.assert_array_equal(values[encoded(xp, scheme, x)], wanted)


@pytest.mark.parametrize("name", FLOATS)
def test_random_patterns_round_as_ml_dtypes_does(xp, name):
    dtype, _, values, encode, scheme = FLOATS[name]
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    within = rng.integers(115 << 23, 137 << 23, 1 << 18, dtype=np.uint32).view(np.float32)
    x = np.concatenate([patterns[np.isfinite(patterns)], within, -within, np.float32([0, -0.0, 1e-45, -1e-45])])
    largest = np.float32(np.nanmax(values))
    expected = np.clip(x, -largest, largest).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(encode(x), expected)
    np.testing.assert_array_equal(encoded(xp, scheme, x)[: len(x)], expected)


@pytest.mark.parametrize(("name", "code"), [("e4m3", 0x7F), ("e2m1", 0)])
def test_nan_has_one_code(xp, name, code):
    encode, scheme = FLOATS[name][3:]
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    np.testing.assert_array_equal(encode(nans), code)
    np.testing.assert_array_equal(encoded(xp, scheme, nans), code)
