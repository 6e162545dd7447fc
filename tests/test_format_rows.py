"""Rows quantised at once, before a product: the bits of extremes, scales, codes and numbers one after the other."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantised_rows import DTYPES, KINDS, Kind, at_once, drawn_rows, given_scales, step_by_step
from sides import back

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
# those of one dtype: rows in the registers of a part of a warp, a warp and a block, and longer ones; odd ones
SIZES = [(1, 2), (3, 34), (5, 250), (2, 264), (2, 1064), (1, 8202), (3, 5184), (70, 96), (2, 10_304)]


def assert_same(results, expected, dtype):
    for got, wanted in zip(map(back, results), map(back, expected), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        kind = "float32" if got.ndim == 1 else dtype
        is_nan = np.isnan(wanted.view(kind).astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.view(kind).astype(np.float32)), is_nan)
        unsigned = f"u{got.itemsize}"
        np.testing.assert_array_equal(got.view(unsigned)[~is_nan], wanted.view(unsigned)[~is_nan])


def check(xp, kind, bits, dtype):
    """Into other memory, which the rows survive, and in place."""
    x = xp.asarray(bits)
    scales = given_scales(xp, kind, x, dtype)
    expected = step_by_step(xp, kind, x, dtype, scales)
    before = back(x).tobytes()
    assert_same(at_once(xp, kind, x, dtype, scales), expected, dtype)
    assert back(x).tobytes() == before
    numbers, factor = at_once(xp, kind, x, dtype, scales, x)
    assert numbers is x
    assert_same((numbers, factor), expected, dtype)


@each_kind
@given(
    num_rows=st.integers(1, 9),
    half=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    special=st.booleans(),
)
def test_equals_the_steps_one_by_one(xp, kind, num_rows, half, dtype, seed, special):
    rng = np.random.default_rng(seed)
    bits = drawn_rows(rng, num_rows, 2 * half, dtype)
    if special:  # NaN, infinities, the largest
        places = rng.integers(0, bits.size, 3)
        bits.reshape(-1).view(dtype)[places] = rng.choice([np.nan, np.inf, -np.inf, 6e4], 3)
    check(xp, kind, bits, dtype)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size(xp, kind, dtype):
    rng = np.random.default_rng(1)
    for shape in SIZES:
        check(xp, kind, drawn_rows(rng, *shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_any_address_and_an_odd_row(xp, shift, dtype):
    flat = xp.asarray(drawn_rows(np.random.default_rng(2), 1, shift + 6 * 264, dtype)[0])
    for shape in ((6, 264), (3, 263)):
        for kind in (Kind("fp8"), Kind("int8", 5), Kind("fp8", 128)):
            x = flat[shift : shift + shape[0] * shape[1]].reshape(shape)
            scales = given_scales(xp, kind, x, dtype)
            expected = step_by_step(xp, kind, x, dtype, scales)
            moved = xp.empty(shift + x.size, x.dtype)[shift:].reshape(shape)
            assert_same(at_once(xp, kind, x, dtype, scales, moved), expected, dtype)
    for kind in (Kind("mxfp4", 32), Kind("nvfp4", 16)):  # an odd number of columns: the last one has a neighbour, zero
        bits = drawn_rows(np.random.default_rng(3), 4, 48, dtype)
        bits[:, 47] = 0
        x, odd = xp.asarray(bits), xp.asarray(bits[:, :47].copy())
        expected, _ = step_by_step(xp, kind, x, dtype, given_scales(xp, kind, x, dtype))
        assert_same(at_once(xp, kind, odd, dtype, given_scales(xp, kind, odd, dtype))[:1], (expected[:, :47],), dtype)


@each_kind
def test_nothing(xp, kind):
    for shape in ((0, 64), (0, 0), (3, 0)):
        x = xp.empty(shape, np.uint16)
        numbers, factor = at_once(xp, kind, x, "bfloat16", given_scales(xp, kind, x, "bfloat16"))
        assert numbers.shape == shape
        if not kind.cols:
            least = {"fp8": np.float32(1 / (448 * 512)), "int8": np.float32(1e-10) / np.float32(127)}[kind.scheme]
            scale = np.float32(0.0173) if kind.scale == "static" else least
            np.testing.assert_array_equal(back(factor), np.full(len(x), scale))


@each_kind
def test_same_bits_on_any_number_of_threads(kind):
    x = drawn_rows(np.random.default_rng(4), 200, 384, "bfloat16")
    scales = given_scales(np, kind, x, "bfloat16")
    expected = [at_once(np, kind, x[r : r + 1], "bfloat16", _of_row(scales, r)) for r in range(len(x))]
    before = numba.get_num_threads()
    for threads in {1, before}:
        numba.set_num_threads(threads)
        try:
            numbers, factor = at_once(np, kind, x, "bfloat16", scales)
        finally:
            numba.set_num_threads(before)
        np.testing.assert_array_equal(numbers, np.concatenate([one for one, _ in expected]))
        np.testing.assert_array_equal(factor, np.concatenate([one for _, one in expected]))


def _of_row(scales, r):
    by_row = scales.global_scale is not None and len(scales.global_scale) > 1
    return scales._replace(global_scale=scales.global_scale[r : r + 1]) if by_row else scales
