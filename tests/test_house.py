"""The rules of the house (CONTRIBUTING.md) themselves: doors, twins, sizes, names, docstrings."""

import ast
import configparser
import doctest
import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc
from numpydoc.validate import validate
from sides import gpu
from tree import CPU, FRONT, GPU, REFERENCE, ROOT, calls_of, imports, name_of, signatures, sources, written_files

import cumoe

# rooms may be called together only here: file -> what it tells
COMPOSERS = {"_moe": "the whole layer", "_batched": "the layer on batched activations"}

# what may print and import freely: they run, nobody imports them
PROGRAMS = {"cli", "__main__", "_info", "_demo", "_compile_command", "bench"}

# imported inside functions only, by those who need them
OPTIONAL = {"cupy", "matplotlib", "IPython", "mpi4py"}

# files beyond the limit: path -> why it is still one topic
LONG_FILES: dict[str, str] = {}

NUMPYDOC_CHECKS = {
    *("GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL08", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS06"),
    *("PR01", "PR02", "PR03", "PR07", "PR10"),
    *("RT01", "YD01"),
}


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def words(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def front_desk():
    return [path for path in sources(FRONT) if REFERENCE not in path.parents]


def is_program(path):
    return bool(PROGRAMS & {path.stem, *path.relative_to(ROOT).parts})


# -- doors: who imports whom ------------------------------------------------------------------------


def foreign_imports(source, libraries, own):
    """Return the imports of a side's file outside the standard library, `libraries` and the packages `own`."""
    wrong = []
    for name, _ in imports(ast.parse(source)):
        root = name.partition(".")[0]
        if not (root in sys.stdlib_module_names or root in libraries or name.startswith(own)):
            wrong.append(name)
    return wrong


def front_desk_imports(source, base):
    """Return the imports that would slow `import cumoe` down or go around the door `_arrays.room`."""
    wrong = []
    for name, at_import in imports(ast.parse(source)):
        root = name.partition(".")[0]
        light = root in sys.stdlib_module_names or root in ("numpy", "ml_dtypes")
        own = root == "cumoe" and not name.startswith(("cumoe.cpu", "cumoe.rawkernels"))
        later = not at_import and root in {*base, *OPTIONAL} - {"numba"}
        if not (light or own or later):
            wrong.append(name)
    return wrong


def test_cpu_imports_no_front_desk():
    for path in sources(CPU):
        assert foreign_imports(path.read_text(), {"numba", "llvmlite", "numpy", "ml_dtypes"}, ("cumoe.cpu",)) == [], (
            path
        )


def test_rawkernels_import_no_front_desk():
    for path in sources(GPU):
        libraries = {"cupy", "cuda", "numba", "llvmlite", "numpy", "ml_dtypes"}
        assert foreign_imports(path.read_text(), libraries, ("cumoe.rawkernels",)) == [], path


def test_the_reference_imports_nothing_but_numpy():
    for path in sources(REFERENCE):
        assert foreign_imports(path.read_text(), {"numpy", "ml_dtypes"}, ("cumoe.reference",)) == [], path


def test_the_front_desk_goes_through_the_door():
    base = {re.split(r"[<>=;\s]", line)[0] for line in words(setup_cfg()["options"]["install_requires"])}
    for path in front_desk():
        if not is_program(path):
            assert front_desk_imports(path.read_text(), base) == [], path


def test_rooms_do_not_import_each_other():
    built = {path.stem for folder in (CPU, GPU) for path in sources(folder)}
    rooms = {path.stem for path in FRONT.glob("_*.py") if path.stem[1:] in built} - set(COMPOSERS)
    assert rooms
    forbidden = tuple(f"cumoe.{room}" for room in {*rooms, *COMPOSERS})
    for room in rooms:
        own = f"cumoe.{room}"
        names = [name for name, _ in imports(ast.parse((FRONT / f"{room}.py").read_text()))]
        assert [
            name for name in names if f"{name}.".startswith(tuple(f"{one}." for one in forbidden if one != own))
        ] == []


def test_the_checks_of_imports_see_what_they_must():
    assert foreign_imports("from cumoe import _check", {"numba"}, ("cumoe.cpu",)) == ["cumoe._check"]
    assert foreign_imports("def f():\n    import cupy", {"numba"}, ("cumoe.cpu",)) == ["cupy"]
    assert foreign_imports("from . import bits", {"numba"}, ("cumoe.cpu",)) == ["..bits"]
    assert foreign_imports("import math, numba\nfrom cumoe.cpu import bits", {"numba"}, ("cumoe.cpu",)) == []
    assert front_desk_imports("import numba", {"numba"}) == ["numba"]
    assert front_desk_imports("def f():\n    from cumoe.cpu import act", {"numba"}) == ["cumoe.cpu.act"]
    assert front_desk_imports("if x:\n    import rich", {"rich"}) == ["rich"]
    assert front_desk_imports("def f():\n    import rich, cupy", {"rich"}) == []
    assert front_desk_imports("if TYPE_CHECKING:\n    import cupy", set()) == []


def test_import_is_light():
    code = (
        "import sys, time, numpy, ml_dtypes; before = set(sys.modules); start = time.perf_counter(); import cumoe;"
        "print(time.perf_counter() - start, *sorted(set(sys.modules) - before))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    new = {name.partition(".")[0] for name in runs[0][1:]} - set(sys.stdlib_module_names)
    assert new == {"cumoe"}  # so neither numba nor cupy, nor anything else
    time_ms = 1000 * statistics.median(float(run[0]) for run in runs)
    print(f"import cumoe, beyond numpy and ml_dtypes: {time_ms:.1f} ms")


# -- twins: both sides of a room --------------------------------------------------------------------


def unlike_twins(cpu, gpu):
    """Return the functions that both sources have, with different arguments."""
    here, there = signatures(cpu), signatures(gpu)
    return [name for name in here.keys() & there.keys() if here[name] != there[name]]


def test_twins_have_equal_signatures():
    for path in GPU.glob("[!_]*.py"):
        twin = CPU / path.name
        assert twin.exists(), f"{name_of(path)} has no twin"
        assert unlike_twins(twin.read_text(), path.read_text()) == [], path
        assert signatures(twin.read_text()).keys() & signatures(path.read_text()).keys(), path


def test_the_check_of_twins_sees_what_it_must():
    assert unlike_twins("def f(a, out): ...", "def f(a, out): ...\ndef g(): ...") == []
    assert unlike_twins("def f(a, out): ...", "def f(x, out): ...") == ["f"]
    assert unlike_twins("def f(a, n=1): ...", "def f(a, n=2): ...") == ["f"]


# -- the text of every file -------------------------------------------------------------------------


def compiled_elsewhere(source):
    """Return the names of Numba's own compilers in a source: loops go through `_jit.jit`."""
    compilers = {"njit", "vectorize", "guvectorize", "cfunc", "stencil", "generated_jit", "jitclass"}
    tree = ast.parse(source)
    wrong = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in compilers]
    wrong += [name for name, _ in imports(tree) if name.startswith("numba") and name.rpartition(".")[2] in compilers]
    wrong += [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "jit" and ast.unparse(node.value) == "numba"
    ]
    return wrong + [name for name, _ in imports(tree) if name == "numba.jit"]


def loose_arithmetic(source):
    """Return what would let a compiler reorder float sums."""
    tree = ast.parse(source)
    wrong = [keyword.arg for call in calls_of(tree) for keyword in call.keywords if keyword.arg == "fastmath"]
    flags = {"fast", "reassoc", "--use_fast_math", "-use_fast_math"}
    return wrong + [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in flags]


def test_every_cpu_loop_is_compiled_by_jit():
    for path in sources(CPU):
        if path.name != "_jit.py":
            assert compiled_elsewhere(path.read_text()) == [], path


def test_sums_are_never_reordered():
    for path in (*sources(CPU), *sources(GPU)):
        assert loose_arithmetic(path.read_text()) == [], path
    for path in (*GPU.glob("*.cu"), *GPU.glob("*.cuh")):
        assert "fast_math" not in path.read_text(), path


def test_the_checks_of_loops_see_what_they_must():
    assert compiled_elsewhere("import numba\n@numba.njit\ndef f(): ...") == ["njit"]
    assert compiled_elsewhere("import numba\n@numba.jit(nopython=True)\ndef f(): ...") == ["numba.jit"]
    assert compiled_elsewhere("from numba import njit as fast") == ["numba.njit"]
    assert compiled_elsewhere("from cumoe.cpu._jit import jit\n@jit()\ndef f(): ...") == []
    assert loose_arithmetic("jit(fastmath=True)") == ["fastmath"]
    assert loose_arithmetic("builder.fadd(a, b, flags=('reassoc',))") == ["reassoc"]


def test_library_code_neither_prints_nor_asserts():
    for path in (*sources(FRONT), *sources(CPU), *sources(GPU)):
        tree = ast.parse(path.read_text())
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        if not is_program(path):
            named = [
                call.lineno for call in calls_of(tree) if isinstance(call.func, ast.Name) and call.func.id == "print"
            ]
            assert not named, path


def test_no_file_is_long():
    for path in written_files():
        if path.suffix in (".py", ".cu", ".cuh") and name_of(path) not in LONG_FILES:
            limit = 300 if path.parent in (CPU, GPU) else 400
            assert len(path.read_text().splitlines()) <= limit, f"{name_of(path)}: split it by topic"
    assert all((ROOT / name).exists() for name in LONG_FILES)


def test_no_file_names_a_place_of_one_machine():
    place = re.compile(r"(?<![\w.~*])/(work|home|root|opt|Users|mnt|tmp)/\w")
    assert place.search("see /" + "home/me")
    for path in written_files():
        if path.suffix in (".py", ".cu", ".cuh", ".md", ".cfg", ".toml", ".ini", ".yaml", ".ipynb", "", ".csv"):
            assert not place.search(path.read_text(encoding="utf-8", errors="replace")), path


def test_every_package_is_listed():
    options, mapping = setup_cfg()["options"], {"cumoe.cpu": "cpu", "cumoe.rawkernels": "rawkernels", "cumoe": "cumoe"}
    assert dict(tuple(map(str.strip, line.split("="))) for line in words(options["package_dir"])) == mapping
    found = {
        ".".join((package, *init.parent.relative_to(ROOT / folder).parts))
        for package, folder in mapping.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(words(options["packages"])) == sorted(found)
    for folder in {path.parent for path in (*sources(FRONT), *sources(CPU), *sources(GPU))}:
        assert (folder / "__init__.py").exists(), folder


def test_notebooks_are_kept_without_outputs_beside_their_source():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.with_suffix(".py").exists(), path
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path
    for path in (ROOT / "notebooks").glob("*.py"):
        assert path.with_suffix(".ipynb").exists(), path


# -- the public names -------------------------------------------------------------------------------

NAMES = list(cumoe._HOME)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(cumoe, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(cumoe, name))]


def test_public_names_live_where_home_says():
    assert cumoe.__all__ == ["__version__", *NAMES]
    assert list(cumoe._HOME.values()) == sorted(cumoe._HOME.values())
    for name, module in cumoe._HOME.items():
        value = getattr(importlib.import_module(module), name)
        assert getattr(cumoe, name) is value
    with pytest.raises(AttributeError, match="module 'cumoe' has no attribute 'nothing'"):
        cumoe.nothing  # noqa: B018
    assert set(NAMES) <= set(dir(cumoe))


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstring_is_valid_numpydoc(name):
    wanted = NUMPYDOC_CHECKS - ({"PR01", "PR02", "PR03"} if name in CLASSES else set())  # classes: see below
    assert [error for error in validate(f"cumoe.{name}")["errors"] if error[0] in wanted] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_of_a_function_has_its_sections(name):
    doc = FunctionDoc(getattr(cumoe, name))
    needed = ["Returns", "Examples"]
    if cumoe._HOME[name].startswith("cumoe._"):  # it computes on arrays
        needed += ["Raises", "Notes"]
    missing = [section for section in needed if not doc[section]]
    if inspect.signature(getattr(cumoe, name)).parameters and not doc["Parameters"]:
        missing.append("Parameters")
    assert missing == []


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_of_a_class_reaches_its_public_members(name):
    cls = getattr(cumoe, name)
    doc = ClassDoc(cls)
    assert doc["Parameters"] or doc["Attributes"] or doc["Methods"]
    made_by_users = cumoe._HOME[name] == "cumoe.config"
    fields = getattr(cls, "__dataclass_fields__", getattr(cls, "_fields", ())) if made_by_users else ()
    described = {word.strip() for one in (*doc["Parameters"], *doc["Attributes"]) for word in one.name.split(",")}
    assert {field for field in fields if not field.startswith("_")} <= described
    members = {key: value for key, value in vars(cls).items() if not key.startswith("_")}
    for key, value in members.items():
        if inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod):
            assert inspect.getdoc(value), f"{name}.{key} has no docstring"


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstring_examples_run(name):
    value = getattr(cumoe, name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={"cumoe": cumoe, "np": np}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def readme_examples():
    """The examples of the README: each goes on where the one before it ends."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [compile(block, "README.md", "exec") for block in blocks]


def test_the_readme_example_runs():
    exec(readme_examples()[0], {"print": lambda *words: None})


def test_the_readme_examples_run_on_a_gpu():
    first, *others = readme_examples()
    assert others
    gpu()
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    names = {"print": lambda *words: None}
    for block in (first, *others):
        exec(block, names)
    names["graph"].replay()
    torch.cuda.synchronize()
