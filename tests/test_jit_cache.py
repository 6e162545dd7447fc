"""
The compile cache of the CPU side under several processes, killed writers, damage and edits.

Each test copies `_jit.py` with a small loop into a package of its own and runs it in real processes
that share a folder; the loop calls a function of another file, as the rooms do.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cumoe.cpu._jit import jit

ROOT = Path(__file__).parents[1]

SCALE = """
from cumoe.cpu._jit import jit

@jit()
def scale(value):
    return value * 3
"""

LOOP = """
from cumoe.cpu._jit import jit
from cumoe.cpu.scale import scale

@jit()
def total(values):
    result = values[0] * 0
    for value in values:
        result += scale(value)
    return result

def double(value):
    return value * 2

def triple(value):
    return value * 3

def template(values):
    result = values[0] * 0
    for value in values:
        result += weigh(value)
    return result

doubled = jit(weigh=jit()(double))(template)
tripled = jit(weigh=jit()(triple))(template)
"""

RUN = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from cumoe.cpu import _jit
{before}
from cumoe.cpu import loop
function = getattr(loop, {function!r})
values = [float(function(np.arange(10, dtype=name))) for name in sys.argv[1:]]
print(json.dumps([values, sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values())]))
"""

# the n-th file of each of two writers gets its final name when the other's is ready as well
WAIT_FOR_THE_OTHER = """
rename, count = os.replace, 0
def replace(source, target):
    global count
    Path(f"writing-{count}-{os.getpid()}").touch()
    while len(list(Path().glob(f"writing-{count}-*"))) < 2:
        time.sleep(0.001)
    count += 1
    rename(source, target)
_jit.os.replace = replace
"""

HANG_BEFORE_THE_RENAME = """
def replace(source, target):
    print("writing", flush=True)
    time.sleep(600)
_jit.os.replace = replace
"""

HANG_HALF_WRITTEN = """
class Half:
    def __init__(self, handle):
        self.handle = handle
    def __enter__(self):
        return self
    def __exit__(self, *reason):
        os.close(self.handle)
    def write(self, content):
        os.write(self.handle, content[: len(content) // 2])
        print("writing", flush=True)
        time.sleep(600)
_jit.os.fdopen = lambda handle, mode: Half(handle)
"""


class Package:
    """A copy of the compile cache in `folder`, with the loops above, and processes that use it."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.source = folder / "cumoe" / "cpu"
        self.source.mkdir(parents=True)
        (folder / "cumoe" / "__init__.py").touch()
        for name in ("__init__.py", "_jit.py", "_threads.py"):
            shutil.copy(ROOT / "cpu" / name, self.source / name)
        (self.source / "scale.py").write_text(SCALE)
        (self.source / "loop.py").write_text(LOOP)

    def start(self, *dtypes, before="", function="total"):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(self.cache), "PYTHONPATH": str(self.folder)}
        code = RUN.format(before=before, function=function)
        return subprocess.Popen(
            [sys.executable, "-c", code, *dtypes],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *dtypes, **options):
        return self.finish(self.start(*dtypes, **options))

    def finish(self, process):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return tuple(json.loads(output))

    def entries(self, function="total"):
        return sorted(path for path in self.cache.rglob("*.nbc") if function in path.name)


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


def test_a_second_process_compiles_nothing(package):
    assert package.run("float32", "int64") == ([135.0, 135.0], 0, 2)
    assert package.run("float32", "int64") == ([135.0, 135.0], 2, 0)
    assert len(package.entries()) == 2


def test_two_processes_may_write_at_once(package):
    both = [package.start("float64", before=WAIT_FOR_THE_OTHER) for _ in range(2)]
    for process in both:
        assert package.finish(process) == ([135.0], 0, 1)
    assert len(list(package.folder.glob("writing-*"))) == 4  # both wrote both functions
    assert package.run("float64") == ([135.0], 1, 0)
    assert len(package.entries()) == 1


def test_two_processes_may_add_different_signatures_at_once(package):
    first = package.start("float32", "float64", before=WAIT_FOR_THE_OTHER)
    second = package.start("int32", "int64", before=WAIT_FOR_THE_OTHER)
    assert package.finish(first) == ([135.0, 135.0], 0, 2)
    assert package.finish(second) == ([135.0, 135.0], 0, 2)
    assert package.run("int64", "int32", "float64", "float32") == ([135.0] * 4, 4, 0)


@pytest.mark.parametrize("hang", [HANG_BEFORE_THE_RENAME, HANG_HALF_WRITTEN], ids=["whole", "half"])
def test_a_killed_writer_leaves_a_usable_cache(package, hang):
    writer = package.start("float64", before=hang)
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.communicate()
    assert package.entries("") == []
    assert package.run("float64") == ([135.0], 0, 1)
    assert package.run("float64") == ([135.0], 1, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"more",
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    ],
    ids=["empty", "no checksum", "half", "longer", "one bit"],
)
def test_a_damaged_entry_is_built_again(package, damage):
    package.run("float64")
    (entry,) = package.entries()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert package.run("float64") == ([135.0], 0, 1)
    assert len(entry.read_bytes()) == len(good)
    assert package.run("float64") == ([135.0], 1, 0)


def test_an_edit_of_a_called_file_is_noticed(package):
    assert package.run("float64") == ([135.0], 0, 1)
    (package.source / "scale.py").write_text(SCALE.replace("* 3", "* 5"))
    assert package.run("float64") == ([225.0], 0, 1)
    assert package.run("float64") == ([225.0], 1, 0)
    (package.source / "scale.py").write_text(SCALE)
    assert package.run("float64")[0] == [135.0]


def test_another_numba_does_not_read_old_entries(package):
    package.run("float64")
    assert package.run("float64", before="_jit.numba.__version__ = '99.0'") == ([135.0], 0, 1)


def test_specialisations_of_a_template_do_not_share_entries(package):
    assert package.run("float64", function="doubled") == ([90.0], 0, 1)
    assert package.run("float64", function="tripled") == ([135.0], 0, 1)
    assert package.run("float64", function="doubled") == ([90.0], 1, 0)
    assert package.run("float64", function="tripled") == ([135.0], 1, 0)


def test_a_full_disk_costs_the_cache_and_not_the_result(package):
    full = "def replace(source, target):\n    raise OSError(28, 'No space left on device')\n_jit.os.replace = replace"
    assert package.run("float64", before=full) == ([135.0], 0, 1)
    assert list(package.cache.rglob("*writing*")) == []
    assert package.run("float64") == ([135.0], 0, 1)


def test_where_nothing_can_be_written_every_process_compiles(package):
    nowhere = "def refuse(*_):\n    raise RuntimeError('no locator available')\n_jit.FunctionCache.__init__ = refuse"
    assert package.run("float64", before=nowhere) == ([135.0], 0, 1)
    assert package.entries("") == []


def test_serial_and_parallel_specialisations_do_not_share_entries():
    loops = [jit(parallel=parallel, weight=2)(lambda value: value) for parallel in (False, True)]
    assert len({loop.py_func.__qualname__ for loop in loops}) == 2  # the name is part of the key


def test_what_only_compiled_code_calls_has_no_entry_for_python():
    inner = jit(inner=True)(_twice)
    with pytest.raises(TypeError, match=r"^_twice can be called by compiled code only$"):
        inner(2)
    assert jit(call=inner)(_calls)(2) == 4


call = None


def _twice(x):
    return 2 * x


def _calls(x):
    return call(x)
