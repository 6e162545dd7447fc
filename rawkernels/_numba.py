"""
Kernels written in Python: compiled once by Numba, then launched like the others, without Numba.

    sort = _numba.kernel("_sort_kernels.py", "sort_few", ID="int32")
    sort(1, 192, topk_ids, ...)

A kernel is a plain function of a file ``_*_kernels.py``, its parameters annotated with what `_device` has for
types. Constants replace globals of the function, or choose types. A launch through Numba costs 68 us, one through
`_load.Kernel` 5; with a warm disk cache Numba is not even imported.
"""

import functools
import importlib
import importlib.metadata
import itertools
import re
import threading
from pathlib import Path
from types import FunctionType

from cumoe.rawkernels import _cache, _compile, _load

_HERE = Path(__file__).parent
_LOCK = threading.Lock()
MAX_THREADS = 1024  # of a block, for every kernel


def kernel(file, name, **constants):
    """The kernel `name` of a kernel file, compiled with `constants`, on the current device."""
    import cupy as cp

    return _kernel(file, name, tuple(sorted(constants.items())), cp.cuda.runtime.getDevice())


@functools.cache
def _kernel(file, name, constants, device):
    with _LOCK:
        code = compiled(file, name, _load.architecture(device), dict(constants)).code
        return _load.Kernel(code, name, device)


def compiled(file, name, arch, constants, root=None):
    """Machine code and assembler log of one kernel, from the disk or compiled, as `_compile.compiled` gives them."""
    chosen = tuple(f"{key}={value}" for key, value in sorted(constants.items()))
    parts = (_sources(), file, name, arch, *chosen)
    content, how = _cache.fetch(f"{name}-{arch}", parts, versions(), lambda: build(file, name, arch, constants), root)
    log, _, code = content.partition(b"\0")
    return _compile.Compiled(code, log.decode(), how)


def build(file, name, arch, constants):
    """Compile one kernel, Python to PTX by Numba, PTX to machine code by the CUDA linker: log, NUL, machine code."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    program = ObjectCode.from_ptx(ptx(file, name, arch, constants).encode(), name=name)
    told = {"ptxas_options": ["-v"]} if Linker.which_backend() == "nvJitLink" else {}  # the driver tells nothing
    linker = Linker(program, options=LinkerOptions(arch=arch, **told))
    code = bytes(linker.link("cubin").code)
    return linker.get_info_log().replace("\0", "").encode() + b"\0" + code


def ptx(file, name, arch, constants):
    """The kernel as PTX, its entry point called `name`."""
    from cumoe.rawkernels import _device

    template = getattr(importlib.import_module(f"cumoe.rawkernels.{file.partition('.')[0]}"), name)
    function = FunctionType(template.__code__, {**template.__globals__, **constants}, name)
    types = [_device.chosen_type(kind, constants) for kind in template.__annotations__.values()]
    text, _ = _device.cuda.compile(
        function,
        tuple(types),
        cc=_compute_capability(arch),
        device=False,
        abi="numba",
        output="ptx",
        launch_bounds=MAX_THREADS,
    )
    mangled = re.search(r"\.entry\s+(\w+)", text)[1]
    return re.sub(rf"\b{mangled}(?=\b|_param_)", name, text)


def _compute_capability(arch):
    major, minor, suffix = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", arch).groups()
    return (int(major), int(minor), suffix) if suffix else (int(major), int(minor))


@functools.cache
def _sources():
    """Text of every file that a kernel may take functions from, and of this one."""
    paths = [*sorted(_HERE.glob("_*_kernels.py")), _HERE / "_device.py", Path(__file__)]
    return "\0".join(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in paths)


@functools.cache
def versions():
    """Versions of what turns Python into machine code; imports none of it; None where something is missing."""
    linker = _compile.nvrtc_version()  # of the same toolkit
    try:
        numba = importlib.metadata.version("numba-cuda")
    except importlib.metadata.PackageNotFoundError:
        return None
    return linker and f"numba-cuda-{numba}-{linker}"


def variants():
    """Every kernel that the launchers ask for, under every choice of its constants: (file, name, constants)."""
    kinds = {"ID": ("int32", "uint32", "int64"), "COUNT": ("int32", "int64"), "UNIT": _UNITS}
    kinds |= dict.fromkeys(("SEVERAL", "OFFSETS", "FIRST", "SCATTER"), (False, True))
    for file, name, *constants in _KERNELS:
        for chosen in itertools.product(*(kinds[constant] for constant in constants)):
            yield file, name, dict(zip(constants, chosen, strict=True))


_UNITS = ("bytes16", "uint64", "uint32", "uint16", "uint8")
_KERNELS = (
    ("_few_kernels.py", "sort_few", "ID"),
    ("_sort_kernels.py", "count_pairs", "ID"),
    ("_sort_kernels.py", "sort_pairs", "ID", "SEVERAL"),
    ("_tile_kernels.py", "list_tiles", "COUNT", "OFFSETS"),
    ("_layout_kernels.py", "pad_rows"),
    ("_layout_kernels.py", "pad_blocks"),
    ("_layout_kernels.py", "pad_shelves"),
    ("_layout_kernels.py", "shelve_pairs", "ID"),
    ("_layout_kernels.py", "count_tokens", "ID"),
    ("_layout_kernels.py", "name_experts", "ID"),
    ("_copy_kernels.py", "copy_rows", "UNIT", "SCATTER"),
    ("_wide_kernels.py", "take_digits", "ID", "FIRST"),
    ("_wide_kernels.py", "follow", "FIRST"),
    ("_wide_kernels.py", "finish", "ID"),
)
