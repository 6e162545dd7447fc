"""
CUDA C++ text -> cubin, with no GPU needed: NVRTC through `cuda.core`, or the disk.

A kernel file includes our own headers by name (``#include "memory.cuh"``); their text is pasted in place, once
each, so that the cache key covers every byte that the compiler reads. No header from outside is used. Constants
arrive as ``-D`` macros. Compiler errors name the real file and line.
"""

import functools
import io
import re
from pathlib import Path
from typing import NamedTuple

from cumoe.rawkernels import _cache

_HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.cuh)"$', re.MULTILINE)

# what every kernel is compiled with beside its constants; part of the cache key, as all that decides about the code
_SETTINGS = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


class Compiled(NamedTuple):
    """A compiled kernel file."""

    code: bytes  # the cubin
    log: str  # of the assembler: registers, stack and spills of each entry point
    how: str  # READ, BUILT or REBUILT of `_cache`


@functools.cache
def source(file):
    """Text of a kernel file with its headers pasted in."""
    return _paste(file, set())


def _paste(file, seen):
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((_HERE / file).read_text(encoding="utf-8").splitlines(), 1):
        match = _INCLUDE.match(line)
        if match is None:
            lines.append(line)
        elif match[1] not in seen:
            lines += [_paste(match[1], seen), f'#line {number + 1} "{file}"']
        else:
            lines.append("")
    return "\n".join(lines)


def cubin(file, arch, constants, root=None):
    """Machine code of a kernel file for `arch` ("sm_90a"), from the disk or compiled; `constants` become macros."""
    return compiled(file, arch, constants, root).code


def compiled(file, arch, constants, root=None):
    """Machine code and assembler log of a kernel file; `root` stands for CuPy's cache folder."""
    text = source(file)
    options = tuple(f"{name}={value}" for name, value in sorted(constants.items()))
    parts = (text, arch, repr(_SETTINGS), *options)

    def build():
        code, log = compile_text(file, text, arch, options)
        return log.encode() + b"\0" + code

    name = f"{file.partition('.')[0]}-{arch}"
    content, how = _cache.fetch(name, parts, nvrtc_version(), build, root)
    log, _, code = content.partition(b"\0")
    return Compiled(code, log.decode(), how)


def compile_text(file, text, arch, options):
    """Compile and return (cubin, log of the assembler); the log tells registers and spills."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise ImportError(f"compiling {file} needs cuda-core and NVRTC: pip install 'cumoe[compile]'") from error

    log = io.StringIO()
    settings = ProgramOptions(name=file, arch=arch, define_macro=list(options) or None, **_SETTINGS)
    code = Program(text, "c++", settings).compile("cubin", logs=log)
    return bytes(code.code), log.getvalue().replace("\0", "")  # NVRTC ends its log with one


@functools.cache
def nvrtc_version():
    """Version of the compiler, "nvrtc-13.0.88"; None where there is no compiler."""
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = Path(load_nvidia_dynamic_lib("nvrtc").abs_path or "").resolve()
        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):  # pathfinder's own errors are RuntimeErrors
        return None
    # NVRTC does not tell its third number: a toolkit's file ends in it, beside a wheel's stands the wheel's record
    records = (path.name for site in library.parents[3:4] for path in site.glob("nvidia_cuda_nvrtc*.dist-info"))
    found = (re.search(rf"\b{major}\.{minor}\.[\d.]*\d", name) for name in (library.name, *records))
    return f"nvrtc-{next((match[0] for match in found if match), f'{major}.{minor}')}"
