"""Checkpoint tensors of integers, packed slowly from the definition of each format, and what they stand for."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
from hypothesis import strategies as st

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column in each place of a word, the lowest first


class Weight(NamedTuple):
    """An integer weight, unpacked: codes (..., K, N), scales and codes of zero (..., K / g, N)."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group: int


@st.composite
def weights(draw, bits=(4, 8), columns=(8, 24), groups=(32, 64, 128)):
    """An unpacked weight of any codes, one matrix or a stack of them."""
    lead = draw(st.sampled_from([(), (2,), (2, 1), (0,)]))
    width, group, n = draw(st.sampled_from(bits)), draw(st.sampled_from(groups)), draw(st.sampled_from(columns))
    k = group * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    dtype = np.dtype(draw(st.sampled_from(["float32", "float16", "bfloat16"])))
    return Weight(
        rng.integers(0, 2**width, (*lead, k, n)),
        rng.uniform(0.01, 1, (*lead, k // group, n)).astype(dtype),
        rng.integers(0, 2**width, (*lead, k // group, n)),
        width,
        group,
    )


def numbers(weight, zeros=None):
    """What the codes stand for, float32 (..., N, K)."""
    out = np.empty(weight.codes.shape, np.float32)
    for place in np.ndindex(*weight.codes.shape):
        *lead, k, n = place
        at = (*lead, k // weight.group, n)
        zero = 2 ** (weight.bits - 1) if zeros is None else int(zeros[at])
        out[place] = np.float32(int(weight.codes[place]) - zero) * np.float32(weight.scales[at])
    return out.swapaxes(-1, -2)


def word(codes, bits):
    """One int32 of codes, the first in the low bits."""
    pattern = sum(int(code) << bits * place for place, code in enumerate(codes))
    return pattern - 2**32 if pattern >= 2**31 else pattern


def pack_rows(codes, bits):
    """Words along the axis before the last; the last one is filled up by zeros."""
    per_word = 32 // bits
    *lead, rows, columns = codes.shape
    out = np.zeros((*lead, -(-rows // per_word), columns), np.int32)
    for place in np.ndindex(*out.shape):
        *at, row, column = place
        out[place] = word(codes[(*at, slice(row * per_word, (row + 1) * per_word), column)], bits)
    return out


def pack_columns(codes, bits, order=None):
    """Words along the last axis."""
    per_word = 32 // bits
    order = range(per_word) if order is None else order
    *lead, columns = codes.shape
    out = np.zeros((*lead, columns // per_word), np.int32)
    for place in np.ndindex(*out.shape):
        *at, column = place
        out[place] = word([codes[(*at, column * per_word + one)] for one in order], bits)
    return out


def gptq(weight, minus_one=True):
    """Tensors of a GPTQ checkpoint: qweight, scales, qzeros."""
    zeros = (weight.zeros - minus_one) % 2**weight.bits
    return pack_rows(weight.codes, weight.bits), weight.scales, pack_columns(zeros, weight.bits)


def awq(weight):
    """Tensors of an AWQ checkpoint: qweight, scales, qzeros."""
    return pack_columns(weight.codes, 4, AWQ_ORDER), weight.scales, pack_columns(weight.zeros, 4, AWQ_ORDER)


def compressed_tensors(weight):
    """Tensors of a pack-quantized checkpoint: weight_packed, weight_scale, weight_zero_point."""
    codes, scales, zeros = (array.swapaxes(-1, -2) for array in weight[:3])
    return pack_columns(codes, weight.bits), np.ascontiguousarray(scales), pack_rows(zeros, weight.bits)
