"""Rows of a CPU result file, and the tables that the suite prints from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from cumoe.bench import ceilings, results, schemes, shapes, timing
from cumoe.bench.cpu_contenders import OWN

_US = 1e6


@dataclass(frozen=True)
class Case:
    """One cell of the suite, without the contender."""

    shape: shapes.Shape
    scheme: schemes.Scheme
    routing: str
    num_tokens: int
    mode: str


def rows(
    case: Case,
    topk_ids: Sequence[np.ndarray],
    times: Mapping[str, timing.Timing],
    errors: Mapping[str, float],
    limits: ceilings.Ceilings,
) -> Iterator[results.Row]:
    """One line of the result file for each contender; `topk_ids` are those of the routings that were cycled."""
    shape, scheme, num_tokens = case.shape, case.scheme, case.num_tokens
    hit = float(np.mean([len(np.unique(ids)) for ids in topk_ids]))
    num_bytes, flops = scheme.moved_bytes(shape, num_tokens, round(hit)), shape.flops(num_tokens)
    own_us = times[OWN].median_us
    for method, timed in times.items():
        yield {
            "shape": shape.name,
            "E": shape.num_experts,
            "k": shape.top_k,
            "H": shape.hidden_size,
            "I": shape.intermediate_size,
            "dtype": scheme.name,
            "routing": case.routing,
            "T": num_tokens,
            "experts_hit": f"{hit:.1f}",
            "mode": case.mode,
            "method": method,
            "time_us": f"{timed.median_us:.1f}",
            "best_us": f"{timed.best_us:.1f}",
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
            "peak_kernel": limits.peak_kernel,
        }


def ratio_tables(rows: Sequence[results.Row]) -> Iterator[Table]:
    """One table a mode: cumoe's time and floor, and every peer's time over cumoe's, by T."""
    for mode in timing.MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        if not chosen:
            continue
        first = chosen[0]
        title = f"{first['shape']}, {first['dtype']}, {first['routing']} routing, {mode}"
        table = Table(title=title, caption="under a peer's name: its time / cumoe's")
        peer_names = list(dict.fromkeys(row["method"] for row in chosen if row["method"] != OWN))
        for name in (
            "T",
            "cumoe ms",
            "GFLOP/s",
            "GB/s",
            "of floor",
            "bound by",
            "best peer / cumoe",
            *peer_names,
        ):
            table.add_column(name, justify="right")
        for num_tokens in dict.fromkeys(row["T"] for row in chosen):
            by_method = {row["method"]: row for row in chosen if row["T"] == num_tokens}
            own = by_method.pop(OWN)
            best = min(by_method.values(), key=lambda row: float(row["time_us"]), default=None)
            table.add_row(
                str(num_tokens),
                f"{float(own['time_us']) / 1e3:.3f}",
                own["gflops"],
                own["gbs"],
                f"{float(own['of_floor']):.2f}",
                own["bound"],
                _ratio(best),
                *(_ratio(by_method.get(name)) for name in peer_names),
            )
        yield table


def _ratio(row: results.Row | None) -> str:
    if row is None:
        return "-"
    ratio = float(row["ratio_to_cumoe"])
    return f"{ratio:.2f}" if ratio >= 1 else f"[red]{ratio:.2f}[/red]"
