"""The notebooks: their two forms say the same, and their sources run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


def cells_of_source(text):
    """Return (kind, text) of every cell of a percent-format source."""
    body = text.split("# ---\n", 2)[2]
    cells = []
    for head, content in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", body, re.MULTILINE):
        kind = "markdown" if "[markdown]" in head else "code"
        lines = content.strip("\n").split("\n")
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append((kind, "\n".join(lines)))
    return cells


def cells_of_notebook(text):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]


def test_there_are_notebooks():
    assert [path.name for path in SOURCES][:1] == ["01_first_layer.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_its_source(path):
    source, notebook = path.read_text(), path.with_suffix(".ipynb").read_text()
    assert cells_of_source(source) == cells_of_notebook(notebook), "make notebooks writes it again"
    assert len(cells_of_source(source)) >= 5


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_source_runs_in_under_a_minute(path, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    settings = {**os.environ, "MPLBACKEND": "agg", "PYTHONWARNINGS": "error"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 60
    assert not list(tmp_path.iterdir())
    if path.stem == "01_first_layer":
        assert float(re.search(r"max\(error/bound\) = ([\d.]+)", done.stdout)[1]) <= 1
        assert len(re.findall(r"^T = +\d+: +[\d.]+ us, floor +[\d.]+ us$", done.stdout, re.MULTILINE)) == 5
