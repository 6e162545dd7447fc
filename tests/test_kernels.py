"""
Every kernel compiles for every architecture, with no GPU: no spills, no local memory, no remark of the assembler,
and the machine instructions that make it what it is.

The launchers say which constants they use (`variants`). What is compiled for Hopper is a choice in which every two
values of two constants that occur together do; for the others each value of each constant occurs, or for near relatives
each entry point. Cubins are kept in
build/kernels.
"""

import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="cuda-core is not installed (extra `compile`)")

from cumoe.rawkernels import _compile, _variants

ROOT = Path(__file__).parents[1]
GPU, KEPT = ROOT / "rawkernels", ROOT / "build" / "kernels"
COMPLETE = "sm_90a"
RELATED = ("sm_86", "sm_89", "sm_120a")  # to sm_80 and sm_100a: the same instructions

WIDE = ("LDG.E.128", "STG.E.128")
WARP_MAX = "C?REDUX.MAX"  # one instruction over the warp
ADD_UP = "SHFL.BFLY"
COPIES = {16: ("LDGSTS.E.BYPASS.128",), 8: ("LDGSTS.E.64",), 4: ("LDGSTS.E",), 2: ()}  # to shared memory, by bytes


def mma(entry, c):
    """Tensor cores: 16 x 8 x 16 halves or 16 x 8 x 8 tf32 at once."""
    return ("HMMA.1688.F32.TF32" if c["X"] == "float32" else "HMMA.16816.F32", "LDSM.16.M88.4", *COPIES[c["COPY_X"]])


def wgmma(entry, c):
    """Tensor cores of Hopper, the bulk copy engine, its barriers, results turned round on their way out."""
    found = ("HGMMA", "UTMALDG.5D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "STSM", "STG.E.128")
    found += ("LDGSTS.E.128",) if c["GATHERED"] else ("UTMALDG.2D",)
    return found + (("USETMAXREG",) if c["CONSUMER_REGISTERS"] else ())


def extremes(entry, c):
    """Wide loads, one instruction over a warp, and an addition in memory where blocks share a group."""
    over_team = () if c["TEAM"] == 1 else (WARP_MAX,) if c["TEAM"] >= 32 else (ADD_UP,)
    return (*(("LDG.E.128",) if c["WIDTH"] > 1 else ()), *over_team, "REDG?.E.MAX|ATOMG?.E.MAX")


def rows(entry, c):
    """Wide loads and stores, and one instruction over a warp."""
    over_team = () if c["GIVEN"] or c["TEAM"] == 1 else (WARP_MAX,) if c["TEAM"] >= 32 else (ADD_UP,)
    return (*(WIDE if c["WIDTH"] > 1 else ()), *over_team)


# file -> (entry point, constants) -> what must be among its instructions
INSTRUCTIONS = {
    "_copy_kernels.py": lambda entry, c: WIDE if c["UNIT"] == "bytes16" else (),
    "_few_kernels.py": lambda entry, c: ("MATCH.ANY", "REDUX.OR", "SHFL.IDX"),
    "_layout_kernels.py": lambda entry, c: ("MATCH.ANY",) if entry == "count_tokens" else (),
    "_sort_kernels.py": lambda entry, c: ("MATCH.ANY",),
    "_tile_kernels.py": lambda entry, c: ("REDUX.SUM", "SHFL.UP", "STG.E.128"),
    "_wide_kernels.py": lambda entry, c: (),
    "act.cu": lambda entry, c: WIDE if c["BYTES"] == 16 else (),
    "dense_route.cu": lambda entry, c: (WARP_MAX,) if entry == "topk_from_dense" else (),
    "format_decode.cu": lambda entry, c: ("STG.E.128",) if c["WIDTH"] == 16 else (),
    "format_encode.cu": lambda entry, c: ("LDG.E.128",) if c["WIDTH"] == 16 else (),
    "format_extremes.cu": extremes,
    "format_rows.cu": rows,
    "format_scales.cu": lambda entry, c: (),
    "grouped_gemm_fma.cu": lambda entry, c: ("FFMA", *COPIES[c["COPY_X"]]),
    "grouped_gemm_mma.cu": mma,
    "grouped_gemm_wgmma.cu": wgmma,
    "grouped_route.cu": lambda entry, c: (WARP_MAX, ADD_UP),
    "route.cu": lambda entry, c: (WARP_MAX, ADD_UP),
    "special_experts.cu": lambda entry, c: (),
    "unpermute.cu": lambda entry, c: (*WIDE, "SHFL.IDX"),
}

# file -> why its kernels may use the stack
STACK = {}


def covering(variants, together=1):
    """Choose few variants in which each entry point of each file occurs, and all values of `together` constants."""
    told = [
        {(one.file, entry, *values) for entry in one.entries for values in combinations(one.constants, count)}
        for one in variants
        for count in (min(together, len(one.constants)),)
    ]
    left, chosen = set().union(*told), []
    while left:
        best = max(range(len(told)), key=lambda i: len(told[i] & left))  # the first of equal ones
        left -= told[best]
        chosen.append(variants[best])
    return chosen


def cases(most=""):
    """One case an architecture and variant: the largest choice for the architecture `most`, a smaller for others."""
    for arch in _compile.ARCHITECTURES:
        variants = _variants.default(arch)
        for variant in covering(variants, 2 if arch == most else 0 if arch in RELATED else 1):
            yield pytest.param(arch, variant, id=f"{arch} {variant}")


CASES, LOOKED_AT = list(cases(COMPLETE)), list(cases())


def disassembler():
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    found = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if found is None:
        pytest.skip("nvdisasm is not installed (extra `compile`)")
    return found


def instructions(code, folder):
    """Entry point -> whole names of its machine instructions, as in {"HMMA.16816.F32", "EXIT"}."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    text = subprocess.run([disassembler(), "-c", path], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
        found[part.partition(":")[0]] = set(re.findall(line, part, re.MULTILINE))
    assert all(has(names, "EXIT|RET") for names in found.values()), text[:2000]
    return found


def has(found, pattern):
    """Tell whether an instruction is there, in any of its forms."""
    return any(re.match(rf"(?:{pattern})(\.|$)", name) for name in found)


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_a_kernel_lies_in_registers(arch, variant):
    done = _variants.compiled(variant, arch, KEPT)
    used = _variants.usage(done.log)
    assert set(variant.entries) <= used.keys()
    assert _variants.remarks(done.log) == []
    for name, usage in used.items():
        assert usage.spill_bytes == 0, name
        assert usage.stack_bytes == 0 or variant.file in STACK, name
        assert 1 <= usage.registers <= 255


@pytest.mark.parametrize(("arch", "variant"), LOOKED_AT)
def test_a_kernel_has_the_right_instructions(arch, variant, tmp_path):
    found = instructions(_variants.compiled(variant, arch, KEPT).code, tmp_path)
    for entry in variant.entries:
        wanted = [*INSTRUCTIONS[variant.file](entry, dict(variant.constants))]
        if int(re.sub(r"\D", "", arch)) >= 90:
            wanted.append("ACQBULK")  # wait_for_previous
        assert [name for name in wanted if not has(found[entry], name)] == [], entry
        if variant.file not in STACK:
            assert [name for name in ("LDL", "STL") if has(found[entry], name)] == [], entry


def test_every_kernel_file_is_listed():
    files = {path.name for pattern in ("*.cu", "_*_kernels.py") for path in GPU.glob(pattern)}
    for arch in _compile.ARCHITECTURES:
        assert {variant.file for variant in _variants.default(arch)} <= files
    assert {variant.file for variant in _variants.default(COMPLETE)} == files
    assert INSTRUCTIONS.keys() == files
    assert STACK.keys() <= files


def test_every_entry_point_is_listed():
    for path in GPU.glob("*.cu"):
        text = re.sub(r"//.*", "", _compile.source(path.name))
        written = set(re.findall(r"__global__[^;{]*?\bvoid\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", text))
        listed = {
            entry for variant in _variants.default(COMPLETE) if variant.file == path.name for entry in variant.entries
        }
        assert written == listed, path.name


# -- the checks themselves --------------------------------------------------------------------------

BAD = """
extern "C" __global__ void spills(float *x)
{
    float kept[200];
    for (int i = 0; i < 200; ++i) kept[i] = x[i * 32 + threadIdx.x];
    x[threadIdx.x] *= kept[(int)x[3]];
}
"""


def test_the_checks_see_the_stack_and_remarks(tmp_path):
    code, log = _compile.compile_text("bad.cu", BAD, "sm_90a", ())
    assert _variants.usage(log)["spills"].stack_bytes == 800
    assert has(instructions(code, tmp_path)["spills"], "LDL")
    assert not has({"LDLX", "XLDL"}, "LDL")
    assert has({"LDG.E.128.CONSTANT"}, "LDG.E.128")
    assert _variants.remarks(log) == []
    serialized = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert _variants.remarks(f"{log}\n{serialized}\n") == [serialized]
    unused = 'extern "C" __global__ void f() { int unused; }'
    assert "#177-D" in _variants.remarks(_compile.compile_text("bad.cu", unused, "sm_90a", ())[1])[0]


def test_a_choice_covers_every_value():
    def variant(entry, **constants):
        return _variants.Variant("a.cu", (entry,), tuple(sorted(constants.items())))

    listed = [variant("f", A=a, B=b) for a in (1, 2, 3) for b in (1, 2)] + [variant("g", A=1, B=1)]
    assert covering(listed) == [listed[0], listed[3], listed[6], listed[4]]
    assert covering(listed, 0) == [listed[0], listed[6]]
    assert covering(listed, 2) == listed
    assert covering([]) == []


def test_variants_of_other_dtypes_are_left_out(monkeypatch):
    listed = [("a.cu", "f", {"X": "bfloat16"}), ("a.cu", "f", {"X": "float32", "Y": "float16"}), ("a.cu", "f", {})]
    listed += [("a.cu", "g", {"X": "bfloat16"}), ("a.cu", "f", {"X": "bfloat16"})]
    listed += [("a.py", "f", {"X": "float16"}), ("a.py", "g", {"X": "float16"})]
    module = type("Launcher", (), {"variants": staticmethod(lambda arch: listed)})
    monkeypatch.setattr(_variants.pkgutil, "iter_modules", lambda path: [type("M", (), {"name": "launcher"})])
    monkeypatch.setattr(_variants._numba, "variants", lambda: ())
    monkeypatch.setattr(_variants.importlib, "import_module", lambda name: module)
    only = _variants.default("sm_90a", ("bfloat16",))
    assert [(one.entries, dict(one.constants)) for one in only] == [(("f", "g"), {"X": "bfloat16"}), (("f",), {})]
    assert len(_variants.default("sm_90a")) == 5  # those of a.py are compiled one by one
    assert str(only[0]) == "a.cu f g X=bfloat16"
