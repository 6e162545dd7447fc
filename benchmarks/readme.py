"""
Write the tables of README.md from the newest result files; nobody edits them by hand.

Usage: python benchmarks/readme.py [--readme README.md] [--results benchmarks/results]
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from cumoe.bench import gpu_ceilings, gpu_tables, results

Item = TypeVar("Item")

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("cpu", "gpu", "processes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill every table whose suite has results; the exit status."""
    parser = argparse.ArgumentParser(description="write the README's tables from the newest result files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    for suite in SUITES:
        newest = results.newest(options.results, suite)
        if newest is None:
            print(f"no results of suite {suite} in {options.results}: its table stays as it is", file=sys.stderr)
            continue
        try:
            table = {"cpu": cpu_table, "gpu": gpu_table, "processes": processes_table}[suite]
            text = replaced(text, suite, table(*results.read(newest), source=newest.name))
        except ValueError as error:
            print(f"{options.readme}: {error}", file=sys.stderr)
            return 1
    with results.replacing(options.readme) as file:
        file.write(text)
    return 0


def replaced(text: str, suite: str, content: str) -> str:
    """Put `content` between the two markers of `suite`."""
    first, last = f"<!-- table:{suite} -->", f"<!-- /table:{suite} -->"
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"no {first} followed by {last}")
    return f"{before}{first}\n{content}\n{last}{after}"


def cpu_table(facts: dict[str, str], rows: list[dict[str, str]], source: str) -> str:
    """Markdown of one result file: a table for each shape and routing, every row that was measured."""
    lines = [
        f"{facts['cpu model']}, {facts['cpu threads']}, {facts['date'][:10]}, commit {facts['commit']}. "
        f"cumoe {facts['version cumoe']}, NumPy {facts['version numpy']}, Numba {facts['version numba']}, "
        f"torch {facts['version torch']}. Medians of one run; a ratio is the other method's time over cumoe's, "
        f"so above 1 cumoe is ahead. File: `benchmarks/results/{source}`.",
    ]
    methods = [name for name in unique(row["method"] for row in rows) if name != "cumoe"]
    for shape, routing in unique((row["shape"], row["routing"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["routing"]) == (shape, routing)]
        one = chosen[0]
        lines += [
            "",
            f"**{shape}** (E {one['E']}, k {one['k']}, H {one['H']}, I {one['I']}), {routing} routing",
            "",
            "| dtype | calls | T | cumoe ms | GFLOP/s | GB/s | of floor | " + " | ".join(methods) + " |",
            "|" + " --- |" * 2 + " ---: |" * (5 + len(methods)),
        ]
        for dtype, mode, tokens in unique((row["dtype"], row["mode"], row["T"]) for row in chosen):
            cells = {
                row["method"]: row for row in chosen if (row["dtype"], row["mode"], row["T"]) == (dtype, mode, tokens)
            }
            own = cells["cumoe"]
            ratios = (f"{float(cells[name]['ratio_to_cumoe']):.2f}" if name in cells else "" for name in methods)
            numbers = (f"{float(own['time_us']) / 1e3:.3f}", own["gflops"], own["gbs"], own["of_floor"], *ratios)
            lines.append(f"| {dtype} | {mode} | {tokens} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def processes_table(facts: dict[str, str], rows: list[dict[str, str]], source: str) -> str:
    """Markdown of one result file of whole processes: a line for what was measured, a column for each scheme."""
    schemes = unique(row["scheme"] for row in rows)
    lines = [
        f"{facts['cpu model']}, {facts['cpu threads']}, {facts['date'][:10]}, commit {facts['commit']}. "
        f"File: `benchmarks/results/{source}`.",
        "",
        "| | shape | " + " | ".join(schemes) + " |",
        "| --- | --- |" + " ---: |" * len(schemes),
    ]
    for what, shape in unique((row["what"], row["shape"]) for row in rows):
        cells = {row["scheme"]: row for row in rows if (row["what"], row["shape"]) == (what, shape)}
        values = (f"{cells[name]['value']} {cells[name]['unit']}" if name in cells else "" for name in schemes)
        lines.append(f"| {what} | {shape} | " + " | ".join(values).replace(" ratio", "") + " |")
    return "\n".join(lines)


def gpu_table(facts: dict[str, str], rows: list[dict[str, str]], source: str) -> str:
    """Markdown of one result file of the GPU suite: every case and contender, and the single operations."""
    floor = gpu_ceilings.RECORDED["bfloat16"]
    ceilings = [f"{name} {value}" for name, value in facts.items() if " ceiling " in name]
    lines = [
        f"{facts['gpu device 0']}, driver {facts.get('gpu driver', facts['gpu CUDA'])}, {facts['date'][:10]}, commit "
        f"{facts['commit']}. cumoe {facts['version cumoe']}, CuPy {facts['version cupy']}, torch "
        f"{facts['version torch']}. The whole expert computation from given weights and ids: {facts['protocol']}. "
        f'"Of floor" is by the recorded ceilings of this GPU ({floor.read / 1e12:.2f} TB/s, {floor.product / 1e12:.0f} '
        'TFLOP/s), "same run" by those of the run '
        f"({'; '.join(ceilings) or 'not measured'}). "
        '"Clean": after the write as many bytes of something else are read, so that the replay does not write back '
        'what L2 held. "Under load": all methods in turn until the clock has settled, '
        "with the fraction of the sustained ceilings. A ratio is the other method's time over cumoe's: above 1 cumoe "
        'is ahead; "recorded" is the best other method of `cumoe/bench/gpu_recorded.py`. '
        f"File: `benchmarks/results/{source}`.",
    ]
    layers = [row for row in rows if row["kind"] == "layer"]
    methods = [name for name in unique(row["method"] for row in layers) if name != "cumoe"]
    for shape, dtype, routing in unique((row["shape"], row["dtype"], row["routing"]) for row in layers):
        chosen = [row for row in layers if (row["shape"], row["dtype"], row["routing"]) == (shape, dtype, routing)]
        one = chosen[0]
        lines += [
            "",
            f"**{shape}** (E {one['E']}, k {one['k']}, H {one['H']}, I {one['I']}), {dtype}, {routing} routing",
            "",
            "| T | cumoe ms | best ms | TFLOP/s | TB/s | of floor | same run | clean ms | under load ms | "
            + " | ".join(["recorded", *methods])
            + " |",
            "|" + " ---: |" * (10 + len(methods)),
        ]
        for tokens in unique(row["T"] for row in chosen):
            cells = {row["method"]: row for row in chosen if row["T"] == tokens}
            lines.append(f"| {tokens} | " + " | ".join(_gpu_cells(cells, methods)) + " |")
    lines += _operations([row for row in rows if row["kind"] == "operation"])
    return "\n".join(lines)


def _gpu_cells(cells: dict[str, dict[str, str]], methods: list[str]) -> Iterable[str]:
    own = cells.get("cumoe")
    if own is None:  # it failed, which is a loss to show
        return ["failed", *[""] * (8 + len(methods))]
    clean = gpu_tables.milliseconds(own.get("clean_us", ""))
    load = gpu_tables.milliseconds(own["sustained_us"])
    return (
        gpu_tables.milliseconds(own["time_us"]),
        gpu_tables.milliseconds(own["best_us"]),
        own["tflops"],
        own["tbs"],
        own["of_floor"],
        own["of_floor_same_run"],
        f"{clean} ({own['of_floor_clean']})" if clean else "",
        f"{load} ({own['of_floor_sustained']})" if own["of_floor_sustained"] else load,
        _two_digits(own["peer_ratio"]),
        *(_two_digits(cells[name]["ratio_to_cumoe"]) if name in cells else "" for name in methods),
    )


def _operations(rows: list[dict[str, str]]) -> list[str]:
    """Microseconds of the single operations, and the recorded time of the other library."""
    if not rows:
        return []
    tokens = unique(row["T"] for row in rows)
    lines = [
        "",
        f"Single operations of {rows[0]['shape']}, us in a graph (ratio of the recorded time to it)",
        "",
        "| operation | recorded | " + " | ".join(f"T {count}" for count in tokens) + " |",
        "| --- | --- |" + " ---: |" * len(tokens),
    ]
    for name in unique(row["method"] for row in rows):
        cells = {row["T"]: row for row in rows if row["method"] == name}
        texts = []
        for count in tokens:
            cell = cells.get(count)
            ratio = f" ({_two_digits(cell['peer_ratio'])})" if cell and cell["peer_ratio"] else ""
            texts.append(f"{float(cell['time_us']):.1f}{ratio}" if cell else "")
        peers = unique(row["peer"] for row in cells.values() if row["peer"])
        lines.append(f"| {name} | {', '.join(peers)} | " + " | ".join(texts) + " |")
    return lines


def _two_digits(ratio: str) -> str:
    return f"{float(ratio):.2f}" if ratio else ""


def unique(items: Iterable[Item]) -> list[Item]:
    """Drop repeats, keep the order."""
    return list(dict.fromkeys(items))


if __name__ == "__main__":
    sys.exit(main())
