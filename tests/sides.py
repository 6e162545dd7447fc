"""Arrays to the side under test and back."""

import numpy as np


def on(xp, array):
    """Copy a NumPy array to `xp`; None stays None."""
    return None if array is None else xp.asarray(array)


def back(array):
    """Copy an array of any side to NumPy."""
    return array.get() if hasattr(array, "get") else array


def assert_equal(results, expected):
    """Compare array by array: dtype, shape, every element."""
    assert len(results) == len(expected)
    for result, wanted in zip(map(back, results), expected, strict=True):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(result, wanted)
