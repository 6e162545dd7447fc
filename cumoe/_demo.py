"""
The main job: one MoE layer of a real size, drawn, run, checked and held against the machine's limits.

On the CPU here; where CuPy sees a GPU, there too (`bench.gpu_demo`), with the same weights, tokens and logits.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cumoe import _info
from cumoe.bench import ceilings, shapes, timing, weights

SHAPE = "qwen3-30b-a3b"
TOKENS = 256
STAGES = ("route", "permute", "gemm1", "gemm2", "unpermute")

Track = Callable[[Iterable[Any]], Iterable[Any]]
Step = Callable[..., Track]

_SMALLER = ("qwen3-30b-a3b", "mixtral", "small", "tiny")  # taken in this order when memory is short
_SCRATCH_BYTES = 256 << 20  # interpreter, compiler and libraries
_BUDGET_S = 6.0
_ROUNDS = (8, 60)


@dataclass(frozen=True)
class Batch:
    """Tokens and the scores that a router would give them."""

    hidden_states: Any
    router_logits: list[Any]  # one of (T, E) for each of the routings that the timing cycles through


@dataclass(frozen=True)
class Layer:
    """What is run, on the host: the weights as drawn, the tokens, and the seed of it all."""

    shape: shapes.Shape
    dtype: str
    w1: Any
    w2: Any
    batch: Batch
    seed: int


@dataclass
class Measured:
    """Times of one stage and what it has to do, a list entry for each call."""

    seconds: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    flops: int = 0


def run(console: Console, shape_name: str, num_tokens: int, device: str, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Do everything; the exit status: 0, or 1 if the result is beyond its error bound."""
    devices = _devices(device)
    shape = fitting_shape(console, shapes.SHAPES[shape_name], dtype, num_tokens)
    console.print(f"{shape}, {dtype}, {shape.weight_bytes(dtype) / 1e9:.2f} GB of weights, {num_tokens} tokens")
    with _steps(console) as step:
        w1, w2 = weights.draw(shape, dtype, seed, step("draw weights", shape.num_experts))
    layer = Layer(shape, dtype, w1, w2, _draw_batch(shape, num_tokens, dtype, seed), seed)
    good = True
    if "cpu" in devices:
        good = _run_cpu(console, layer)
    if "cuda" in devices:
        good = _run_gpu(console, layer, must_fit=device != "auto") and good
    return 0 if good else 1


@contextlib.contextmanager
def _steps(console: Console) -> Iterator[Step]:
    """Show progress bars; what is given makes one for a named step of so many parts."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def step(name: str, total: int = 1) -> Track:
            task = progress.add_task(name, total=total)

            def track(items: Iterable[Any]) -> Iterable[Any]:
                for item in items:
                    yield item
                    progress.advance(task)

            return track

        yield step


def _run_cpu(console: Console, layer: Layer) -> bool:
    """Print the table of the layer on the CPU; whether the result is within its bound."""
    import cumoe

    shape, batch = layer.shape, layer.batch
    with _steps(console) as step:
        limits = _only(step("measure the machine"), lambda: ceilings.measure(layer.dtype, _info.available_memory()))
        prepared = _only(step("pack weights"), lambda: cumoe.prepare(layer.w1, layer.w2))
        started = time.perf_counter()
        _only(step("compile and warm up"), lambda: _run_once(batch, prepared, shape.top_k, 0))
        first_s = time.perf_counter() - started
        stages, total, rounds = _measure(batch, prepared, shape, step)
        topk_weights, topk_ids = cumoe.fused_topk(batch.router_logits[0], shape.top_k)
        out = cumoe.fused_experts(batch.hidden_states, prepared, None, topk_weights, topk_ids)
        found = _only(step("verify"), lambda: check(layer, out, topk_weights, topk_ids))
    console.print(_table(stages, total, limits, rounds))
    console.print(
        f"machine: reads {limits.stream_gbs:.1f} GB/s ({limits.stream_bytes / 1e9:.2f} GB streamed), "
        f"{limits.peak_gflops:.0f} GFLOP/s ({limits.peak_kernel} micro-kernel), {limits.threads} threads"
    )
    console.print(f"first call: {first_s:.2f} s, with the loops compiled or loaded from the cache on disk")
    console.print("floor: max(bytes / read rate, operations / peak); above 1, part of the bytes came from a cache")
    return verdict(console, found)


def _run_gpu(console: Console, layer: Layer, must_fit: bool) -> bool:
    """Do the same on the GPU, if it has the memory."""
    from cumoe.bench import gpu_demo

    missing = gpu_demo.missing_bytes(layer)
    if missing <= 0:
        return gpu_demo.run(console, layer)
    text = f"{layer.shape.name} needs {missing / 1e9:.2f} GB more than are free on the GPU"
    if must_fit:
        raise MemoryError(text)
    console.print(f"not on the GPU: {text}")
    return True


def check(layer: Layer, out: Any, topk_weights: Any, topk_ids: Any) -> Any:
    """Compare a result with the layer in float64."""
    import cumoe

    hidden_states = layer.batch.hidden_states
    return cumoe.verify(out, hidden_states, layer.w1, layer.w2, topk_weights, topk_ids, seed=layer.seed)


def verdict(console: Console, found: Any) -> bool:
    """Print what `check` found; whether the result is within its bound."""
    text = "[green]within[/green]" if found.ok else "[red]BEYOND[/red]"
    console.print(
        f"max(error/bound) = {found.max_ratio:.4f} over {len(found.tokens)} tokens against float64: {text} the bound"
    )
    return bool(found.ok)


def fitting_shape(console: Console, wanted: shapes.Shape, dtype: str, num_tokens: int) -> shapes.Shape:
    """Return `wanted`, or the largest smaller named shape that the free memory holds, saying so."""
    free = _info.available_memory()
    smaller = [shapes.SHAPES[name] for name in _SMALLER]
    for shape in (wanted, *(one for one in smaller if one.weight_bytes(dtype) < wanted.weight_bytes(dtype))):
        if needed_bytes(shape, dtype, num_tokens) <= free:
            if shape is not wanted:
                console.print(
                    f"{wanted.name} with {num_tokens} tokens needs "
                    f"{needed_bytes(wanted, dtype, num_tokens) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
                    f"taking {shape.name} instead"
                )
            return shape
    raise MemoryError(
        f"even {shape.name} with {num_tokens} tokens needs more than the {free / 1e9:.2f} GB that are free"
    )


def needed_bytes(shape: shapes.Shape, dtype: str, num_tokens: int) -> int:
    """Bytes that the demo holds at once: weights twice (as drawn and packed), rows between the steps."""
    rows = num_tokens * shape.top_k * (shape.hidden_size + shape.intermediate_size) * 4
    logits = timing.ROUTINGS_CYCLED * num_tokens * shape.num_experts * 4
    return 2 * shape.weight_bytes(dtype) + 2 * rows + logits + _SCRATCH_BYTES


def _devices(device: str) -> tuple[str, ...]:
    """Where the layer will run, or raise if that is not possible."""
    gpu = any(key.startswith("device") for key in _info.gpus())
    if device in ("cuda", "gpu") and not gpu:
        raise NotImplementedError(f"device must be 'cpu' or 'auto' here, got {device!r}; CuPy sees no CUDA device")
    if device == "auto":
        return ("cpu", "cuda") if gpu else ("cpu",)
    return ("cpu",) if device == "cpu" else ("cuda",)


def _draw_batch(shape: shapes.Shape, num_tokens: int, dtype: str, seed: int) -> Batch:
    rng = np.random.default_rng([seed, 2])
    logits = [
        rng.standard_normal((num_tokens, shape.num_experts), dtype=np.float32) for _ in range(timing.ROUTINGS_CYCLED)
    ]
    return Batch(shapes.tokens(shape, num_tokens, dtype, seed), logits)


def _run_once(batch: Batch, prepared: Any, top_k: int, number: int) -> Any:
    import cumoe

    topk_weights, topk_ids = cumoe.fused_topk(batch.router_logits[number % len(batch.router_logits)], top_k)
    return cumoe.fused_experts(batch.hidden_states, prepared, None, topk_weights, topk_ids)


def _run_stages(batch: Batch, prepared: Any, shape: shapes.Shape, number: int, stages: dict[str, Measured]) -> Any:
    """One call of the layer step by step, as `cumoe.fused_experts` does it, with a clock between the steps."""
    import cumoe
    from cumoe._call import enter_call

    logits = batch.router_logits[number % len(batch.router_logits)]
    started = time.perf_counter()
    topk_weights, topk_ids = cumoe.fused_topk(logits, shape.top_k)
    ended = time.perf_counter()
    times = {"route": ended - started}
    x = batch.hidden_states
    call = enter_call(x, prepared, None, topk_weights, topk_ids, "silu", None, False, None, None, None, False, None)
    for piece in call.pieces():
        for name, run_step in zip(
            STAGES[1:], (piece.sort, piece.first_product, piece.second_product, piece.add_up), strict=True
        ):
            started = time.perf_counter()
            run_step()
            times[name] = times.get(name, 0.0) + time.perf_counter() - started
    for name, num_bytes in stage_bytes(shape, topk_ids, logits.itemsize, x.dtype.itemsize).items():
        stages[name].seconds.append(times[name])
        stages[name].num_bytes.append(num_bytes)
    return call.result()


def stage_bytes(shape: shapes.Shape, topk_ids: Any, logit_size: int, itemsize: int) -> dict[str, int]:
    """Bytes that each stage must at least read and write, every array counted once."""
    (T, k), E, H, I = topk_ids.shape, shape.num_experts, shape.hidden_size, shape.intermediate_size
    hit = len(np.unique(topk_ids))
    return {
        "route": T * E * logit_size + T * k * 8,
        "permute": T * k * 12 + (E + 1) * 8,
        "gemm1": (hit * 2 * I * H + T * H + T * k * I) * itemsize,
        "gemm2": (hit * H * I + T * k * I + T * k * H) * itemsize,
        "unpermute": (T * k * H + T * H) * itemsize,
    }


def _measure(batch: Batch, prepared: Any, shape: shapes.Shape, step: Any) -> tuple[dict[str, Measured], Measured, int]:
    """Time the stages and the whole in turn, over changing routings."""
    num_tokens, dtype = len(batch.hidden_states), batch.hidden_states.dtype.name
    products = 2 * num_tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
    stages = {name: Measured() for name in STAGES}
    stages["gemm1"].flops, stages["gemm2"].flops = 2 * products, products
    total = Measured(flops=shape.flops(num_tokens))
    started = time.perf_counter()
    _run_once(batch, prepared, shape.top_k, 1)
    once = time.perf_counter() - started
    least, most = _ROUNDS
    rounds = max(least, min(most, int(_BUDGET_S / (2 * once))))
    for number in step("time", rounds)(range(rounds)):
        _run_stages(batch, prepared, shape, number, stages)
        started = time.perf_counter()
        _run_once(batch, prepared, shape.top_k, number + 1)
        total.seconds.append(time.perf_counter() - started)
    hits = [len(np.unique(_ids(logits, shape.top_k))) for logits in batch.router_logits]
    total.num_bytes = [shape.moved_bytes(num_tokens, hit, dtype) for hit in hits]
    return stages, total, rounds


def _ids(logits: Any, top_k: int) -> Any:
    import cumoe

    return cumoe.fused_topk(logits, top_k)[1]


def _table(stages: dict[str, Measured], total: Measured, limits: ceilings.Ceilings, rounds: int) -> Table:
    table = Table(title=f"medians of {rounds} calls, {timing.ROUTINGS_CYCLED} routings in turn")
    table.add_column("stage")
    for name in ("time ms", "GFLOP/s", "GB/s", "of floor", "bound by"):
        table.add_column(name, justify="right")
    for name, measured in {**stages, "total": total}.items():
        seconds = statistics.median(measured.seconds)
        num_bytes = round(statistics.mean(measured.num_bytes))
        table.add_row(
            name,
            f"{seconds * 1e3:.3f}",
            f"{measured.flops / seconds * 1e-9:.1f}" if measured.flops else "-",
            f"{num_bytes / seconds * 1e-9:.2f}",
            f"{limits.floor_s(num_bytes, measured.flops) / seconds:.2f}",
            limits.bound(num_bytes, measured.flops),
            style="bold" if name == "total" else "",
            end_section=name == STAGES[-1],
        )
    return table


def _only(track: Track, work: Callable[[], Any]) -> Any:
    """Run one piece of work under a progress bar of one step."""
    results = [work() for _ in track(range(1))]
    return results[0]
