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

from cumoe.rawkernels import _cache

_HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.cuh)"$', re.MULTILINE)

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


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


def cubin(file, arch, constants, where=None):
    """Machine code of a kernel file for `arch` ("sm_90a"), from the disk or compiled; `constants` become macros."""
    text = source(file)
    options = tuple(f"{name}={value}" for name, value in sorted(constants.items()))
    parts = (text, arch, *options, nvrtc_version())
    name = f"{file.partition('.')[0]}-{arch}"
    return _cache.get_or_build(name, parts, lambda: compile_text(file, text, arch, options)[0], where)


def compile_text(file, text, arch, options):
    """Compile and return (cubin, log of the assembler); the log tells registers and spills."""
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    settings = ProgramOptions(
        name=file, arch=arch, std="c++17", define_macro=list(options), lineinfo=True, ptxas_options=["-v"]
    )
    code = Program(text, "c++", settings).compile("cubin", logs=log)
    return bytes(code.code), log.getvalue()


@functools.cache
def nvrtc_version():
    """Version of the compiler, as text."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC {major}.{minor}"
