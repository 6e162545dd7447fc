"""Two codes a byte, and the order of scales on Blackwell: exact places on examples by hand, and the way back."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import back, on

import cumoe
from cumoe.reference import formats as law

E4M3, E8M0 = np.dtype("float8_e4m3fn"), np.dtype("float8_e8m0fnu")


def test_pack_along_either_axis_by_hand(xp):
    codes = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)
    along_k, along_n = cumoe.pack_int4(on(xp, codes)), cumoe.pack_int4(on(xp, codes), -2)
    assert back(along_k).tolist() == [[0x21, 0x43], [0x65, 0x87]]
    assert back(along_n).tolist() == [[0x51, 0x62, 0x73, 0x84]]
    assert along_k.dtype == along_n.dtype == np.uint8


def test_only_the_low_four_bits_count(xp):
    signed = np.array([-8, 7, -1, 1], np.int8)
    assert back(cumoe.pack_int4(on(xp, signed))).tolist() == [0x78, 0x1F]
    assert cumoe.pack_int4(signed.astype(ml_dtypes.int4)).tolist() == [0x78, 0x1F]
    assert cumoe.pack_int4(np.array([15, 0], ml_dtypes.uint4)).tolist() == [0x0F]


@given(data=st.data())
def test_pack_equals_the_law_and_comes_back(xp, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] *= 2
    codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 16, shape).astype(np.uint8)
    packed = cumoe.pack_int4(on(xp, codes), axis)
    np.testing.assert_array_equal(back(packed), law.pack(codes, axis))
    np.testing.assert_array_equal(back(cumoe.unpack_int4(packed, axis)), codes)
    assert packed.flags.c_contiguous


def test_swizzle_by_hand(xp):
    scale = np.zeros((130, 5), np.uint8)
    scale[0, 1], scale[1, 0], scale[32, 2], scale[97, 3], scale[3, 4], scale[129, 0] = 1, 2, 3, 4, 5, 6
    swizzled = back(cumoe.swizzle_scales(on(xp, scale)))
    assert swizzled.shape == (256, 8)
    places = {0 * 16 + 1: 1, 1 * 16 + 0: 2, 0 * 16 + 4 + 2: 3, 1 * 16 + 12 + 3: 4, 512 + 3 * 16: 5, 1024 + 16: 6}
    assert {int(place): int(swizzled.flat[place]) for place in swizzled.ravel().nonzero()[0]} == places


@given(
    lead=st.sampled_from([(), (3,), (2, 0), (2, 1)]),
    m=st.integers(0, 260),
    k=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [np.dtype(np.uint8), E4M3, E8M0], ids=str)
def test_swizzle_equals_the_law_and_comes_back(xp, dtype, lead, m, k, seed):
    codes = np.random.default_rng(seed).integers(0, 256, (*lead, m, k)).astype(np.uint8)
    swizzled = cumoe.swizzle_scales(on(xp, codes.view(dtype)))
    assert swizzled.dtype == dtype
    there = back(swizzled).view(np.uint8)
    for matrix in np.ndindex(*lead):
        np.testing.assert_array_equal(there[matrix], law.swizzle(codes[matrix]))
    again = cumoe.unswizzle_scales(swizzled, m, k)
    assert again.dtype == dtype
    np.testing.assert_array_equal(back(again).view(np.uint8), codes)


BYTES = np.zeros((4, 6), np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cumoe.pack_int4(np.zeros(4, np.int32)),
            TypeError,
            "codes must be uint8, int8, uint4 or int4, got int32",
        ),
        (
            lambda: cumoe.pack_int4(np.zeros((2, 3), np.uint8)),
            ValueError,
            "codes must have an even length along axis -1, got shape (2, 3)",
        ),
        (lambda: cumoe.pack_int4(BYTES, 2), ValueError, "axis must be in -2..1, got 2"),
        (lambda: cumoe.pack_int4(BYTES, 1.0), TypeError, "axis must be an int, got float"),
        (lambda: cumoe.pack_int4(BYTES[0, 0, ...]), ValueError, "codes must have at least 1 axis, got shape ()"),
        (
            lambda: cumoe.pack_int4([1, 2]),
            TypeError,
            "codes must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
        ),
        (lambda: cumoe.unpack_int4(BYTES.view(np.int8)), TypeError, "packed must be uint8, got int8"),
        (lambda: cumoe.unpack_int4(BYTES, -3), ValueError, "axis must be in -2..1, got -3"),
        (
            lambda: cumoe.swizzle_scales(np.zeros((2, 2), np.float32)),
            TypeError,
            "scale must be uint8, float8_e4m3fn or float8_e8m0fnu, got float32",
        ),
        (
            lambda: cumoe.swizzle_scales(BYTES[0]),
            ValueError,
            "scale must have at least 2 axes (..., M, K / group), got shape (6,)",
        ),
        (
            lambda: cumoe.unswizzle_scales(BYTES, 4, 6),
            ValueError,
            "scale must have shape (..., 128 ceil(num_rows / 128), 4 ceil(num_cols / 4)) = (128, 8), got (4, 6)",
        ),
        (lambda: cumoe.unswizzle_scales(BYTES, -1, 6), ValueError, "num_rows must be >= 0, got -1"),
        (lambda: cumoe.unswizzle_scales(BYTES, 1, "6"), TypeError, "num_cols must be an int, got str"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
