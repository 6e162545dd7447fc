"""
Write the tables of README.md from the newest result files; nobody edits them by hand.

Usage: python benchmarks/readme.py [--readme README.md] [--results benchmarks/results]
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from cumoe.bench import results

Item = TypeVar("Item")

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("cpu",)


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


def table(facts: dict[str, str], rows: list[dict[str, str]], source: str) -> str:
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


def unique(items: Iterable[Item]) -> list[Item]:
    """Drop repeats, keep the order."""
    return list(dict.fromkeys(items))


if __name__ == "__main__":
    sys.exit(main())
