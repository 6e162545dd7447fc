"""The calls of `make sanitize` without a GPU: the front desk and the launchers run, the kernels do not."""

import contextlib
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sanitize_kernels as program

from cumoe import _arrays
from cumoe.rawkernels import _load, _tensor_maps


class Array(np.ndarray):
    """Host memory that looks like an array of the device."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data, device_id=0))
    device = property(lambda self: SimpleNamespace(id=0))


class Namespace(ModuleType):
    """NumPy's functions, whose arrays are of the "device"."""

    def __getattr__(self, name):
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function

        def made(*arguments, **named):
            result = function(*arguments, **named)
            return result.view(Array) if isinstance(result, np.ndarray) else result

        return made


@pytest.fixture
def hopper(monkeypatch):
    """A stand-in for CuPy and an H200."""
    cupy = Namespace("cupy")
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), using_allocator=lambda allocator: contextlib.nullcontext()
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_arrays, "_kind", lambda name, array: "cupy")
    monkeypatch.setattr(_arrays, "place", lambda array: "cuda:0")
    monkeypatch.setattr(_load, "capability", lambda device=None: 90)
    monkeypatch.setattr(_load, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_tensor_maps, "_encode", lambda *named: np.zeros(1, "V128"))
    return cupy


def test_every_listed_kernel_is_called(hopper):
    seen = program.make_calls(hopper, launch=False)
    assert program.missing(seen, "sm_90a") == []
    file, name, constants = next(iter(seen))
    assert file.endswith((".cu", ".py"))
    assert all(constant == tuple(constant) for constant in constants)
    assert name.isidentifier()


def test_what_is_not_called_is_found(hopper):
    seen = program.make_calls(hopper, launch=False)
    kernels = {(file, name) for file, name, _ in seen}
    for kernel in kernels:
        assert kernel in program.missing([one for one in seen if one[:2] != kernel], "sm_90a")
    widest = [one for one in seen if dict(one[2]).get("COLUMNS") != 192]
    left_out = program.missing(widest, "sm_90a")
    assert left_out
    assert all(("COLUMNS", 192) in part for part in left_out)


@pytest.mark.parametrize(
    ("status", "printed", "clean"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (86, "========= ERROR SUMMARY: 3 errors", False),
        (0, "the sanitizer did not start", False),
        (1, "not called: act.cu\n========= ERROR SUMMARY: 0 errors", False),
    ],
)
def test_only_a_silent_tool_is_clean(monkeypatch, capsys, status, printed, clean):
    def run(command, **named):
        assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
        return SimpleNamespace(returncode=status, stdout=printed)

    monkeypatch.setattr(program.subprocess, "run", run)
    report = program.run_tool("memcheck", "compute-sanitizer")
    assert (report == "") == clean
    assert re.match("memcheck: clean" if clean else "memcheck: NOT CLEAN", capsys.readouterr().out)
    assert clean or printed in report


def test_without_a_gpu_it_says_so():
    code = f"import sys; sys.modules['cupy'] = None; sys.argv = ['x']; exec(open({program.__file__!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "sanitize needs CuPy and a CUDA device\n")
