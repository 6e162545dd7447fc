"""
The CPU suite: the whole expert computation, from given routing to the sum, against other means.

Every contender is first checked against the layer in float64 (`cpu_check`), then all are timed in turn in one process
(`timing`). Losses stay in the table. Weights are prepared once, as a server would.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cumoe import _info
from cumoe.bench import ceilings, cpu_check, cpu_contenders, cpu_tables, peers, results, schemes, shapes, timing
from cumoe.bench.cpu_check import WrongResultError

__all__ = ["DTYPES", "ROUTINGS", "SHAPES", "TOKENS", "WrongResultError", "run"]

SHAPES = ("qwen3-30b-a3b", "mixtral", "small")
TOKENS = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bfloat16", "float32")
ROUTINGS = ("uniform", "skewed")
DECODE_TOKENS = 16  # up to here the calls are timed back to back too

_MOST_BYTES = 16 << 30  # of weights in all forms at once
_LOOK_S = 0.15  # at the ceilings, before and after each case


def run(
    console: Console,
    shape_names: Sequence[str] = SHAPES,
    num_tokens: Sequence[int] = TOKENS,
    dtypes: Sequence[str] = DTYPES,
    routings: Sequence[str] = ROUTINGS,
    budget_s: float = 4.0,
    output: Path | None = None,
    seed: int = 0,
    commit: str = "",
) -> Path:
    """
    Run the suite, print its ratios, and write a CSV into the folder `output`; its path is returned.

    `dtypes` are names of `cumoe.bench.schemes.SCHEMES`. The file is written again after each shape, dtype and
    routing, so that a run cut short leaves what it has.
    """
    facts = results.header("cpu", commit) | cpu_contenders.versions()
    path = results.default_path(output or Path("benchmarks") / "results", facts)
    rows: list[results.Row] = []
    for shape_name in shape_names:
        for dtype in dtypes:
            shape, scheme = shapes.SHAPES[shape_name], schemes.SCHEMES[dtype]
            room = min(_MOST_BYTES, int(0.8 * _info.available_memory()))
            # drawn ones stay for the check, beside those prepared
            needed = scheme.drawing_bytes(shape) + 2 * scheme.weight_bytes(shape)
            if needed > room:
                console.print(f"skipped {shape}, {dtype}: needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB may be used")
                continue
            for block in _run_block(console, shape, scheme, routings, num_tokens, budget_s, room, seed):
                rows += block
                for table in cpu_tables.ratio_tables(block):
                    console.print(table)
                results.write(path, facts, rows)
    if not rows:
        raise MemoryError("no case of the suite fits the memory")
    console.print(f"wrote {path}")
    return path


def _run_block(
    console: Console,
    shape: shapes.Shape,
    scheme: schemes.Scheme,
    routings: Sequence[str],
    token_counts: Sequence[int],
    budget_s: float,
    room: int,
    seed: int,
) -> Iterator[list[results.Row]]:
    """The rows of each routing in turn, for one set of weights."""
    with console.status("drawing and preparing weights"):
        held = cpu_contenders.hold(shape, scheme, seed)
        contenders = cpu_contenders.make(console, held, room - 2 * scheme.weight_bytes(shape))
    for routing in routings:
        limits = ceilings.measure(scheme.products, _info.available_memory())
        peers.use_threads(limits.threads)
        console.print(
            f"{shape}, {scheme.name}, {routing} routing; reads {limits.stream_gbs:.1f} GB/s, "
            f"{limits.peak_kernel} micro-kernel {limits.peak_gflops:.0f} GFLOP/s, {limits.threads} threads"
        )
        block: list[results.Row] = []
        for num_tokens in token_counts:
            x = shapes.tokens(shape, num_tokens, scheme.dtype, seed)
            routed = [shapes.routing(shape, num_tokens, routing, seed + r) for r in range(timing.ROUTINGS_CYCLED)]
            with console.status(f"T = {num_tokens}: checking"):
                errors = cpu_check.check(console, contenders, x, held, routed[0])
            calls = {name: partial(_call, contenders[name].layer, x, routed) for name in errors}
            for mode in timing.MODES if num_tokens <= DECODE_TOKENS else timing.MODES[:1]:
                with console.status(f"T = {num_tokens}: timing, {mode}"):
                    # On a shared machine they change: limits are those around the case.
                    before = ceilings.measure(scheme.products, _info.available_memory(), _LOOK_S)
                    times = timing.compare(calls, mode=mode, budget_s=budget_s)
                    after = ceilings.measure(scheme.products, _info.available_memory(), _LOOK_S)
                case = cpu_tables.Case(shape, scheme, routing, num_tokens, mode)
                ids = [topk_ids for _, topk_ids in routed]
                block += cpu_tables.rows(case, ids, times, errors, before.around(after))
        yield block


def _call(layer: peers.Layer, x: Any, routed: list[tuple[Any, Any]], number: int) -> Any:
    return layer(x, *routed[number])
