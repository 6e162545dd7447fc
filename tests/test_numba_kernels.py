"""
Kernels written in Python: each compiles for every architecture with no GPU, without spills, into the instructions
that make it fast; a compiled one is found again without Numba; and the simulated GPU sees what it must.
"""

import ast
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import simulated_gpu
from sides import assert_equal
from tree import GPU, ROOT

from cumoe.rawkernels import _compile, _numba, _variants, permute
from cumoe.reference import permute as reference

KEPT = ROOT / "build" / "kernels"
COMPLETE = "sm_90a"

# kernel -> what must be among its machine instructions
WARP = ("MATCH.ANY", "POPC")
INSTRUCTIONS = {
    "sort_few": (*WARP, "SHFL.IDX", "REDUX", "STG.E.128"),
    "count_pairs": (*WARP, "ATOMS", "BAR"),
    "sort_pairs": (*WARP, "SHFL.UP", "REDUX", "STG.E.128", "BAR"),
    "list_tiles": ("SHFL.UP", "REDUX", "STG.E.128", "BAR"),
    "count_tokens": WARP,
    "copy_rows": (),
}


needs_compiler = pytest.mark.skipif(
    None in (find_spec("numba_cuda"), find_spec("cuda")), reason="numba-cuda or cuda-core is missing (extra `compile`)"
)


def cases():
    """All variants for Hopper, one of each kernel for the others."""
    for arch in _compile.ARCHITECTURES:
        seen = set()
        for file, name, constants in _numba.variants():
            if arch == COMPLETE or name not in seen:
                chosen = " ".join(f"{key}={value}" for key, value in constants.items())
                yield pytest.param(arch, file, name, constants, id=f"{arch} {name} {chosen}")
            seen.add(name)


def instructions(code, folder):
    """Whole names of the machine instructions of a cubin."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    disassembler = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if disassembler is None:
        pytest.skip("nvdisasm is not installed (extra `compile`)")
    (folder / "kernel.cubin").write_bytes(code)
    command = [disassembler, "-c", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE))


@pytest.mark.parametrize(("arch", "file", "name", "constants"), list(cases()))
@needs_compiler
def test_a_kernel_is_compiled_into_registers_and_the_right_instructions(arch, file, name, constants, tmp_path):
    done = _numba.compiled(file, name, arch, constants, KEPT)
    used = _variants.usage(done.log)
    assert used.keys() == {name}
    assert (used[name].stack_bytes, used[name].spill_bytes) == (0, 0)
    assert used[name].registers <= 64  # a block of 1024 threads takes no more
    assert _variants.remarks(done.log) == []
    found = instructions(done.code, tmp_path)
    number, wanted = int(re.sub(r"\D", "", arch)), [*INSTRUCTIONS.get(name, ())]
    if number >= 90:
        wanted += ["ACQBULK", "PREEXIT"]  # wait_for_previous, let_next_start
    if constants.get("UNIT") == "bytes16":
        wanted += ["LDG.E.128", "STG.E.128"]
    assert [one for one in wanted if not any(f"{what}.".startswith(f"{one}.") for what in found)] == []
    unwanted = ("LDL", "STL", "CALL") if number >= 90 else ("LDL", "STL")  # older ones call for parts of a warp
    assert not [what for what in found if what.startswith(unwanted)]


def test_every_kernel_and_every_constant_is_listed():
    """What the launchers name, and what is in the kernel files, is what `variants` gives."""
    listed = {(file, name) for file, name, _ in _numba.variants()}
    written, asked = set(), set()
    for path in GPU.glob("_*_kernels.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        written |= {(path.name, one.name) for one in functions if not one.decorator_list}
    assert written == listed
    for path in GPU.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "_numba.kernel":
                file = ast.literal_eval(call.args[0])
                asked |= {(file, name) for name in names_in(call.args[1], path)}
    assert asked == listed


def names_in(node, path):
    """The kernels that an argument names; a variable stands for what ``_kernel(name, ...)`` is given."""
    if isinstance(node, ast.Constant):
        return {node.value}
    calls = re.findall(r'\b_kernel\("(\w+)"', path.read_text())
    assert calls and node.id == "name"
    return set(calls)


# -- the disk ---------------------------------------------------------------------------------------


def run(code, *arguments):
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_compiler
def test_a_compiled_kernel_is_read_without_numba(tmp_path):
    code = (
        "import sys; from cumoe.rawkernels import _numba;"
        "done = _numba.compiled('_layout_kernels.py', 'pad_rows', 'sm_90a', {}, sys.argv[1]);"
        "print(done.how.replace(' ', '-'), len(done.code), 'numba' in sys.modules, 'llvmlite' in sys.modules)"
    )
    how, size, *loaded = run(code, tmp_path)
    assert (how, loaded) == ("compiled", ["True", "True"])
    assert run(code, tmp_path) == ["on-disk", size, "False", "False"]


@needs_compiler
def test_a_kernel_is_compiled_where_numpy_has_no_row_stack(tmp_path):
    code = (
        "import sys, warnings, numpy as np; vars(np).pop('row_stack', None);"
        "from cumoe.rawkernels import _numba;"
        "done = _numba.compiled('_layout_kernels.py', 'pad_rows', 'sm_90a', {}, sys.argv[1]);"
        "print(len(done.code) > 1000, hasattr(np, 'row_stack'))"
    )
    assert run(code, tmp_path) == ["True", "False"]


def test_what_a_stored_kernel_depends_on(tmp_path, monkeypatch):
    made = []

    def build(file, name, arch, constants):
        made.append((file, name, arch, constants))
        return b"log\0code"

    monkeypatch.setattr(_numba, "build", build)
    monkeypatch.setattr(_numba, "versions", lambda: "numba-cuda-1-nvrtc-2")
    calls = [("a.py", "f", "sm_90a", {"A": 1}), ("a.py", "g", "sm_90a", {"A": 1})]
    calls += [("a.py", "f", "sm_80", {"A": 1}), ("a.py", "f", "sm_90a", {"A": 2})]
    for _ in range(2):
        for call in calls:
            done = _numba.compiled(*call, tmp_path)
            assert (done.code, done.log) == (b"code", "log")
    assert made == calls
    monkeypatch.setattr(_numba, "_sources", lambda: "other text")
    _numba.compiled(*calls[0], tmp_path)
    monkeypatch.setattr(_numba, "versions", lambda: "numba-cuda-2-nvrtc-2")
    _numba.compiled(*calls[0], tmp_path)
    monkeypatch.setattr(_numba, "versions", lambda: None)  # nothing is installed: the work of any compiler will do
    _numba.compiled(*calls[0], tmp_path)
    assert made[len(calls) :] == [calls[0]] * 2
    monkeypatch.undo()
    for path in (*GPU.glob("_*_kernels.py"), GPU / "_device.py", GPU / "_numba.py"):
        assert path.read_text() in _numba._sources()


# -- what the simulated GPU sees --------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch):
    """A function that runs a kernel of one array of int32 in two blocks of two warps."""
    simulated_gpu.install(monkeypatch)
    device = sys.modules["cumoe.rawkernels._device"]

    def run(body):
        scope = dict(vars(device))
        exec(f"def kernel(x: Int32s):\n    i = cuda.threadIdx.x\n    {body}\n", scope)
        module = ModuleType("cumoe.rawkernels._bad_kernels")
        module.kernel = scope["kernel"]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(simulated_gpu, "PATIENCE_S", 0.5)
        x = simulated_gpu.asarray(np.zeros(128, np.int32))
        simulated_gpu.Kernel("_bad_kernels.py", "kernel", {})(2, 64, x, overlap=True)
        return x

    return run


def test_the_simulator_runs_a_right_kernel(simulated):
    x = simulated("wait_for_previous(); x[64 * cuda.blockIdx.x + i] = same_in_warp(i // 8)")
    np.testing.assert_array_equal(x.view(np.uint32), np.repeat(0xFF << (8 * np.arange(4)), 8).tolist() * 4)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("x[64 * cuda.blockIdx.x + i] = 1", "before wait_for_previous"),
        ("pass", "ends before wait_for_previous"),
        ("let_next_start(); wait_for_previous()", "let_next_start before wait_for_previous"),
        ("wait_for_previous(); x[128]", "128 of 128"),
        ("wait_for_previous(); x[i - 1]", "-1 of 128"),
        ("wait_for_previous(); x[0] = 1", "race for one element"),
        ("wait_for_previous(); x[64 * cuda.blockIdx.x] if i else x.__setitem__(64 * cuda.blockIdx.x, 1)", "race"),
        ("wait_for_previous(); x[i] = 1", "race"),  # two blocks
        ("wait_for_previous(); add_to(x, 0, 1); x[0]", "race"),
        ("wait_for_previous(); i > 3 and same_in_warp(i)", "BrokenBarrier"),  # lanes that do not meet
        ("wait_for_previous(); i > 40 and cuda.syncthreads()", "BrokenBarrier"),
    ],
)
def test_the_simulator_refuses_a_wrong_kernel(simulated, body, error):
    with pytest.raises((AssertionError, IndexError, threading.BrokenBarrierError)) as caught:
        simulated(body)
    assert error in repr(caught.value)


def test_the_simulator_knows_barriers_from_none(simulated):
    share = (
        "s = cuda.shared.array(64, 'int32'); wait_for_previous(); s[i] = i; {}; x[64 * cuda.blockIdx.x + i] = s[i ^ {}]"
    )
    for barrier, other in (("cuda.syncthreads()", 63), ("sync_warp()", 31)):
        simulated(share.format(barrier, other))
    for barrier, other in (("sync_warp()", 63), ("same_in_warp(0)", 31), ("pass", 1)):
        with pytest.raises(AssertionError, match="race"):
            simulated(share.format(barrier, other))


# -- what keeps the sorting kernels right -----------------------------------------------------------


def barriers():
    """Every line of the sorting kernels that waits for other threads."""
    for file in ("_sort_kernels.py", "_tile_kernels.py"):
        for number, line in enumerate((GPU / file).read_text().splitlines()):
            if re.match(r"\s+(sync_warp|cuda\.syncthreads)\(\)", line):
                yield pytest.param(file, number, id=f"{file}:{number + 1}")


def sort(cupy, num_pairs, num_experts):
    ids = np.random.default_rng(0).integers(-1, num_experts + 1, (num_pairs, 1)).astype(np.int32)
    outputs = [
        cupy.empty(num_experts + 1, np.int64),
        cupy.empty(num_pairs, np.int32),
        cupy.empty((num_pairs, 1), np.int32),
    ]
    permute.sort_by_expert(cupy.asarray(ids), cupy.asarray(np.empty(0, np.int32)), *outputs)
    assert_equal(outputs, reference.sort_by_expert(ids, num_experts))


@pytest.mark.parametrize(("file", "number"), list(barriers()))
def test_every_barrier_is_needed(monkeypatch, file, number):
    """Sorting goes wrong without it: two threads race, or the simulator would not see it if they did."""
    cupy = simulated_gpu.install(monkeypatch)
    for name, value in {"_MOST_THREADS": 64, "_ROUNDS": 2, "_MOST_BLOCKS": 3}.items():
        monkeypatch.setattr(permute, name, value)
    permute.plan_sort.cache_clear()
    sizes = ((120, 5), (300, 80))
    try:
        for size in sizes:
            sort(cupy, *size)
        for name in ("_tile_kernels.py", "_sort_kernels.py"):  # the second has functions of the first
            lines = (GPU / name).read_text().splitlines()
            if name == file:
                lines[number] = re.sub(r"\S.*", "pass", lines[number])
            exec("\n".join(lines), vars(sys.modules[f"cumoe.rawkernels.{name[:-3]}"]))
        with pytest.raises(AssertionError, match="race for one element"):
            for size in sizes:
                sort(cupy, *size)
    finally:
        permute.plan_sort.cache_clear()
