"""`cumoe compile`: what it builds, where it puts it, what it prints, and how it ends."""

import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.core", reason="cuda-core is not installed (extra `compile`)")

from cumoe import _compile_command, cli
from cumoe.rawkernels import _cache, _compile, _load, _variants

KERNEL = 'extern "C" __global__ void scale(X *x) { x[threadIdx.x] = x[threadIdx.x] * FACTOR; }\n'
KINDS = {"float32": "float", "float16": "unsigned short"}


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Three small kernels in place of the real ones, and an empty cache."""
    (tmp_path / "scale.cu").write_text("using float32 = float;\nusing float16 = unsigned short;\n" + KERNEL)
    listed = [("scale.cu", "scale", {"X": kind, "FACTOR": 3}) for kind in KINDS]
    listed.append(("scale.cu", "scale", {"X": "int", "FACTOR": 5}))
    launcher = type("Launcher", (), {"variants": staticmethod(lambda arch: listed)})
    monkeypatch.setattr(_compile, "_HERE", tmp_path)
    monkeypatch.setattr(_variants.pkgutil, "iter_modules", lambda path: [type("M", (), {"name": "launcher"})])
    monkeypatch.setattr(_variants._numba, "variants", lambda: ())
    monkeypatch.setattr(_variants.importlib, "import_module", lambda name: launcher)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    _compile.source.cache_clear()
    yield tmp_path
    _compile.source.cache_clear()


def rows(text):
    """Lines of the table, as lists of cells."""
    found = [[cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in text.splitlines()]
    return [cells for cells in found if len(cells) == 7]


def build(*more, arch=("sm_90a",)):
    return cli.main(["compile", "--arch", *arch, "--jobs", "1", *map(str, more)])


def test_the_cache_is_filled_once(kernels, capsys):
    assert build() == 0
    text = capsys.readouterr().out
    table = rows(text)
    assert [(file, constants, arch, how) for file, constants, arch, _, _, _, how in table] == [
        ("scale.cu", "FACTOR=3 X=float32", "sm_90a", "compiled"),
        ("scale.cu", "FACTOR=3 X=float16", "sm_90a", "compiled"),
        ("scale.cu", "FACTOR=5 X=int", "sm_90a", "compiled"),
    ]
    assert all(0 < int(registers) < 32 and spills == "0" for _, _, _, registers, spills, _, _ in table)
    assert f"3 kernels in {kernels / 'cache' / 'cumoe'}" in text
    assert f"used by machines with {_compile.nvrtc_version()} or without NVRTC" in text
    assert len(list((kernels / "cache" / "cumoe").glob("scale-sm_90a.*.cubin"))) == 3
    assert build() == 0
    assert [row[-1] for row in rows(capsys.readouterr().out)] == ["on disk"] * 3
    done = _compile.compiled("scale.cu", "sm_90a", {"X": "int", "FACTOR": 5})
    assert done.how == _cache.READ


def test_a_folder_to_carry(kernels, capsys, monkeypatch):
    carried = kernels / "carried"
    assert build("--output", carried, arch=("sm_80", "sm_120a")) == 0
    text = capsys.readouterr().out
    assert f"CUPY_CACHE_DIR={carried}" in text
    assert [row[2] for row in rows(text)] == ["sm_80"] * 3 + ["sm_120a"] * 3
    assert not (kernels / "cache").exists()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(carried))
    monkeypatch.setattr(_compile, "nvrtc_version", lambda: None)  # a machine without a compiler
    assert _compile.compiled("scale.cu", "sm_80", {"X": "float32", "FACTOR": 3}).how == _cache.READ


def test_kernels_of_other_dtypes_are_left_out(kernels, capsys):
    assert build("--dtypes", "float16") == 0
    assert [row[1] for row in rows(capsys.readouterr().out)] == ["FACTOR=3 X=float16", "FACTOR=5 X=int"]


def test_a_damaged_entry_is_compiled_again_and_said(kernels, capsys):
    build()
    entry = sorted((kernels / "cache").rglob("*.cubin"))[1]
    entry.write_bytes(entry.read_bytes()[:-1])
    capsys.readouterr()
    assert build() == 0
    assert sorted(row[-1] for row in rows(capsys.readouterr().out)) == [_cache.REBUILT, "on disk", "on disk"]


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_built(kernels, capsys):
    (kernels / "scale.cu").write_text(f"using float32 = float;\n{KERNEL}")
    assert build() == 1
    text = capsys.readouterr().out
    assert [row[-1] for row in rows(text)] == ["compiled", "failed", "compiled"]
    assert "scale.cu scale FACTOR=3 X=float16 for sm_90a: " in text
    assert 'identifier "float16" is undefined' in text
    assert "1 kernels failed" in text
    assert len(list((kernels / "cache").rglob("*.cubin"))) == 2


def test_what_cannot_be_written_fails(kernels, capsys, monkeypatch):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "replace", refuse)
    assert build() == 1
    assert "compiled, but it could not be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "must be sm_80 or later, as in sm_90a, got 'sm_70'"),
        (["--arch", "hopper"], "must be sm_80 or later, as in sm_90a, got 'hopper'"),
        (["--arch", "sm_80", "--jobs", "0"], "must be >= 1, got 0"),
        (["--arch", "sm_80", "--dtypes", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compile", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_named(kernels, capsys):
    (kernels / "file").touch()
    assert build("--output", kernels / "file") == 2
    assert "file" in capsys.readouterr().err


def test_without_a_gpu_the_architecture_must_be_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # its import fails
    assert cli.main(["compile"]) == 2
    assert "arch must be named where there is no GPU: some of sm_80, " in capsys.readouterr().err


def test_without_a_compiler_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(_compile, "nvrtc_version", lambda: None)
    assert build() == 2
    assert capsys.readouterr().err == "cumoe compile: compiling needs NVRTC: pip install 'cumoe[compile]'\n"


def test_the_architectures_of_this_machines_gpus():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    found = _compile_command.present_architectures()
    assert [re.fullmatch(r"sm_\d+a?", arch) is not None for arch in found] == [True] * len(found)


def test_a_gpu_that_is_too_old_says_so(monkeypatch, capsys):
    runtime = SimpleNamespace(getDeviceCount=lambda: 1)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(_load, "capability", lambda device=None: 75)
    assert cli.main(["compile"]) == 2
    assert capsys.readouterr().err == "cumoe compile: the kernels need compute capability 8.0, the device has 7.5\n"


def test_real_kernels_are_built_in_parallel(tmp_path, monkeypatch, capsys):
    some = _variants.default("sm_80")[:3]
    monkeypatch.setattr(_variants, "default", lambda arch, dtypes: some)
    assert cli.main(["compile", "--arch", "sm_80", "--output", str(tmp_path), "--jobs", "2"]) == 0
    assert [row[-1] for row in rows(capsys.readouterr().out) if row[0]] == ["compiled"] * len(some)
    assert all(_variants.compiled(variant, "sm_80", tmp_path).how == _cache.READ for variant in some)
