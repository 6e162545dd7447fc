"""The main job: one MoE layer of a real size, drawn, run, checked and held against the machine's limits."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
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

_SMALLER = ("qwen3-30b-a3b", "mixtral", "small", "tiny")  # taken in this order when memory is short
_SCRATCH_BYTES = 256 << 20  # interpreter, compiler and libraries
_BUDGET_S = 6.0
_ROUNDS = (8, 60)


@dataclass(frozen=True)
class Batch:
    """Tokens and the scores that a router would give them."""

    hidden_states: Any
    router_logits: list[Any]  # one of (T, E) for each of the routings that the timing cycles through


@dataclass
class Measured:
    """Times of one stage and what it has to do, a list entry for each call."""

    seconds: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    flops: int = 0


def run(console: Console, shape_name: str, num_tokens: int, device: str, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Do everything; the exit status: 0, or 1 if the result is beyond its error bound."""
    import cumoe

    _choose_device(console, device)
    shape = fitting_shape(console, shapes.SHAPES[shape_name], dtype, num_tokens)
    console.print(f"{shape}, {dtype}, {shape.weight_bytes(dtype) / 1e9:.2f} GB of weights, {num_tokens} tokens")
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def step(name: str, total: int = 1) -> Callable[[Iterable[Any]], Iterable[Any]]:
            task = progress.add_task(name, total=total)

            def track(items: Iterable[Any]) -> Iterable[Any]:
                for item in items:
                    yield item
                    progress.advance(task)

            return track

        limits = _only(step("measure the machine"), lambda: ceilings.measure(dtype, _info.available_memory()))
        w1, w2 = weights.draw(shape, dtype, seed, step("draw weights", shape.num_experts))
        prepared = _only(step("pack weights"), lambda: cumoe.prepare(w1, w2))
        batch = _draw_batch(shape, num_tokens, dtype, seed)
        started = time.perf_counter()
        _only(step("compile and warm up"), lambda: _run_once(batch, prepared, shape.top_k, 0))
        first_s = time.perf_counter() - started
        stages, total, rounds = _measure(batch, prepared, shape, step)
        topk_weights, topk_ids = cumoe.fused_topk(batch.router_logits[0], shape.top_k)
        out = cumoe.fused_experts(batch.hidden_states, prepared, None, topk_weights, topk_ids)
        found = _only(
            step("verify"), lambda: cumoe.verify(out, batch.hidden_states, w1, w2, topk_weights, topk_ids, seed=seed)
        )
    console.print(_table(stages, total, limits, rounds))
    console.print(
        f"machine: reads {limits.stream_gbs:.1f} GB/s ({limits.stream_bytes / 1e9:.2f} GB streamed), "
        f"{limits.peak_gflops:.0f} GFLOP/s ({limits.peak_kernel} micro-kernel), {limits.threads} threads"
    )
    console.print(f"first call: {first_s:.2f} s, with the loops compiled or loaded from the cache on disk")
    console.print("floor: max(bytes / read rate, operations / peak); above 1, part of the bytes came from a cache")
    verdict = "[green]within[/green]" if found.max_ratio <= 1 else "[red]BEYOND[/red]"
    console.print(
        f"max(error/bound) = {found.max_ratio:.4f} over {len(found.tokens)} tokens against float64: {verdict} the bound"
    )
    return 0 if found.max_ratio <= 1 else 1


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


def _choose_device(console: Console, device: str) -> None:
    """Say where the layer will run, or raise if that is not possible."""
    gpu = next((name for key, name in _info.gpus().items() if key.startswith("device")), "")
    kernels = importlib.util.find_spec("cumoe.rawkernels.grouped_gemm") is not None
    if device == "gpu" and not gpu:
        raise NotImplementedError("device must be 'cpu' or 'auto' here, got 'gpu'; CuPy sees no CUDA device")
    if device == "gpu" and not kernels:
        raise NotImplementedError(f"no GPU kernels in cumoe {_info.versions()['cumoe']} yet; available: cpu")
    if device == "auto" and gpu and not kernels:
        console.print(f"{gpu} is there, but this version has no GPU kernels yet: running on the CPU")


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


def _only(track: Callable[[Iterable[Any]], Iterable[Any]], work: Callable[[], Any]) -> Any:
    """Run one piece of work under a progress bar of one step."""
    results = [work() for _ in track(range(1))]
    return results[0]
