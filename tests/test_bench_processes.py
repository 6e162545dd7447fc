"""benchmarks/processes.py: what a process measures, the file, and the README's table of it."""

import importlib.util
import itertools
from pathlib import Path

import pytest

from cumoe.bench import results, shapes

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def processes():
    return script("processes")


@pytest.mark.parametrize("scheme", ["float32", "int8 w8a8"])
def test_threads_and_callers_are_compared(processes, scheme):
    pytest.importorskip("torch")
    for part in ("threads", "callers"):
        found = processes.PARTS[part](shapes.SHAPES["tiny"], scheme)
        assert list(found) == ["T = 64", "T = 256"] and all(0 < value < 100 for value in found.values())


def test_callers_with_other_bits_are_an_error(processes, monkeypatch):
    pytest.importorskip("torch")
    drawn = itertools.count()

    class Result(int):
        def tobytes(self):
            return int(self).to_bytes(8, "little")

    monkeypatch.setattr(processes, "calls", lambda *_: {"T = 1": lambda: Result(next(drawn))})
    with pytest.raises(RuntimeError, match="4 callers at once got other bits than one, T = 1, float32"):
        processes.callers(shapes.SHAPES["tiny"], "float32")


def test_a_process_starts_and_says_when_its_first_result_was_there(processes):
    assert 0 < processes.seconds_to_first("float32", {}) < 600


def test_the_file_and_the_table_hold_every_row(processes, tmp_path, monkeypatch):
    given = {"first": {"at": 0.0}, "threads": {"T = 64": 1.5}, "callers": {"T = 64": 0.25}, "sgemm": {"layer": 0.75}}
    asked = []

    def measured(part, shape, scheme, environment=None):
        asked.append((part, shape, scheme))
        return given[part]

    monkeypatch.setattr(processes, "measured", measured)
    monkeypatch.setattr(processes.time, "time", lambda: -2.0)
    assert processes.main(["--repeats", "1", "--shapes", "tiny", "small", "--output", str(tmp_path)]) == 0
    path = next(tmp_path.glob("processes-*.csv"))
    facts, rows = results.read(path)
    assert facts["command"].startswith("python benchmarks/processes.py")
    assert len(rows) == 3 * 2 + 2 * 3 * 2 + 3
    assert {row["value"] for row in rows} == {"2.000", "1.500", "0.250", "0.750"}
    parts = ("threads", "small", "int8 w8a8"), ("callers", "tiny", "bfloat16"), ("sgemm", "mixtral", "float32")
    assert set(parts) <= set(asked)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:processes -->\n<!-- /table:processes -->\n")
    assert script("readme").main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert path.name in text and facts["commit"] in text
    assert "| first result, warm cache | tiny | 2.000 s | 2.000 s | 2.000 s |" in text
    assert "| layer, instructions of haswell | one expert of mixtral |  | 0.750 |  |" in text
