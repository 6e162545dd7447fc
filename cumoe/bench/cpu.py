"""
The CPU suite: the whole expert computation, from given routing to the sum, against other means.

Every contender is first checked against the layer in float64, then all are timed in turn in one process
(`timing`). Losses stay in the table. Weights are prepared once, as a server would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cumoe import _info
from cumoe.bench import ceilings, peers, results, shapes, timing, weights

SHAPES = ("qwen3-30b-a3b", "mixtral")
TOKENS = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bfloat16", "float32")
DECODE_TOKENS = 16  # up to here the calls are timed back to back too

_MOST_BYTES = 8 << 30  # of weights in all forms at once
_US = 1e6

Contenders = dict[str, Callable[[int], Any]]


@dataclass(frozen=True)
class Case:
    """One cell of the suite, without the contender."""

    shape: shapes.Shape
    dtype: str
    routing: str
    num_tokens: int
    mode: str


class WrongResultError(Exception):
    """cumoe's own result is beyond its error bound."""


def run(
    console: Console,
    shape_names: Sequence[str] = SHAPES,
    num_tokens: Sequence[int] = TOKENS,
    dtypes: Sequence[str] = DTYPES,
    routings: Sequence[str] = ("uniform",),
    budget_s: float = 4.0,
    output: Path | None = None,
    seed: int = 0,
    commit: str = "",
) -> Path:
    """
    Run the suite, print its ratios, and write a CSV into the folder `output`; its path is returned.

    The file is written again after each shape, dtype and routing, so that a run cut short leaves what it has.
    """
    facts = results.header("cpu", commit)
    path = results.default_path(output or Path("benchmarks") / "results", facts)
    rows: list[results.Row] = []
    for shape_name in shape_names:
        for dtype in dtypes:
            shape = shapes.SHAPES[shape_name]
            room = min(_MOST_BYTES, int(0.8 * _info.available_memory()))
            if 2 * shape.weight_bytes(dtype) > room:
                needed = 2 * shape.weight_bytes(dtype) / 1e9
                console.print(f"skipped {shape}, {dtype}: needs {needed:.1f} GB, {room / 1e9:.1f} GB may be used")
                continue
            for routing in routings:
                block = list(_run_block(console, shape, dtype, routing, num_tokens, budget_s, room, seed))
                rows += block
                for table in ratio_tables(block):
                    console.print(table)
                results.write(path, facts, rows)
    if not rows:
        raise MemoryError("no case of the suite fits the memory")
    console.print(f"wrote {path}")
    return path


def _run_block(
    console: Console,
    shape: shapes.Shape,
    dtype: str,
    routing: str,
    token_counts: Sequence[int],
    budget_s: float,
    room: int,
    seed: int,
) -> Iterator[results.Row]:
    """All token counts of one shape, dtype and routing, for one set of weights."""
    import cumoe

    limits = ceilings.measure(dtype, _info.available_memory())
    console.print(
        f"{shape}, {dtype}, {routing} routing; reads {limits.stream_gbs:.1f} GB/s, "
        f"{limits.peak_kernel} micro-kernel {limits.peak_gflops:.0f} GFLOP/s, {limits.threads} threads"
    )
    with console.status("drawing and preparing weights"):
        w1, w2 = weights.draw(shape, dtype, seed)
        prepared = cumoe.prepare(w1, w2)
        layers = _peer_layers(console, w1, w2, dtype, room - 2 * shape.weight_bytes(dtype))
    peers.use_threads(limits.threads)
    layers["cumoe"] = lambda x, topk_weights, topk_ids: cumoe.fused_experts(x, prepared, None, topk_weights, topk_ids)
    for num_tokens in token_counts:
        x = shapes.tokens(shape, num_tokens, dtype, seed)
        routed = [shapes.routing(shape, num_tokens, routing, seed + r) for r in range(timing.ROUTINGS_CYCLED)]
        with console.status(f"T = {num_tokens}: checking"):
            errors = _check(console, layers, x, w1, w2, routed[0])
        contenders = {name: partial(_call, layers[name], x, routed) for name in errors}
        for mode in timing.MODES if num_tokens <= DECODE_TOKENS else timing.MODES[:1]:
            with console.status(f"T = {num_tokens}: timing, {mode}"):
                times = timing.compare(contenders, mode=mode, budget_s=budget_s)
            yield from _rows(Case(shape, dtype, routing, num_tokens, mode), routed, times, errors, limits)


def _call(layer: peers.Layer, x: Any, routed: list[tuple[Any, Any]], number: int) -> Any:
    return layer(x, *routed[number])


def _peer_layers(console: Console, w1: Any, w2: Any, dtype: str, room: int) -> dict[str, peers.Layer]:
    layers: dict[str, peers.Layer] = {}
    for peer in peers.PEERS:
        missing = peer.missing(dtype)
        num_bytes = int(peer.bytes_copied(dtype) * (w1.nbytes + w2.nbytes))
        if num_bytes > room:
            missing = f"its own weights need {num_bytes / 1e9:.1f} GB, {room / 1e9:.1f} GB are left"
        if missing:
            console.print(f"without {peer.name}: {missing}")
            continue
        layers[peer.name] = peer.make(w1, w2)
        room -= num_bytes
    return layers


def _check(
    console: Console, layers: dict[str, peers.Layer], x: Any, w1: Any, w2: Any, routed: tuple[Any, Any]
) -> dict[str, float]:
    """Relative error of every contender that gives the right result."""
    import cumoe

    errors = {}
    for name, layer in layers.items():
        try:
            out = layer(x, *routed)
        except Exception as problem:
            if name == "cumoe":
                raise
            console.print(f"without {name} at T = {len(x)}: {escape(str(problem).partition(chr(10))[0])}")
            continue
        error = peers.sample_error(out, x, w1, w2, *routed)
        if name == "cumoe":
            ratio = cumoe.verify(out, x, w1, w2, *routed, sample=4).max_ratio
            if not ratio <= 1:
                raise WrongResultError(f"cumoe is at {ratio:.3g} of its error bound for {len(x)} tokens")
        elif not error <= peers.TOLERANCE[x.dtype.name]:
            console.print(f"without {name} at T = {len(x)}: relative error {error:.2g}")
            continue
        errors[name] = error
    return errors


def _rows(
    case: Case,
    routed: list[tuple[Any, Any]],
    times: dict[str, timing.Timing],
    errors: dict[str, float],
    limits: ceilings.Ceilings,
) -> Iterator[results.Row]:
    shape, num_tokens = case.shape, case.num_tokens
    hit = float(np.mean([len(np.unique(topk_ids)) for _, topk_ids in routed]))
    num_bytes, flops = shape.moved_bytes(num_tokens, round(hit), case.dtype), shape.flops(num_tokens)
    own_us = times["cumoe"].median_us
    for method, timed in times.items():
        yield {
            "shape": shape.name,
            "E": shape.num_experts,
            "k": shape.top_k,
            "H": shape.hidden_size,
            "I": shape.intermediate_size,
            "dtype": case.dtype,
            "routing": case.routing,
            "T": num_tokens,
            "experts_hit": f"{hit:.1f}",
            "mode": case.mode,
            "method": method,
            "time_us": f"{timed.median_us:.1f}",
            "spread": f"{timed.spread:.3f}",
            "calls": len(timed.samples_us),
            "gflops": f"{flops / timed.median_us * 1e-3:.1f}",
            "gbs": f"{num_bytes / timed.median_us * 1e-3:.2f}",
            "of_floor": f"{limits.floor_s(num_bytes, flops) * _US / timed.median_us:.3f}",
            "bound": limits.bound(num_bytes, flops),
            "ratio_to_cumoe": f"{timed.median_us / own_us:.3f}",
            "relative_error": f"{errors[method]:.2e}",
            "stream_gbs": f"{limits.stream_gbs:.2f}",
            "peak_gflops": f"{limits.peak_gflops:.1f}",
        }


def ratio_tables(rows: Sequence[results.Row]) -> Iterator[Table]:
    """One table a mode: cumoe's time and floor, and every peer's time over cumoe's, by T."""
    for mode in timing.MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        if not chosen:
            continue
        first = chosen[0]
        table = Table(title=f"{first['shape']}, {first['dtype']}, {first['routing']} routing, {mode}")
        peer_names = list(dict.fromkeys(row["method"] for row in chosen if row["method"] != "cumoe"))
        for name in (
            "T",
            "cumoe ms",
            "GFLOP/s",
            "GB/s",
            "of floor",
            "bound by",
            *(f"{name} / cumoe" for name in peer_names),
        ):
            table.add_column(name, justify="right")
        for num_tokens in dict.fromkeys(row["T"] for row in chosen):
            by_method = {row["method"]: row for row in chosen if row["T"] == num_tokens}
            own = by_method["cumoe"]
            table.add_row(
                str(num_tokens),
                f"{float(own['time_us']) / 1e3:.3f}",
                own["gflops"],
                own["gbs"],
                f"{float(own['of_floor']):.2f}",
                own["bound"],
                *(_ratio(by_method.get(name)) for name in peer_names),
            )
        yield table


def _ratio(row: results.Row | None) -> str:
    if row is None:
        return "-"
    ratio = float(row["ratio_to_cumoe"])
    return f"{ratio:.2f}" if ratio >= 1 else f"[red]{ratio:.2f}[/red]"
