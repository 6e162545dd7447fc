"""
What happens to a tile of float32 sums: bias, router weight, rounding, activation, store.

The order is the reference's: ``h = (sum + bias) * scale``, rounded to the dtype of the activations,
then the activation, rounded again. The tile is in the L1 cache, and each loop runs over consecutive
elements, so that it becomes vector code.
"""

import functools

import numpy as np

from cumoe.cpu import act
from cumoe.cpu._jit import jit
from cumoe.cpu.bits import CODECS


@functools.cache
def epilogue(activation, dtype):
    """The compiled epilogue; `activation` is a name of `act.SCALAR`, or "" for a plain store."""
    load, store = CODECS[dtype]
    if not activation:
        return jit(store_row=jit(store=store)(_store_row))(_plain)
    activate_row = jit(load=load, store=store, activate=act.SCALAR[activation])(_activate_row)
    return jit(activate_row=activate_row)(_ungated if activation.endswith("_no_mul") else _gated)


@jit()
def _add_bias_and_scale(problem, sums, expert, first, row0, rows, column0, width):
    """``sums[r, j] = (sums[r, j] + bias of output column0 + j) * output_scale[pair of row]``, where given."""
    p = problem
    distance = p.distance
    for r in range(rows):
        if p.bias.size:
            bias = p.bias[expert, first + column0 * distance :]
            for j in range(width):
                sums[r, j] += bias[j * distance]
        if p.output_scale.size:
            scale = p.output_scale[np.int64(p.permuted_idx[row0 + r]) if p.permuted_idx.size else row0 + r]
            for j in range(width):
                sums[r, j] *= scale


# ---- templates; jit(...) gives the names below their values ----

load = store = activate = store_row = activate_row = None


def _plain(problem, sums, expert, row0, rows, column0, width):
    p = problem
    _add_bias_and_scale(p, sums, expert, p.first_gate, row0, rows, column0, width)
    for r in range(rows):
        store_row(sums[r, :width], p.out[row0 + r, column0 : column0 + width])


def _ungated(problem, sums, expert, row0, rows, column0, width):
    p = problem
    _add_bias_and_scale(p, sums, expert, p.first_gate, row0, rows, column0, width)
    for r in range(rows):
        h = sums[r, :width]
        activate_row(h, h, p.alpha, p.beta, p.limit, p.out[row0 + r, column0 : column0 + width])


def _gated(problem, sums, expert, row0, rows, column0, width):
    p = problem
    half = sums.shape[1] // 2
    _add_bias_and_scale(p, sums, expert, p.first_gate, row0, rows, column0, width)
    _add_bias_and_scale(p, sums[:, half:], expert, p.first_up, row0, rows, column0, width)
    for r in range(rows):
        gate, up = sums[r, :width], sums[r, half : half + width]
        activate_row(gate, up, p.alpha, p.beta, p.limit, p.out[row0 + r, column0 : column0 + width])


# The loops over a row are functions of their own: inside the loops over rows LLVM does not turn them into
# vector code.
def _store_row(sums, out):
    for j in range(out.size):
        out[j] = store(sums[j])


def _activate_row(gate, up, alpha, beta, limit, out):
    for j in range(out.size):
        out[j] = store(activate(load(store(gate[j])), load(store(up[j])), alpha, beta, limit))
