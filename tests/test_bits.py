"""Decoding and encoding of small floats: every code, every rounding boundary, and random float32 patterns."""

import ml_dtypes
import numpy as np
import pytest

from cumoe.cpu import bits
from cumoe.cpu._jit import jit

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CODES = np.arange(1 << 16, dtype=np.uint16)


def each(values, out):
    for i in range(values.size):
        out[i] = CONVERT(values[i])  # noqa: F821


def decode(codes, name):
    out = np.empty(codes.shape, np.float32)
    jit(CONVERT=bits.CODECS[name][0])(each)(codes, out)
    return out


def encode(values, name):
    out = np.empty(values.shape, np.uint16)
    jit(CONVERT=bits.CODECS[name][1])(each)(values, out)
    return out


def numbers_of(name):
    """All 65 536 codes as NumPy and ml_dtypes read them."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return CODES.view(DTYPES[name]).astype(np.float32)


def assert_same_codes(codes, values, name):
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(DTYPES[name]).view(np.uint16)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(codes[~is_nan], expected[~is_nan])
    nans = codes[is_nan].view(DTYPES[name])
    assert np.isnan(nans.astype(np.float32)).all()
    np.testing.assert_array_equal(codes[is_nan] >> 15, np.signbit(values[is_nan]))


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_decodes(name):
    decoded, expected = decode(CODES, name), numbers_of(name)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(decoded[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))
    assert np.isnan(decoded[is_nan]).all()
    np.testing.assert_array_equal(np.signbit(decoded), CODES >= 1 << 15)


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_survives_a_round_trip(name):
    back = encode(decode(CODES, name), name)
    is_nan = np.isnan(numbers_of(name))
    np.testing.assert_array_equal(back[~is_nan], CODES[~is_nan])
    quiet = np.uint16(0x0040 if name == "bfloat16" else 0x0200)
    np.testing.assert_array_equal(back[is_nan], CODES[is_nan] | quiet)  # sign and payload are kept


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_boundaries(name):
    values = np.sort(numbers_of(name)[np.isfinite(numbers_of(name))])
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)  # exact: one bit more
    largest = values[-1]
    step = np.float64(largest) - np.float64(values[-2])
    with np.errstate(over="ignore"):
        beyond = (np.float64(largest) + step * np.array([0.25, 0.5, 0.75, 1, 3])).astype(np.float32)
        around = [np.nextafter(middle, np.float32(sign * np.inf)) for sign in (-1, 1)]
    values = np.concatenate([middle, *around, beyond, -beyond, np.float32([0, -0.0, np.inf, -np.inf])])
    assert_same_codes(encode(values, name), values, name)


@pytest.mark.parametrize("name", DTYPES)
def test_random_patterns(name):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    # most patterns overflow or vanish in float16: as many within its range
    within = rng.integers(100 << 23, 145 << 23, 1 << 20, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, within, -within])
    assert_same_codes(encode(values, name), values, name)


def test_float32_passes_through():
    load, store = bits.CODECS["float32"]
    for value in np.float32([0.1, -0.0, np.inf]):
        assert np.float32(load(value)).tobytes() == np.float32(store(value)).tobytes() == value.tobytes()
