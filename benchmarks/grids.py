"""
Run the public test grids on the side that is here, the GPU if there is one, and write a CSV with what came out.

Usage: python benchmarks/grids.py [--output DIR] [--commit ID] [arguments of pytest, as in -n 4 or -k fused_moe]

A row is a test function over all its cells. The exit status is that of pytest.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cumoe import _info
from cumoe.bench import results

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "tests/test_moe_grids.py",
    "tests/test_quantised_grids.py",
    "tests/test_route_grids.py",
    "tests/test_layout_grids.py",
)

# by name, so that nothing else that is installed beside pytest takes part
PLUGINS = ("xdist.plugin", "pytest_timeout", "_hypothesis_pytestplugin")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the file, say where it is; the exit status."""
    parser = argparse.ArgumentParser(description="run the public test grids and write a CSV", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--commit", default="", metavar="ID", help="what the file names, outside a checkout")
    options, more = parser.parse_known_args(arguments)
    on_gpu = "device 0" in _info.gpus()
    facts = results.header("grids", options.commit, on_gpu)
    facts["command"] = facts["command"].replace("cumoe", "python benchmarks/grids.py", 1)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = run_pytest(["-k", "cupy" if on_gpu else "numpy", f"--junitxml={report}", *more])
        rows = rows_of(report) if report.exists() else []
    if rows:
        path = results.default_path(options.output, facts)
        results.write(path, facts, rows)
        print(f"wrote {path}")
    return status


def run_pytest(arguments: Sequence[str]) -> int:
    """Run the grids; a later -k takes the place of an earlier one."""
    here = [name for name in PLUGINS if importlib.util.find_spec(name.partition(".")[0])]
    plugins = [word for name in here for word in ("-p", name)]
    command = [sys.executable, "-m", "pytest", *plugins, *FILES, *arguments]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=ROOT, env=alone, check=False).returncode


def rows_of(report: Path) -> list[results.Row]:
    """Read a JUnit file: a row for each test function, in the order of their first cells."""
    rows: dict[str, results.Row] = {}
    seconds: dict[str, float] = {}
    for cell in ElementTree.parse(report).iter("testcase"):
        words = (*cell.get("classname", "").split("."), cell.get("name", "").partition("[")[0])
        name = ".".join(filter(None, words)).removeprefix("tests.")
        new = {"name": name, "cells": 0, "passed": 0, "failed": 0, "skipped": 0}
        row = rows.setdefault(name, new)
        found = {part.tag for part in cell}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        row["cells"] += 1
        row[outcome] += 1
        seconds[name] = seconds.get(name, 0.0) + float(cell.get("time", 0))
    return [{**row, "seconds": f"{seconds[name]:.2f}"} for name, row in rows.items()]


if __name__ == "__main__":
    sys.exit(main())
