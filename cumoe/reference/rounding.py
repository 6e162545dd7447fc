"""
How much a number may change when it is stored, and how much a sum when it is added up in float32.

Every tolerance of the tests comes from this table; none is chosen by hand.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Bounded(NamedTuple):
    """A value and the largest error that a computation of it may have, elementwise, float64."""

    value: np.ndarray
    error: np.ndarray


# Unit of a float32 sum. Half an ulp (2**-24) would do for IEEE additions; tensor cores and matrix units
# truncate aligned addends instead, which costs up to one ulp an addition.
SUM_UNIT = 2.0**-23

# Largest relative error of rounding an operand to tf32: 10 bits of mantissa, to nearest.
TF32_UNIT = 2.0**-11

# Matrix units read and write float32 and bfloat16 subnormals as zero.
FLUSH = 2.0**-126


def unit(dtype: np.dtype) -> float:
    """Largest relative error of rounding to `dtype`, in its normal range."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def smallest_error(dtype: np.dtype) -> float:
    """Largest absolute error of rounding to `dtype` below its normal range, flushing allowed where hardware does."""
    if np.dtype(dtype) == np.float16:
        return float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    return FLUSH


def largest(dtype: np.dtype) -> float:
    """Largest finite number of `dtype`."""
    return float(ml_dtypes.finfo(dtype).max)


def gamma(terms: int) -> float:
    """
    Relative error of a float32 sum of `terms` products, in any order.

    ``|computed - exact| <= gamma(n) * sum |a_i * b_i|``; Higham, Accuracy and Stability, section 3.1.
    """
    return terms * SUM_UNIT / (1 - terms * SUM_UNIT)


def rounded(value: np.ndarray, error: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The error of `value`, known up to `error`, after it is rounded to `dtype`; inf where it may overflow."""
    magnitude = np.abs(value) + error
    total = error + unit(dtype) * magnitude + smallest_error(dtype)
    return np.where(magnitude * (1 + unit(dtype)) > largest(dtype), np.inf, total)
