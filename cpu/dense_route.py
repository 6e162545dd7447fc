"""
Router weights as a dense (T, E) table and as (T, k) choices, each from the other.

Dense to choices: the k entries of greatest magnitude, greatest first, equal ones by the lower expert id; an
entry of 0 is no choice (id -1, weight 0). NaN counts as the greatest, so that it is never lost.
"""

import math

import numpy as np

from cumoe.cpu import best, rows
from cumoe.cpu.bits import CODECS

LOAD = CODECS["float32"][0]  # constant of the templates below; rows.run(...) sets it

_INFINITY, _ZERO = np.float32(np.inf), np.float32(0)


def topk_from_dense(router_weights, dtype, topk_weights, topk_ids):
    """Write ``topk_weights`` and ``topk_ids`` (T, k) from the bits of ``router_weights`` (T, E)."""
    arguments = (router_weights, topk_weights, topk_ids)
    rows.run(_choose_rows, len(topk_ids), router_weights.size, arguments, LOAD=CODECS[dtype][0])


def dense_from_topk(topk_weights, topk_ids, dtype, out):
    """Write ``out`` (T, E) from the bits of ``topk_weights`` and signed ``topk_ids`` (T, k)."""
    rows.run(_spread_rows, len(out), out.size, (topk_weights, topk_ids, out), LOAD=CODECS[dtype][0])


def _choose_rows(first, last, arguments):
    router_weights, topk_weights, topk_ids = arguments
    num_experts, top_k = router_weights.shape[1], topk_ids.shape[1]
    num_packed, num_blocks = best.room_for(num_experts)
    packed, maxima = np.zeros(num_packed, np.uint64), np.zeros(num_blocks, np.uint64)
    size = np.empty(num_experts, np.float32)
    for t in range(first, last):
        for e in range(num_experts):
            weight = np.float32(abs(LOAD(router_weights[t, e])))
            size[e] = _INFINITY if math.isnan(weight) else weight
        best.pack(size, packed)
        best.begin(packed, maxima)
        for j in range(top_k):
            e = best.take(packed, maxima)
            topk_weights[t, j] = LOAD(router_weights[t, e]) if size[e] > _ZERO else _ZERO
            topk_ids[t, j] = e if size[e] > _ZERO else -1


def _spread_rows(first, last, arguments):
    topk_weights, topk_ids, out = arguments
    for t in range(first, last):
        out[t, :] = 0
        for j in range(topk_ids.shape[1]):
            e = topk_ids[t, j]
            if 0 <= e < out.shape[1]:
                out[t, e] += LOAD(topk_weights[t, j])
