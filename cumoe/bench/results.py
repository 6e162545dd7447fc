"""Result files: a CSV table under a header that says where its numbers come from."""

import csv
import datetime
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


def header(suite: str, commit: str = "", on_gpu: bool | None = None) -> dict[str, str]:
    """
    Facts that a reader needs beside the numbers; `commit` is for copies that are no checkout.

    They are those of the GPU or of the CPU; None goes by the name of the suite.
    """
    from cumoe import _info

    facts = {
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _info.git_commit() or commit or "not a checkout",
        "command": shlex.join(["cumoe", *map(_without_folders, sys.argv[1:])]),
    }
    if suite == "gpu" if on_gpu is None else on_gpu:
        facts |= {"gpu " + name: value for name, value in _info.gpus().items()}
        facts["cpu model"] = _info.cpu_model()
    else:
        cpu, kernels = _info.cpu(), _info.kernels()
        cpu.pop("memory available")
        facts |= {"cpu " + name: value for name, value in cpu.items()}
        facts |= {"kernel " + dtype: names.partition(" ")[0] for dtype, names in kernels.items()}
    return facts | {"version " + name: value for name, value in _info.versions().items()}


def _without_folders(word: str) -> str:
    """Leave the folders of a path out: they are those of one machine."""
    return re.sub(r"(^|=)/.*/", r"\1.../", word)


def default_path(folder: Path, facts: Mapping[str, str]) -> Path:
    """`folder`/suite-device-date.csv."""
    device = facts.get("gpu device 0", facts["cpu model"]).partition(",")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    return folder / f"{facts['suite']}-{slug}-{re.sub(r'[-:]', '', facts['date'])}.csv"


def write(path: Path, facts: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write a result file; a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for name, value in facts.items():
            file.write(f"# {name}: {' '.join(value.split())}\n")
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Header and rows of a result file."""
    facts: dict[str, str] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not lines:
            name, _, value = line[2:].partition(": ")
            facts[name] = value
        else:
            lines.append(line)
    return facts, list(csv.DictReader(lines))


def newest(folder: Path, suite: str) -> Path | None:
    """The result file of `suite` with the latest date in its header, if there is one."""
    dated = []
    for path in folder.glob("*.csv"):
        facts, _ = read(path)
        if facts.get("suite") == suite:
            dated.append((facts.get("date", ""), path))
    return max(dated)[1] if dated else None


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` when the block ends well."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        umask = os.umask(0)  # mkstemp makes private files; results are for everybody who may read the folder
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
