"""Rows of a GPU result file, and the tables and lines that the suite prints from them."""

import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table

from cumoe.bench import shapes
from cumoe.bench.gpu_ceilings import Ceilings, Limits
from cumoe.bench.gpu_check import Judgement
from cumoe.bench.gpu_clocks import Watch
from cumoe.bench.gpu_contenders import OWN
from cumoe.bench.results import Row
from cumoe.bench.timing import Timing

COLUMNS = (
    *("kind", "shape", "E", "k", "H", "I", "dtype", "routing", "T", "experts_hit", "method"),
    *("time_us", "best_us", "spread", "replays", "tflops", "tbs"),
    *("floor_us", "bound", "of_floor", "of_floor_same_run", "clean_us", "of_floor_clean"),
    *("sustained_us", "of_floor_sustained", "sm_mhz", "watts"),
    *("ratio_to_cumoe", "peer", "peer_us", "peer_ratio", "error_in_bounds", "relative_error"),
)


def row(
    *,
    kind: str,
    shape: shapes.Shape,
    dtype: str,
    num_tokens: int,
    method: str,
    timed: Timing,
    num_bytes: int,
    flops: int = 0,
    routing: str = "uniform",
    experts_hit: int | None = None,
    recorded: Limits | None = None,
    measured: Ceilings | None = None,
    clean: Timing | None = None,
    sustained: Timing | None = None,
    watch: Watch | None = None,
    own_us: float | None = None,
    peer: tuple[str, float] | None = None,
    errors: Judgement | None = None,
) -> Row:
    """
    One line of the result file; what does not apply stays empty.

    `of_floor` is by the recorded ceilings of the device (the figure to compare between runs), and so is
    `of_floor_clean` if they are known; `of_floor_same_run` by those of this run at their best, `of_floor_sustained`
    by those of this run under load.
    """
    time_us = timed.median_us
    cells: Row = dict.fromkeys(COLUMNS, "")
    cells |= {
        "kind": kind,
        "shape": shape.name,
        "E": shape.num_experts,
        "k": shape.top_k,
        "H": shape.hidden_size,
        "I": shape.intermediate_size,
        "dtype": dtype,
        "routing": routing,
        "T": num_tokens,
        "method": method,
        "time_us": f"{time_us:.2f}",
        "best_us": f"{timed.best_us:.2f}",
        "spread": f"{timed.spread:.3f}",
        "replays": len(timed.samples_us),
        "tbs": f"{num_bytes / time_us * 1e-6:.3f}",
    }
    if experts_hit is not None:
        cells["experts_hit"] = experts_hit
    if flops:
        cells["tflops"] = f"{flops / time_us * 1e-6:.1f}"
    limits = recorded or (measured.best if measured else None)
    if limits:
        cells |= {"floor_us": f"{limits.floor_us(num_bytes, flops):.2f}", "bound": limits.bound(num_bytes, flops)}
    if recorded:
        cells["of_floor"] = f"{recorded.floor_us(num_bytes, flops) / time_us:.3f}"
    if measured:
        cells["of_floor_same_run"] = f"{measured.best.floor_us(num_bytes, flops) / time_us:.3f}"
    if clean:
        cells["clean_us"] = f"{clean.median_us:.2f}"
        if limits:
            cells["of_floor_clean"] = f"{limits.floor_us(num_bytes, flops) / clean.median_us:.3f}"
    if sustained:
        cells["sustained_us"] = f"{sustained.median_us:.2f}"
        if measured:
            floor_us = measured.sustained.floor_us(num_bytes, flops)
            cells["of_floor_sustained"] = f"{floor_us / sustained.median_us:.3f}"
        if watch and watch.sm_mhz is not None and watch.watts is not None:
            cells |= {"sm_mhz": f"{watch.sm_mhz:.0f}", "watts": f"{watch.watts:.0f}"}
    if own_us:
        cells["ratio_to_cumoe"] = f"{time_us / own_us:.3f}"
    if peer:
        cells |= {"peer": peer[0], "peer_us": f"{peer[1]:.1f}", "peer_ratio": f"{peer[1] / time_us:.3f}"}
    if errors:
        cells |= {"error_in_bounds": f"{errors.max_ratio:.3f}", "relative_error": f"{errors.relative_error:.2e}"}
    return cells


def line(cells: Row) -> str:
    """One case and contender on a line, printed as soon as it is known."""
    text = (
        f"{cells['shape']:<14} T {cells['T']:<6}{cells['method']:<24} {float(cells['time_us']) / 1e3:8.4f} ms"
        f"  best {float(cells['best_us']) / 1e3:8.4f}"
    )
    if cells["of_floor"] or cells["of_floor_same_run"]:
        text += f"  of floor {cells['of_floor'] or '-'} ({cells['of_floor_same_run'] or '-'})"
    if cells["clean_us"]:
        text += f"  clean {float(cells['clean_us']) / 1e3:.4f} ({cells['of_floor_clean'] or '-'})"
    if cells["sustained_us"]:
        text += f"  sustained {float(cells['sustained_us']) / 1e3:.3f} ({cells['of_floor_sustained'] or '-'})"
    if cells["sm_mhz"]:
        text += f" {cells['sm_mhz']} MHz {cells['watts']} W"
    if cells["peer_ratio"]:
        text += f"  peer x{cells['peer_ratio']}"
    return text + (f"  error {cells['error_in_bounds']}" if cells["error_in_bounds"] else "")


def layer_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each shape, dtype and routing: cumoe in figures, every other method as time over cumoe's."""
    for key in dict.fromkeys((row["shape"], row["dtype"], row["routing"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["dtype"], row["routing"]) == key]
        methods = list(dict.fromkeys(row["method"] for row in chosen if row["method"] != OWN))
        table = Table(title=f"{key[0]}, {key[1]}, {key[2]} routing")
        names = ("T", "ms", "best ms", "TFLOP/s", "TB/s", "of floor", "same run", "clean ms", "sustained ms")
        for name in (*names, "best recorded peer", *(f"{method} / cumoe" for method in methods)):
            table.add_column(name, justify="right")
        for num_tokens in dict.fromkeys(row["T"] for row in chosen):
            cells = {row["method"]: row for row in chosen if row["T"] == num_tokens}
            own = cells.get(OWN)
            if own is None:
                continue
            table.add_row(
                str(num_tokens),
                milliseconds(own["time_us"]),
                milliseconds(own["best_us"]),
                own["tflops"],
                own["tbs"],
                own["of_floor"],
                own["of_floor_same_run"],
                milliseconds(own["clean_us"]),
                milliseconds(own["sustained_us"]),
                marked(own["peer_ratio"]),
                *(marked(cells[name]["ratio_to_cumoe"]) if name in cells else "-" for name in methods),
            )
        yield table


def operation_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table of the single operations: microseconds by T, and the recorded peer's time over ours."""
    if not rows:
        return
    first = rows[0]
    table = Table(title=f"single operations, {first['shape']}: us (recorded peer / cumoe)")
    tokens = list(dict.fromkeys(row["T"] for row in rows))
    for name in ("operation", *(f"T {count}" for count in tokens)):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = {row["T"]: row for row in rows if row["method"] == name}
        table.add_row(name, *(_operation(cells.get(count)) for count in tokens))
    yield table


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """For each T over all shapes: the mean fraction of the floor, and the case that is nearest to its best peer."""
    own = [row for row in rows if row["method"] == OWN]
    for num_tokens in dict.fromkeys(row["T"] for row in own):
        chosen = [row for row in own if row["T"] == num_tokens]
        floors = [float(row["of_floor"] or row["of_floor_same_run"] or "nan") for row in chosen]
        text = f"T {num_tokens}: of floor {statistics.mean(floors):.3f} on average, {min(floors):.3f} at least"
        ratios = [(float(row["peer_ratio"]), row["shape"]) for row in chosen if row["peer_ratio"]]
        if ratios:
            text += f"; slowest against the best recorded peer: x{min(ratios)[0]:.3f} ({min(ratios)[1]})"
        yield text


def milliseconds(time_us: str) -> str:
    """A time of the file as milliseconds with four digits; "" for none."""
    if not time_us:
        return ""
    value = float(time_us) / 1e3
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def marked(ratio: str) -> str:
    """A ratio, red where cumoe is behind."""
    if not ratio:
        return "-"
    return f"{float(ratio):.2f}" if float(ratio) >= 1 else f"[red]{float(ratio):.2f}[/red]"


def _operation(cells: Row | None) -> str:
    if cells is None:
        return "-"
    text = f"{float(cells['time_us']):.1f}"
    return f"{text} ({marked(cells['peer_ratio'])})" if cells["peer_ratio"] else text
