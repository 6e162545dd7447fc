"""Arrays to the side under test and back."""

import numpy as np
import pytest


def gpu():
    """CuPy, or the test is skipped."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy


def device_of(xp):
    """What `device=` is for arrays of `xp`."""
    return "cpu" if xp is np else "cuda"


def on(xp, array):
    """Copy a NumPy array to `xp`; None stays None."""
    if array is None or xp is np or not _is_label(array.dtype):
        return array if array is None else xp.asarray(array)
    return xp.asarray(bits(array)).view(array.dtype)  # CuPy cannot convert what it holds as a label only


def bits(array):
    """The same memory, small floats as unsigned integers of their size: what CuPy can index and copy."""
    return array.view(f"u{array.dtype.itemsize}") if _is_label(array.dtype) else array


def _is_label(dtype):
    return dtype.kind == "V" or (dtype.kind == "f" and dtype.itemsize == 1)


def back(array):
    """Copy an array of any side to NumPy."""
    return array.get() if hasattr(array, "get") else array


def assert_equal(results, expected):
    """Compare array by array: dtype, shape, every element."""
    assert len(results) == len(expected)
    for result, wanted in zip(map(back, results), expected, strict=True):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(result, wanted)
