"""Inputs of public test grids, drawn fast, and the two ways in which a cell of a grid is judged."""

import functools

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
from sides import back, on

import cumoe
from cumoe.reference import experts
from cumoe.reference.experts import Bounded
from cumoe.reference.rounding import gamma, rounded, unit


@functools.cache
def normal_numbers():
    """More of them than one matrix has."""
    return np.random.default_rng(0).standard_normal(3 << 23, np.float32)


@functools.lru_cache(maxsize=2)
def pool(dtype, scale):
    """Normal numbers times `scale`, rounded once to `dtype`."""
    return (normal_numbers() * np.float32(scale)).astype(dtype)


def draw(shape, scale, seed, dtype="bfloat16"):
    """``randn(shape) * scale``; the first axis of three picks windows of the pool."""
    if np.prod(shape) < 1 << 22:
        return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)
    numbers = pool(dtype, scale)
    count, length = (shape[0], int(np.prod(shape[1:]))) if len(shape) == 3 else (1, int(np.prod(shape)))
    if length > len(numbers):
        return np.resize(numbers[seed:], shape)
    out = np.empty((count, length), numbers.dtype)
    starts = np.random.default_rng(seed).integers(0, len(numbers) - length, count, endpoint=True)
    for row, start in zip(out, starts, strict=True):
        row[:] = numbers[start : start + length]
    return out.reshape(shape)


def draw_logits(shape, seed):
    """Router logits, randn in bfloat16."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype("bfloat16")


class ComputedOn:
    """The functions of cumoe for NumPy arrays, computed on the side of `xp`."""

    def __init__(self, xp):
        self.xp = xp

    def __getattr__(self, name):
        def call(*arrays, **keywords):
            arrays = [self.put(one) for one in arrays]
            found = getattr(cumoe, name)(*arrays, **{key: self.put(one) for key, one in keywords.items()})
            return tuple(map(back, found)) if isinstance(found, tuple) else back(found)

        return call

    def put(self, array):
        """Move an array to the side; rows that lie apart in memory stay as far apart, with NaN between them."""
        if self.xp is np or not isinstance(array, np.ndarray):
            return array
        if array.flags.c_contiguous or array.strides[-1] != array.itemsize:
            return on(self.xp, array)
        wide = np.full((*array.shape[:-1], array.strides[-2] // array.itemsize), np.nan).astype(array.dtype)
        wide[..., : array.shape[-1]] = array
        return on(self.xp, wide)[..., : array.shape[-1]]


def assert_close(out, bounded, atol, rtol=0.0, cell=""):
    """Within the stated tolerance of the float64 value and within the derived bound, everywhere."""
    assert_stated(out, bounded.value, atol, rtol, cell)
    assert_within(out, bounded, cell)


def assert_stated(out, value, atol, rtol=0.0, cell=""):
    """Within the tolerance that the public test states."""
    assert out.shape == value.shape
    excess = np.abs(out.astype(np.float64) - value) - (atol + rtol * np.abs(value))
    assert excess.max(initial=-1) <= 0, f"{cell}: {excess.max()} beyond the tolerance"


def assert_within(out, bounded, cell=""):
    """
    Within the derived bound; and, since the bound is for the worst case, small on average.

    The root mean square of the error is held to four roundings to the dtype and to what float32 additions, 64**2
    of them, add up to if they err at random.
    """
    assert out.shape == bounded.value.shape
    ratio = experts.ratio(out, bounded)
    assert ratio.max(initial=0) <= 1, f"{cell}: {ratio.max()} of the bound at {np.argwhere(ratio > 1)[0]}"
    if out.size >= 64:
        error, size = (np.sqrt(np.mean(one**2)) for one in (out.astype(np.float64) - bounded.value, bounded.value))
        assert error <= (4 * unit(out.dtype) + 64 * 2.0**-24) * size, f"{cell}: root mean square {error / size}"


def law_of_variants(x, w1, w2, biases, weights, ids, activations):
    """
    `experts.fused_experts` for each activation, without and with biases, reading each expert once.

    Returns {(activation, with_bias): (law, stepwise)}; `stepwise` is float64 too, but h, act(h), y and the sum are
    rounded to the dtype of `x` as the layer's notes say.
    """
    variants = [(activation, with_bias) for activation in activations for with_bias in (False, True)]
    value, size, error, stepwise = (np.zeros((len(variants), *x.shape)) for _ in range(4))
    for e in np.unique(ids):
        tokens, choices = np.nonzero(ids == e)
        weight = weights[tokens, choices].astype(np.float64)[:, None]
        b1, b2 = (bias[e].astype(np.float64) for bias in biases)
        h = experts.linear(exactly(x[tokens].astype(np.float64)), w1[e])
        rows = []
        for activation, with_bias in variants:
            before = plus(h, b1, x.shape[1]) if with_bias else h
            before = Bounded(before.value, rounded(before.value, before.error, x.dtype))
            a = experts.activated(before, activation, None, None, None)
            rows.append(Bounded(a.value, rounded(a.value, a.error, x.dtype)))
            a = experts.activated(exactly(stored(before.value, x.dtype)), activation, None, None, None)
            rows.append(exactly(stored(a.value, x.dtype)))
        y = experts.linear(Bounded(*(np.concatenate(part) for part in zip(*rows, strict=True))), w2[e])
        parts = [slice(first, first + len(tokens)) for first in range(0, len(y.value), len(tokens))]
        for v, (_, with_bias) in enumerate(variants):
            results = []
            for part in parts[2 * v : 2 * v + 2]:
                after = Bounded(y.value[part], y.error[part])
                after = plus(after, b2, w2.shape[2]) if with_bias else after
                results.append(experts.scaled(after, weight))
            value[v][tokens] += results[0].value
            size[v][tokens] += np.abs(results[0].value)
            error[v][tokens] += rounded(results[0].value, results[0].error, x.dtype)
            stepwise[v][tokens] += stored(results[1].value, x.dtype)
    error += gamma(ids.shape[1]) * (size + error)
    return {
        variant: (Bounded(value[v], rounded(value[v], error[v], x.dtype)), stored(stepwise[v], x.dtype))
        for v, variant in enumerate(variants)
    }


def exactly(value):
    """A value without error."""
    return Bounded(value, np.zeros_like(value))


def stored(value, dtype):
    """What is left of float64 numbers after rounding to `dtype`."""
    return value.astype(np.float32).astype(dtype).astype(np.float64)


def plus(y, bias, terms):
    """A bias that joins a sum of `terms` products."""
    return Bounded(y.value + bias, y.error + gamma(terms + 2) * np.abs(bias))
