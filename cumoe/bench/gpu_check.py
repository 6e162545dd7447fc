"""
Is a result of the GPU right? A few tokens are computed again in float64, with the bound that `cumoe.verify` uses.

The large products are done where the weights are; everything else, on a few rows, is the code of
`cumoe.reference` on the host. So a case of some gigabytes is checked in a tenth of a second.
"""

from typing import Any, NamedTuple

import numpy as np

from cumoe.reference.experts import activated, ratio, scaled, unknown_is_infinite
from cumoe.reference.rounding import FLUSH, Bounded, gamma, rounded

SAMPLE = 8


class Judgement(NamedTuple):
    """Largest error in units of the bound, and largest relative error (Euclidean norm) of a token."""

    max_ratio: float
    relative_error: float


def sample(num_tokens: int, count: int = SAMPLE) -> np.ndarray[Any, Any]:
    """Numbers of the tokens to look at, first and last among them."""
    return np.unique(np.linspace(0, num_tokens - 1, min(count, num_tokens)).astype(int))


def expected(xp: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> Bounded:
    """
    The layer with SiLU for some tokens, in float64, and its error bound.

    `w1` and `w2` are arrays of `xp`, the others of NumPy, a row for each token.
    """
    dtype = hidden_states.dtype
    x = hidden_states.astype(np.float64)
    weights = topk_weights.astype(np.float64)
    out, size, error = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape)
    for e in np.unique(topk_ids):
        rows, choices = np.nonzero(topk_ids == e)
        h = _linear(xp, Bounded(x[rows], np.zeros((len(rows), x.shape[1]))), w1[int(e)])
        h = Bounded(h.value, rounded(h.value, h.error, dtype))
        a = activated(h, "silu", None, None, None)
        a = Bounded(a.value, rounded(a.value, a.error, dtype))
        y = scaled(_linear(xp, a, w2[int(e)]), weights[rows, choices][:, None])
        np.add.at(out, rows, y.value)
        np.add.at(size, rows, np.abs(y.value))
        np.add.at(error, rows, rounded(y.value, y.error, dtype))
    error += gamma(topk_ids.shape[1]) * (size + error)
    return Bounded(out, unknown_is_infinite(rounded(out, error, dtype)))


def judge(computed: Any, exact: Bounded) -> Judgement:
    """Compare rows of a result (NumPy) with what is expected of them."""
    values = computed.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.linalg.norm(values - exact.value, axis=1) / np.linalg.norm(exact.value, axis=1)
    worst = float(np.max(distance))
    return Judgement(float(np.max(ratio(computed, exact))), worst if np.isfinite(worst) else float("inf"))


def widened(xp: Any, array: Any) -> Any:
    """An array of any of the three dtypes as float32, through the bits: CuPy need not know bfloat16."""
    if array.dtype.name == "bfloat16":
        return (array.view(xp.uint16).astype(xp.uint32) << xp.uint32(16)).view(xp.float32)
    return array.astype(xp.float32)


def distance(xp: Any, one: Any, other: Any) -> float:
    """``|one - other| / |other|`` over all elements; inf if anything is not finite."""
    a, b = widened(xp, one), widened(xp, other)
    difference = float(xp.sqrt(xp.sum((a - b) ** 2, dtype=xp.float64)))
    size = float(xp.sqrt(xp.sum(b**2, dtype=xp.float64)))
    found = difference / size if size else difference
    return found if np.isfinite(found) else float("inf")


def _linear(xp: Any, x: Bounded, weights: Any) -> Bounded:
    """``x @ weights.T`` as `cumoe.reference.experts.linear` has it, the products where the weights are."""
    w = widened(xp, weights).astype(xp.float64)
    value, error = xp.asarray(x.value), xp.asarray(x.error)
    magnitude = xp.abs(value) + error
    product = _product(xp, value, w)
    w = xp.abs(w)
    terms = w.shape[1] + 2
    flushed = FLUSH * (magnitude.sum(axis=1)[:, None] + w.sum(axis=1) + 2 * terms)
    bound = _product(xp, error, w) + gamma(terms) * _product(xp, magnitude, w) + flushed
    return Bounded(on_host(product), unknown_is_infinite(on_host(bound)))


def _product(xp: Any, x: Any, w: Any) -> Any:
    """``x @ w.T``; without cuBLAS one row after the other."""
    try:
        return x @ w.T
    except ImportError:
        return xp.stack([(w * row).sum(axis=1) for row in x])


def rows_on_host(array: Any, rows: Any) -> Any:
    """A few rows of an array, in NumPy."""
    return np.stack([on_host(array[int(row)]) for row in rows])


def on_host(array: Any) -> Any:
    """The array itself, or its copy in NumPy; through the bits, as `widened`."""
    if isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return array.view("uint16").get().view(array.dtype)
    return array.get()
