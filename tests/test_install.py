"""What is built, what it weighs, and what the two commands do."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {"cumoe": "cumoe", "cpu": "cumoe/cpu", "rawkernels": "cumoe/rawkernels"}  # tree -> installed
BASE_LIMIT_MB = 330


def run(*command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that no build writes into the checkout; with a CUDA source to carry."""
    folder = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in (*FOLDERS, "tests", "notebooks", "benchmarks"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb[ci]"))
    (folder / "rawkernels" / "probe.cu").write_text("// code\n")
    (folder / "rawkernels" / "probe.cuh").write_text("// header\n")
    return folder


def build_wheel(tree, out):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, ".", cwd=tree)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_of_the_three_folders(tree, wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    expected = {"cumoe/py.typed"}
    for folder, installed in FOLDERS.items():
        expected |= {
            f"{installed}/{path.relative_to(tree / folder).as_posix()}"
            for path in (tree / folder).rglob("*")
            if path.suffix in (".py", ".cu", ".cuh")
        }
    assert {"cumoe/rawkernels/probe.cu", "cumoe/rawkernels/probe.cuh"} < expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (top_level,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["cumoe"]
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert names == expected


def test_the_source_archive_gives_the_same_wheel(tree, wheel, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for name in ("Makefile", "CHANGELOG.md", "CONTRIBUTING.md", ".mypy.ini", ".ruff.toml", ".clang-format"):
        assert (unpacked / name).exists(), name
    for name in ("tests/conftest.py", *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))):
        assert (unpacked / name).exists(), name
    again = build_wheel(unpacked, tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_the_installed_wheel_works_away_from_the_tree(wheel, tmp_path):
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    run(*pip, cwd=tmp_path)
    code = (
        "import importlib.util, importlib.resources, cumoe, cumoe.cpu.bits, cumoe.rawkernels, cumoe.reference;"
        "print(cumoe.__file__); print(cumoe.cpu.__file__); print(cumoe.rawkernels.__file__);"
        "print(importlib.util.find_spec('cpu'), importlib.util.find_spec('rawkernels'));"
        "print(importlib.resources.files('cumoe.rawkernels').joinpath('probe.cu').read_text().strip())"
    )
    *places, found, kernel = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert places == [str(target / installed / "__init__.py") for installed in FOLDERS.values()]
    assert found == "None None"
    assert kernel == "// code"


def test_the_command_line_is_installed():
    (entry,) = (one for one in importlib.metadata.distribution("cumoe").entry_points if one.name == "cumoe")
    assert entry.value == "cumoe.cli:main"
    assert callable(entry.load())


def test_the_base_install_stays_small():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    pending = [Requirement(line) for line in config["options"]["install_requires"].strip().splitlines()]
    size_mb = {}
    while pending:
        requirement = pending.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in size_mb or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        distribution = importlib.metadata.distribution(name)
        files = (file.locate() for file in distribution.files)  # with the bytecode that pip compiles
        size_mb[name] = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
        pending += [Requirement(line) for line in distribution.requires or ()]
    for name, size in sorted(size_mb.items(), key=lambda item: -item[1]):
        print(f"{name:20} {size:7.1f} MB")
    total = sum(size_mb.values())
    print(f"{'base install':20} {total:7.1f} MB")
    assert {"numpy", "numba", "ml-dtypes"} < size_mb.keys()
    assert total < BASE_LIMIT_MB


# -- make -------------------------------------------------------------------------------------------


def plan(folder, *words):
    """What make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = [shutil.which("make"), "-n", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("verb", "what", "then"),
    [("demo", "'.'", ".venv/bin/cumoe demo"), ("test", "'.[test]'", ".venv/bin/pytest -n auto")],
)
def test_the_two_commands_install_what_they_need_once(checkout, verb, what, then):
    first = plan(checkout, verb)
    assert re.search(r"^\S+ -m venv \.venv$", first, re.MULTILINE)
    assert f".venv/bin/python -m pip install --quiet --editable {what}\n" in first
    assert then in first.splitlines()[-1]
    stamps = checkout / ".venv"
    (stamps / "bin").mkdir(parents=True)
    for name in ("bin/python", ".base", ".test"):
        (stamps / name).touch()
    second = plan(checkout, verb).splitlines()
    assert len(second) == 1
    assert then in second[0]
    later = time.time() + 10
    os.utime(checkout / "setup.cfg", (later, later))
    assert "pip install" in plan(checkout, verb)  # the requirements changed
    assert "venv .venv" not in plan(checkout, verb)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_old_python_is_refused_in_words(checkout):
    process = subprocess.run(["make", "PYTHON=", "demo"], cwd=checkout, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "cumoe needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" in process.stderr
    assert not (checkout / ".venv").exists()
