"""
Single steps of the layer on the GPU, each alone in a graph: routing, sorting, activation, adding up.

    route        logits (T, E) float32 -> the k best and their weights
    sort         ids (T, k) -> order of the pairs by expert, its inverse, the experts' offsets, the list of tiles
    align        ids (T, k) -> order padded to whole blocks, as `cumoe.moe_align_block_size` gives it
    act          (T k, 2I) -> (T k, I), SiLU of the gate times up
    sum          (T, k, H) -> (T, H)
    unpermute    rows in expert order and the inverse order -> (T, H)

Each is checked against NumPy before it is timed: integers all of them, numbers a few rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.bench import gpu_arrays, shapes
from cumoe.bench.gpu_check import on_host

TOKENS = (1, 64, 1024, 16384)
_ALIGN_BLOCK = 64
_TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Operation:
    """A step: `call` runs it and returns what it wrote; `wrong` looks at that and says what is wrong, or ""."""

    name: str
    call: Callable[[], Any]
    wrong: Callable[[Any], str]
    num_bytes: int  # that it must at least read and write


def operations(shape: shapes.Shape, dtype: str, num_tokens: int, kernel: str, seed: int = 0) -> Iterator[Operation]:
    """The steps of one shape, one after the other, so that the memory of one is free for the next."""
    import cupy as cp

    topk_ids = shapes.routing(shape, num_tokens, "uniform", seed)[1]
    ids = cp.asarray(topk_ids)
    yield _route(shape, num_tokens, seed)
    yield _sort(shape, dtype, kernel, topk_ids, ids)
    yield _align(shape, topk_ids, ids)
    yield _act(shape, dtype, num_tokens, seed)
    yield _sum(shape, dtype, num_tokens, seed)
    yield _unpermute(shape, dtype, topk_ids, seed)


def _route(shape: shapes.Shape, num_tokens: int, seed: int) -> Operation:
    import cumoe

    logits = gpu_arrays.normal((num_tokens, shape.num_experts), "float32", 1.0, seed + 11)

    def wrong(result: Any) -> str:
        weights, ids = map(on_host, result)
        scores = on_host(logits).astype(np.float64)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : shape.top_k]
        if not np.array_equal(ids, order):
            return "ids are not the k best"
        chosen = np.exp(np.take_along_axis(scores, order, axis=1))
        chosen /= chosen.sum(axis=1, keepdims=True)
        return _far(weights, chosen, 1e-5)

    num_bytes = num_tokens * (shape.num_experts * 4 + shape.top_k * 8)
    return Operation("route", lambda: cumoe.fused_topk(logits, shape.top_k), wrong, num_bytes)


def _sort(shape: shapes.Shape, dtype: str, kernel: str, topk_ids: Any, ids: Any) -> Operation:
    import cupy as cp

    from cumoe import _arrays

    permute, grouped_gemm = _arrays.room(cp, "permute"), _arrays.room(cp, "grouped_gemm")
    E, pairs = shape.num_experts, topk_ids.size
    rows = grouped_gemm.block_rows(pairs, E, shape.hidden_size, shape.intermediate_size, dtype, 0, False, kernel)
    everywhere, offsets = cp.empty(0, cp.int32), cp.empty(E + 1, cp.int64)
    order, inverse = cp.empty(pairs, cp.int32), cp.empty(topk_ids.shape, cp.int32)
    schedule = cp.empty(permute.schedule_size(pairs, E, rows), cp.int32)

    def call() -> Any:
        permute.sort_by_expert(ids, everywhere, offsets, order, inverse, schedule, rows)
        return order, inverse, offsets, schedule

    def wrong(result: Any) -> str:
        got_order, got_inverse, got_offsets, got_schedule = map(on_host, result)
        flat = topk_ids.reshape(-1)
        wanted = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=E)
        if not np.array_equal(got_order, wanted):
            return "the order is not that of the experts"
        if not np.array_equal(got_inverse.reshape(-1)[wanted], np.arange(pairs)):
            return "the inverse is not the inverse"
        if not np.array_equal(got_offsets, np.concatenate([[0], np.cumsum(counts)])):
            return "the offsets are not those of the experts"
        if rows and got_schedule[0] != np.sum(-(-counts // rows)):
            return f"{got_schedule[0]} tiles instead of {np.sum(-(-counts // rows))}"
        return ""

    return Operation("sort", call, wrong, pairs * 12 + (E + 1) * 8)


def _align(shape: shapes.Shape, topk_ids: Any, ids: Any) -> Operation:
    import cumoe

    def wrong(result: Any) -> str:
        got_ids, got_experts, got_padded = map(on_host, result)
        flat = topk_ids.reshape(-1)
        blocks = -(-np.bincount(flat, minlength=shape.num_experts) // _ALIGN_BLOCK)
        if got_padded[0] != blocks.sum() * _ALIGN_BLOCK:
            return f"{got_padded[0]} rows instead of {blocks.sum() * _ALIGN_BLOCK}"
        if not np.array_equal(got_experts[: blocks.sum()], np.repeat(np.arange(shape.num_experts), blocks)):
            return "the blocks' experts are wrong"
        pairs = got_ids[: got_padded[0]]
        pairs = pairs[pairs < flat.size]
        return "" if np.array_equal(pairs, np.argsort(flat, kind="stable")) else "the order is not that of the experts"

    return Operation(
        "align", lambda: cumoe.moe_align_block_size(ids, _ALIGN_BLOCK, shape.num_experts), wrong, topk_ids.size * 8
    )


def _act(shape: shapes.Shape, dtype: str, num_tokens: int, seed: int) -> Operation:
    import cupy as cp

    import cumoe

    pairs, I = num_tokens * shape.top_k, shape.intermediate_size
    x = gpu_arrays.normal((pairs, 2 * I), dtype, 1.0, seed + 12)
    out = cp.empty((pairs, I), x.dtype)

    def wrong(result: Any) -> str:
        for row in (0, pairs - 1):
            values = on_host(x[row]).astype(np.float64)
            gate, up = values[:I], values[I:]
            if text := _far(on_host(result[row]), gate / (1 + np.exp(-gate)) * up, _TOLERANCE[dtype]):
                return text
        return ""

    return Operation("act", lambda: cumoe.silu_and_mul(x, out=out), wrong, pairs * 3 * I * x.dtype.itemsize)


def _sum(shape: shapes.Shape, dtype: str, num_tokens: int, seed: int) -> Operation:
    import cupy as cp

    import cumoe

    k, H = shape.top_k, shape.hidden_size
    x = gpu_arrays.normal((num_tokens, k, H), dtype, 1.0, seed + 13)
    out = cp.empty((num_tokens, H), x.dtype)

    def wrong(result: Any) -> str:
        for t in (0, num_tokens - 1):
            wanted = on_host(x[t]).astype(np.float64).sum(axis=0)
            if text := _far(on_host(result[t]), wanted, _TOLERANCE[dtype]):
                return text
        return ""

    return Operation("sum", lambda: cumoe.moe_sum(x, out=out), wrong, num_tokens * (k + 1) * H * x.dtype.itemsize)


def _unpermute(shape: shapes.Shape, dtype: str, topk_ids: Any, seed: int) -> Operation:
    import cupy as cp

    import cumoe

    (num_tokens, k), H = topk_ids.shape, shape.hidden_size
    inverse = np.empty(topk_ids.size, np.int32)
    inverse[np.argsort(topk_ids.reshape(-1), kind="stable")] = np.arange(topk_ids.size)
    places = cp.asarray(inverse.reshape(topk_ids.shape))
    rows = gpu_arrays.normal((num_tokens * k, H), dtype, 1.0, seed + 14)
    out = cp.empty((num_tokens, H), rows.dtype)

    def wrong(result: Any) -> str:
        for t in (0, num_tokens - 1):
            wanted = sum(on_host(rows[int(row)]).astype(np.float64) for row in inverse.reshape(topk_ids.shape)[t])
            if text := _far(on_host(result[t]), wanted, _TOLERANCE[dtype]):
                return text
        return ""

    num_bytes = num_tokens * (k * (H * rows.dtype.itemsize + 4) + H * rows.dtype.itemsize)
    return Operation("unpermute", lambda: cumoe.moe_unpermute(rows, None, places, out=out), wrong, num_bytes)


def _far(got: Any, wanted: Any, tolerance: float) -> str:
    values = np.asarray(got).astype(np.float64)
    error = float(np.linalg.norm(values - wanted)) / float(np.linalg.norm(wanted))
    return "" if error <= tolerance else f"relative error {error:.2g}"
