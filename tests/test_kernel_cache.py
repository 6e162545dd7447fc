"""Compiled kernels on disk: what the key covers, damage, several processes, killed writers, folders that refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cumoe.rawkernels import _cache, _compile

HEADER = "// scale.cuh\n__device__ __forceinline__ float scaled(float x) { return FACTOR * x; }\n"
KERNEL = """// scale.cu: a kernel of these tests
#include "scale.cuh"
#include "scale.cuh"
extern "C" __global__ void scale(float *x) { x[threadIdx.x] = scaled(x[threadIdx.x]); }
"""

RUN = """
import hashlib, os, sys, time
from pathlib import Path
from cumoe.rawkernels import _cache, _compile
_compile._HERE = Path(sys.argv[1])
{before}
done = _compile.compiled("scale.cu", "sm_80", {{"FACTOR": 3}})
print(done.how, "|", hashlib.sha256(done.code).hexdigest(), "|", "cuda.core" in sys.modules)
"""

# the file gets its final name when that of the other process is ready as well
WAIT_FOR_THE_OTHER = """
rename = os.replace
def replace(source, target):
    Path(sys.argv[1], f"ready-{os.getpid()}").touch()
    while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
        time.sleep(0.001)
    rename(source, target)
_cache.os.replace = replace
"""

HANG_BEFORE_THE_RENAME = """
def replace(source, target):
    print("writing", flush=True)
    time.sleep(600)
_cache.os.replace = replace
"""

HANG_HALF_WRITTEN = """
import builtins
class Half:
    def __init__(self, path, mode):
        self.file = builtins.open(path, mode, buffering=0)
    def __enter__(self):
        return self
    def __exit__(self, *reason):
        self.file.close()
    def write(self, content):
        self.file.write(content[: len(content) // 2])
        print("writing", flush=True)
        time.sleep(600)
_cache.open = Half
"""


class Sources:
    """A folder of kernel files, a cache, and processes that use both."""

    def __init__(self, folder):
        self.folder, self.root = folder / "sources", folder / "cache"
        self.folder.mkdir()
        (self.folder / "scale.cu").write_text(KERNEL)
        (self.folder / "scale.cuh").write_text(HEADER)

    def start(self, before=""):
        environment = {**os.environ, "CUPY_CACHE_DIR": str(self.root)}
        command = [sys.executable, "-c", RUN.format(before=before), str(self.folder)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def result(self, process):
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        how, code, loaded_compiler = printed.strip().split(" | ")
        return how, code, loaded_compiler == "True"

    def run(self, before=""):
        return self.result(self.start(before))

    def entries(self, pattern="*.cubin"):
        return sorted(self.root.rglob(pattern))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    made = Sources(tmp_path)
    monkeypatch.setattr(_compile, "_HERE", made.folder)
    _compile.source.cache_clear()
    yield made
    _compile.source.cache_clear()


def compiled(sources, arch="sm_80", **constants):
    _compile.source.cache_clear()  # as a new process would read it
    return _compile.compiled("scale.cu", arch, constants or {"FACTOR": 3}, sources.root)


def fetch(root, *, parts=("text",), maker="nvrtc-1.0", content=b"code"):
    return _cache.fetch("name", parts, maker, lambda: content, root)


# -- the text ---------------------------------------------------------------------------------------


def test_headers_are_pasted_once_and_lines_keep_their_numbers(sources):
    assert _compile.source("scale.cu").splitlines() == [
        '#line 1 "scale.cu"',
        "// scale.cu: a kernel of these tests",
        '#line 1 "scale.cuh"',
        *HEADER.splitlines(),
        '#line 3 "scale.cu"',
        "",
        *KERNEL.splitlines()[3:],
    ]


def test_an_error_names_the_file_and_the_line_of_the_user(sources):
    (sources.folder / "scale.cu").write_text(KERNEL + "extern int f(undeclared);\n")
    with pytest.raises(Exception, match=r"scale\.cu\(5\): error: identifier \"undeclared\""):
        compiled(sources)
    assert sources.entries("*") == []
    (sources.folder / "scale.cu").write_text(KERNEL)
    (sources.folder / "scale.cuh").write_text(HEADER + "extern int f(undeclared);\n")
    with pytest.raises(Exception, match=r"scale\.cuh\(3\): error: identifier \"undeclared\""):
        compiled(sources)


def test_the_log_of_the_assembler_comes_from_the_disk_too(sources):
    first, second = compiled(sources), compiled(sources)
    assert (first.how, second.how) == (_cache.BUILT, _cache.READ)
    assert first.code == second.code
    assert first.code.startswith(b"\x7fELF")
    assert "Used" in first.log
    assert first.log == second.log


# -- the key ----------------------------------------------------------------------------------------


def test_a_changed_header_is_compiled_anew(sources):
    first = compiled(sources)
    (sources.folder / "scale.cuh").write_text(HEADER.replace("FACTOR * x", "x + FACTOR"))
    second = compiled(sources)
    assert (first.how, second.how) == (_cache.BUILT, _cache.BUILT)
    assert first.code != second.code
    (sources.folder / "scale.cuh").write_text(HEADER)
    assert compiled(sources) == first._replace(how=_cache.READ)


def test_constants_architectures_and_settings_do_not_share_entries(sources, monkeypatch):
    assert [compiled(sources, FACTOR=factor).how for factor in (3, 4, 3)] == [_cache.BUILT, _cache.BUILT, _cache.READ]
    assert compiled(sources, FACTOR=3, UNUSED=1).how == _cache.BUILT
    assert compiled(sources, "sm_90a", FACTOR=3).how == _cache.BUILT
    monkeypatch.setattr(_compile, "_SETTINGS", {"std": "c++17", "ptxas_options": ["-v"]})
    assert compiled(sources, FACTOR=3).how == _cache.BUILT
    assert len(sources.entries()) == 5


def test_another_compiler_does_not_read_old_entries(sources, monkeypatch):
    compiled(sources)
    monkeypatch.setattr(_compile, "nvrtc_version", lambda: "nvrtc-99.0")
    assert compiled(sources).how == _cache.BUILT
    assert compiled(sources).how == _cache.READ


def test_parts_are_told_apart_however_they_are_cut(tmp_path):
    assert fetch(tmp_path, parts=("ab", "c")) == (b"code", _cache.BUILT)
    assert fetch(tmp_path, parts=("a", "bc"))[1] == _cache.BUILT
    assert fetch(tmp_path, parts=("ab\0001:c",))[1] == _cache.BUILT
    assert fetch(tmp_path, parts=("ab", "c"))[1] == _cache.READ


def test_a_machine_without_a_compiler_uses_what_any_compiler_made(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _cache.fetch("name", ("text",), None, lambda: 1 // 0, tmp_path)
    fetch(tmp_path)
    assert fetch(tmp_path, maker=None) == (b"code", _cache.READ)
    assert fetch(tmp_path, maker=None, parts=("other",), content=b"new")[1] == _cache.BUILT


def test_the_version_of_the_compiler_has_three_numbers():
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    name, _, version = _compile.nvrtc_version().partition("-")
    assert name == "nvrtc"
    assert [int(number) for number in version.split(".")][:2] == list(nvrtc.nvrtcVersion()[1:])
    assert version.count(".") == 2


# -- damage and processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"more",
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    ],
    ids=["empty", "no checksum", "half", "longer", "one bit"],
)
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    content = bytes(range(100))
    fetch(tmp_path, content=content)
    (entry,) = tmp_path.rglob("*.cubin")
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert fetch(tmp_path, content=content) == (content, _cache.REBUILT)
    assert entry.read_bytes() == good
    assert fetch(tmp_path, content=content) == (content, _cache.READ)


def test_a_warm_process_does_not_load_the_compiler(sources):
    how, code, loaded_compiler = sources.run()
    assert (how, loaded_compiler) == (_cache.BUILT, True)
    assert sources.run() == (_cache.READ, code, False)


def test_two_processes_that_build_one_kernel_agree(sources):
    writers = [sources.start(WAIT_FOR_THE_OTHER) for _ in range(2)]
    first, second = (sources.result(writer) for writer in writers)
    assert first == second
    assert first[0] == _cache.BUILT
    assert len(sources.entries("*")) == 2  # the folder and one entry: nothing temporary is left
    assert sources.run() == (_cache.READ, first[1], False)


@pytest.mark.parametrize("hang", [HANG_BEFORE_THE_RENAME, HANG_HALF_WRITTEN], ids=["whole", "half"])
def test_a_killed_writer_leaves_no_entry(sources, hang):
    writer = sources.start(hang)
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.communicate()
    assert sources.entries() == []
    assert len(sources.entries(".writing-*")) == 1
    how, code, _ = sources.run()
    assert how == _cache.BUILT
    assert sources.run() == (_cache.READ, code, False)


# -- folders ----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_result(tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert fetch(tmp_path / "file") == (b"code", _cache.BUILT)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_full_disk_costs_the_cache_and_not_the_result(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "replace", refuse)
    assert fetch(tmp_path) == (b"code", _cache.BUILT)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(_cache.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_entries_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        fetch(tmp_path)
    finally:
        os.umask(before)
    (entry,) = tmp_path.rglob("*.cubin")
    assert entry.stat().st_mode & 0o777 == 0o644


def test_the_folder_is_that_of_cupy(tmp_path, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert _cache.folder() == tmp_path / "cumoe"
    assert _cache.folder(tmp_path / "other") == tmp_path / "other" / "cumoe"
    monkeypatch.delenv("CUPY_CACHE_DIR")
    assert _cache.folder() == Path.home() / ".cupy" / "kernel_cache" / "cumoe"


def test_nothing_is_written_where_cupy_writes_nothing(monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert _cache.folder() is None
    assert fetch(None) == (b"code", _cache.BUILT)


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setattr(_cache.Path, "home", homeless)
    assert fetch(None) == (b"code", _cache.BUILT)
