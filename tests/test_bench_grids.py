"""benchmarks/grids.py: rows of a test report, the files that it writes, and how it calls pytest."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tree import ROOT

from cumoe import _info
from cumoe.bench import results

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="6" time="9.9">
<testcase classname="tests.test_route_grids" name="test_topk[cupy-4-float32]" time="1.25" />
<testcase classname="tests.test_moe_grids" name="test_moe[cupy-1]" time="0.5"><failure>no</failure></testcase>
<testcase classname="tests.test_route_grids" name="test_topk[cupy-[8]]" time="0.125"><skipped /></testcase>
<testcase classname="tests.test_moe_grids" name="test_moe[cupy-2]" time="0.5"><error>no</error></testcase>
<testcase classname="tests.test_moe_grids" name="test_alone" time="2"><system-out>said</system-out></testcase>
<testcase classname="" name="tests.test_layout_grids" time="0.0"><error>no</error></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def grids():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("grids_script", ROOT / "benchmarks" / "grids.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reporting(calls, status=1, report=REPORT):
    """Stand in for `subprocess.run`: note the call, leave a report."""

    def run(command, cwd=None, env=None, check=None):
        calls.append((command, cwd, env))
        (path,) = (word.partition("=")[2] for word in command if word.startswith("--junitxml="))
        if report:
            with open(path, "w", encoding="utf-8") as file:
                file.write(report)
        return subprocess.CompletedProcess(command, status)

    return run


def test_a_row_is_a_test_function(grids, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    rows = [tuple(row.values()) for row in grids.rows_of(tmp_path / "report.xml")]
    assert rows == [
        ("test_route_grids.test_topk", 2, 1, 0, 1, "1.38"),
        ("test_moe_grids.test_moe", 2, 0, 2, 0, "1.00"),
        ("test_moe_grids.test_alone", 1, 1, 0, 0, "2.00"),
        ("test_layout_grids", 1, 0, 1, 0, "0.00"),
    ]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_grids_of_the_side_that_is_here(grids, tmp_path, monkeypatch, capsys, on_gpu):
    there = {"device 0": "NVIDIA H200, sm_90, 139.80 GiB"} if on_gpu else {"CUDA": "none"}
    monkeypatch.setattr(_info, "gpus", lambda: there)
    monkeypatch.setattr(_info, "git_commit", lambda: "")
    monkeypatch.setattr(sys, "argv", ["grids.py", "--output", str(tmp_path), "-n", "4"])
    calls = []
    monkeypatch.setattr(grids, "subprocess", SimpleNamespace(run=reporting(calls)))
    assert grids.main(["--output", str(tmp_path), "--commit", "abc", "-n", "4", "-k", "fused"]) == 1
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.name.startswith("grids-nvidia-h200-2" if on_gpu else "grids-")
    facts, rows = results.read(path)
    assert list(rows[0]) == ["name", "cells", "passed", "failed", "skipped", "seconds"] and len(rows) == 4
    assert (facts["suite"], facts["commit"]) == ("grids", "abc")
    assert facts["command"] == f"python benchmarks/grids.py --output .../{tmp_path.name} -n 4"
    assert ("gpu device 0" in facts) == on_gpu and "cpu model" in facts
    ((command, folder, env),) = calls
    assert folder == ROOT and env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"
    assert command[command.index("-k") + 1] == ("cupy" if on_gpu else "numpy")
    assert command[-4:] == ["-n", "4", "-k", "fused"]
    assert all((ROOT / name).exists() for name in grids.FILES) and set(grids.FILES) <= set(command)


def test_without_a_report_nothing_is_written(grids, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "subprocess", SimpleNamespace(run=reporting([], 4, report="")))
    assert grids.main(["--output", str(tmp_path / "new")]) == 4
    assert not (tmp_path / "new").exists()


def test_pytest_runs_with_the_plugins_named(grids, tmp_path):
    """One cheap cell, for real."""
    assert (
        grids.main(["--output", str(tmp_path), "-q", "-p", "no:cacheprovider", "-k", "test_zero_experts and numpy"])
        == 0
    )
    ((name, *counts, _),) = (row.values() for row in results.read(next(tmp_path.iterdir()))[1])
    assert name == "test_route_grids.test_zero_experts"
    assert counts[0] == counts[1] > "0" and counts[2:] == ["0", "0"]
