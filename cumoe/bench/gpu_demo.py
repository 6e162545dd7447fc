"""
The demo's layer on the GPU: the same weights, tokens and routing, stage by stage, checked against float64.

Each stage is a CUDA graph of its own, and the whole layer, from logits to results, is one more (`gpu_timing`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cumoe._demo import Layer, check, verdict
from cumoe.bench import gpu_ceilings, gpu_check, gpu_stages
from cumoe.bench.gpu_timing import Stopwatch
from cumoe.bench.timing import Timing

_SUSTAINED_S = 0.2
_SPARE_BYTES = 1 << 30  # rows between the steps, libraries


@dataclass(frozen=True)
class _Measured:
    """What came out: the times by stage, the bytes and operations of each, and the result on the host."""

    times: dict[str, Timing]
    work: dict[str, tuple[int, int]]
    out: Any
    topk_weights: Any
    topk_ids: Any


def missing_bytes(layer: Layer) -> int:
    """How many bytes the device is short of; 0 or less if the layer fits."""
    import cupy as cp

    return 2 * layer.shape.weight_bytes(layer.dtype) + _SPARE_BYTES - int(cp.cuda.Device().mem_info[0])


def run(console: Console, layer: Layer) -> bool:
    """Print the table of the layer on the current device; whether the result is within its bound."""
    import cupy as cp

    import cumoe

    name = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)["name"].decode()
    with Stopwatch() as stopwatch:
        with console.status(f"{name}: measuring the machine"):
            limits = gpu_ceilings.measure(stopwatch, layer.dtype, _SUSTAINED_S)
            cp.get_default_memory_pool().free_all_blocks()
        with console.status(f"{name}: running the layer"):
            w1, w2 = to_device(layer.w1), to_device(layer.w2)
            prepared = cumoe.prepare(w1, w2)
            del w1, w2
            first_s = _first_call(stopwatch, layer, prepared)
            measured = _measure(stopwatch, layer, prepared)
    console.print(_table(name, measured, limits.best))
    for fact, value in limits.facts().items():
        console.print(f"{fact}: {value}", highlight=False)
    console.print(f"kernel {prepared.kernel}; first call: {first_s:.2f} s, compiled or loaded from the cache on disk")
    with console.status("verifying"):
        found = check(layer, measured.out, measured.topk_weights, measured.topk_ids)
    return verdict(console, found)


def to_device(array: Any) -> Any:
    """Copy to the device, through the bits: CuPy need not know bfloat16."""
    import cupy as cp

    if array.dtype.itemsize == 2:
        return cp.asarray(array.view("uint16")).view(array.dtype)
    return cp.asarray(array)


def _first_call(stopwatch: Stopwatch, layer: Layer, prepared: Any) -> float:
    import cumoe

    x, logits = to_device(layer.batch.hidden_states), to_device(layer.batch.router_logits[0])
    stopwatch.wait()
    started = time.perf_counter()
    cumoe.fused_moe(x, prepared, None, logits, top_k=layer.shape.top_k)
    stopwatch.wait()
    return time.perf_counter() - started


def _measure(stopwatch: Stopwatch, layer: Layer, prepared: Any) -> _Measured:
    """Time the stages, then the whole."""
    import cupy as cp

    import cumoe

    shape, k = layer.shape, layer.shape.top_k
    x, logits = to_device(layer.batch.hidden_states), to_device(layer.batch.router_logits[0])
    topk_weights, topk_ids = cumoe.fused_topk(logits, k)
    steps = {"route": lambda: cumoe.fused_topk(logits, k), **gpu_stages.calls(x, prepared, topk_weights, topk_ids)}
    times = {name: stopwatch.burst(stopwatch.capture(step)) for name, step in steps.items()}

    out = cp.empty(x.shape, x.dtype)
    sizes = (len(x), shape.hidden_size, shape.intermediate_size, shape.num_experts, k)
    workspace = cp.empty(cumoe.plan(*sizes, dtype=layer.dtype, device="cuda").workspace_bytes, cp.uint8)
    named = {"top_k": k, "out": out, "workspace": workspace}
    replay = stopwatch.capture(lambda: cumoe.fused_moe(x, prepared, None, logits, **named))
    out.view(cp.uint8).fill(0xFF)  # NaN: the replays must write all of it
    times["total"] = stopwatch.burst(replay)

    ids = gpu_check.on_host(topk_ids)
    work = gpu_stages.work(shape, ids, x.dtype.itemsize, logits.dtype.itemsize)
    work["total"] = shape.moved_bytes(len(x), len(np.unique(ids)), layer.dtype), shape.flops(len(x))
    return _Measured(times, work, gpu_check.on_host(out), gpu_check.on_host(topk_weights), ids)


def _table(name: str, measured: _Measured, limits: gpu_ceilings.Limits) -> Table:
    table = Table(title=f"{name}: each stage and the whole as one CUDA graph over a cold L2")
    table.add_column("stage")
    for title in ("time us", "TFLOP/s", "TB/s", "of floor", "bound by"):
        table.add_column(title, justify="right")
    for row in _rows(measured, limits):
        table.add_row(*row, style="bold" if row[0] == "total" else "")
    return table


def _rows(measured: _Measured, limits: gpu_ceilings.Limits) -> Iterator[tuple[str, ...]]:
    for name, timed in measured.times.items():
        num_bytes, flops = measured.work[name]
        time_us = timed.median_us
        yield (
            name,
            f"{time_us:.1f}",
            f"{flops / time_us * 1e-6:.1f}" if flops else "-",
            f"{num_bytes / time_us * 1e-6:.3f}",
            f"{limits.floor_us(num_bytes, flops) / time_us:.2f}",
            limits.bound(num_bytes, flops),
        )
