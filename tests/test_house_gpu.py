"""The rules of the GPU side (CONTRIBUTING.md, Kernels): what kernel files and launchers may hold, and twins for all."""

import ast
import importlib
import re

import pytest
from tree import CPU, FRONT, GPU, ROOT, calls_of, imports, name_of, signatures, sources

from cumoe.rawkernels import _compile

KERNELS = sorted(GPU.glob("*.cu"))
CUDA_SOURCES = sorted((*KERNELS, *GPU.glob("*.cuh")))
LAUNCHERS = sorted(GPU.glob("[!_]*.py"))

# what a kernel's first comment tells, beside its formula
TOLD = ("Shapes", "Work", "Numbers", "Launched")

# installed on machines with a GPU only; what compiles may import them where it compiles
CUDA_LIBRARIES = ("cupy", "cuda", "numba", "llvmlite")


def code_of(text):
    """The text without its comments, line for line."""
    return re.sub(r"//.*", "", re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL))


def faults(text):
    """Return what a CUDA source must not hold."""
    code, found = code_of(text), []
    for number, line in enumerate(code.splitlines(), 1):
        if re.match(r"\s*#\s*include\b", line) and not re.fullmatch(r'#include "[a-z0-9_]+\.cuh"\s*', line):
            found.append(f'{number}: only own headers, as in #include "memory.cuh"')
        if re.match(r"\s*#\s*define\s+\w+\(", line):
            found.append(f"{number}: a macro that is a function")
        if "__global__" in line and 'extern "C"' not in line:
            found.append(f'{number}: an entry point that is not extern "C"')
        if re.search(r"\b(printf|assert|malloc|new|throw)\b", line):
            found.append(f"{number}: not on the device")
        if re.search(r"\b__(expf|exp10f|logf|log2f|log10f|powf|sinf|cosf|tanf|fdividef)\b", line):
            found.append(f"{number}: an approximation without a bound")
    return found


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=name_of)
def test_a_cuda_source_keeps_the_rules(path):
    text = path.read_text()
    assert faults(text) == []
    assert text.startswith(f"// {path.name}: ")
    for header in re.findall(r'^#include "(.*)"', code_of(text), re.MULTILINE):
        assert (GPU / header).exists(), header


def starts_early(text):
    """Functions that let the next kernel start before they wait for the one before (overlap.cuh)."""
    parts = [part.partition("let_next_start();") for part in re.split(r"^}", code_of(text), flags=re.MULTILINE)]
    return [before.strip() for before, told, _ in parts if told and "wait_for_previous();" not in before]


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=name_of)
def test_a_kernel_waits_before_it_lets_the_next_one_start(path):
    assert starts_early(path.read_text()) == []


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_a_kernel_file_opens_with_what_it_does(path):
    comment = re.match(r"(?:(?://.*)?\n)*", path.read_text())[0]
    assert [word for word in TOLD if not re.search(rf"^// {word} ", comment, re.MULTILINE)] == []
    (launcher,) = set(re.findall(r"^// Launched +by (\w+\.py)", comment, re.MULTILINE))
    assert f'"{path.name}"' in (GPU / launcher).read_text()


def test_every_header_is_used():
    pasted = "".join(_compile.source(path.name) for path in KERNELS)
    assert [path.name for path in GPU.glob("*.cuh") if f'#line 1 "{path.name}"' not in pasted] == []


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_a_launcher_can_be_imported_without_cuda(path):
    early = [name for name, at_import in imports(ast.parse(path.read_text())) if at_import]
    assert [name for name in early if name.partition(".")[0] in CUDA_LIBRARIES] == []
    own = [name.split(".")[2] for name in early if name.startswith("cumoe.rawkernels.")]
    for module in own:
        more = [name for name, at_import in imports(ast.parse((GPU / f"{module}.py").read_text())) if at_import]
        assert [name for name in more if name.partition(".")[0] in CUDA_LIBRARIES] == [], module


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_a_launcher_lists_its_kernels(path):
    asked = {
        call.args[0].value
        for call in calls_of(ast.parse(path.read_text()))
        if ast.unparse(call.func) == "_load.kernel" and isinstance(call.args[0], ast.Constant)
    }
    if asked:
        listed = importlib.import_module(f"cumoe.rawkernels.{path.stem}").variants
        assert asked <= {file for file, _, _ in listed("sm_90a")}


# -- twins ------------------------------------------------------------------------------------------


def calls_of_rooms(source):
    """Yield (whether of either side, room, function) of every call into a side."""
    tree = ast.parse(source)
    named = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))  # a starred one takes several
            named |= {ast.unparse(target): room_of(value) for target, value in pairs if room_of(value)}
    for call in calls_of(tree):
        if isinstance(call.func, ast.Attribute):
            room = room_of(call.func.value) or named.get(ast.unparse(call.func.value))
            if room:
                yield *room, call.func.attr


def room_of(node):
    """Of an expression like ``_arrays.room(xp, "permute")`` whether it may be of either side, and the room; or None."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "_arrays.room":
        return ast.unparse(node.args[0]) != "np", node.args[1].value
    return None


CALLED = sorted({pair for path in sources(FRONT) for pair in calls_of_rooms(path.read_text())})


@pytest.mark.parametrize(("of_either", "room", "function"), CALLED)
def test_what_the_front_desk_calls_is_on_both_sides(of_either, room, function):
    files = [side / f"{room}.py" for side in (CPU, GPU)]
    cpu, gpu = (signatures(path.read_text()) if path.exists() else {} for path in files)
    assert function in cpu
    if of_either:
        assert function in gpu
        assert cpu[function] == gpu[function]


def test_both_launchers_of_the_products_take_what_the_room_hands_on():
    wgmma, mma = (signatures((GPU / f"_grouped_gemm_{name}.py").read_text())["launch"] for name in ("wgmma", "mma"))
    names, defaults = signatures((GPU / "grouped_gemm.py").read_text())["grouped_gemm"]
    own = ("expert_first_token_offset", "expanded")  # the room decodes, the launchers multiply
    assert wgmma == mma == ([name for name in names if name not in own], defaults)


# -- what runs on a GPU -----------------------------------------------------------------------------


def left_out(source, name, words):
    """Test functions that need a GPU although no word of their names or the file's chooses them."""
    needs = re.compile(r"\b(gpu|hopper)\(\)|importorskip\(.cupy")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    chosen = re.compile("|".join(words))
    return [one.name for one in functions if one.name.startswith("test_") and needs.search(ast.unparse(one))
            and not chosen.search(f"{name} {one.name}")]  # fmt: skip


def test_every_test_that_needs_a_gpu_is_run_on_one():
    (words,) = re.findall(r'-k "(.*?)"', (ROOT / "Makefile").read_text())
    words = words.split(" or ")
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text()
        assert "simulated_gpu" in text or left_out(text, path.stem, words) == [], path.name
    assert left_out("def test_a():\n    gpu()\ndef test_gpu_b():\n    gpu()\ndef test_c(): ...", "test_x", ["gpu"]) == [
        "test_a"
    ]


# -- the checks themselves --------------------------------------------------------------------------


def test_the_checks_see_what_they_must():
    assert faults('#include "memory.cuh"\n// #include <cuda.h>\n#define X float\nextern "C" __global__ void f();') == []
    bad = ["#include <cuda.h>", '#include "../x.cuh"', "#define F(x) x", "__global__ void f();", "x = __expf(y);"]
    assert [len(faults(line)) for line in bad] == [1] * len(bad)
    assert faults("/* a\nb */\nprintf();") == ["3: not on the device"]
    waits = "void f()\n{\n    wait_for_previous();\n    let_next_start();\n}\n"
    assert starts_early(waits) == []
    assert starts_early(waits + "void g()\n{\n    let_next_start();\n    wait_for_previous();\n}\n") == ["void g()\n{"]
    assert len(CALLED) >= 20
    assert (True, "route", "fused_topk") in CALLED
    assert (True, "permute", "sort_by_expert") in CALLED
    source = 'xp, here = 1, _arrays.room(xp, "a")\nhere.f(1)\n_arrays.room(xp, "b").g()\nother.h()'
    assert set(calls_of_rooms(source)) == {(True, "a", "f"), (True, "b", "g")}
