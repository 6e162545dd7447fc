"""
The kernels that the launchers will ask for, and what the assembler said about each.

Every launcher (a module of this package without an underscore) may have ``variants(arch)``, which gives
``(file, entry point, constants)`` for the default dtypes and the common activations. The kernels in Python are all
listed by `_numba`.
"""

import importlib
import pkgutil
import re
from typing import NamedTuple

from cumoe import rawkernels
from cumoe.rawkernels import _compile, _numba

DTYPES = ("bfloat16", "float16", "float32")


class Variant(NamedTuple):
    """One compilation: a kernel file under one set of constants."""

    file: str
    entries: tuple[str, ...]  # entry points in it
    constants: tuple[tuple[str, object], ...]  # sorted (name, value)

    def __str__(self):
        return " ".join((self.file, *self.entries, *(f"{name}={value}" for name, value in self.constants)))


class Usage(NamedTuple):
    """What one entry point takes of the machine, for each thread."""

    registers: int
    stack_bytes: int
    spill_bytes: int


def default(arch, dtypes=DTYPES):
    """All variants that the launchers list for `arch`, without those that name other dtypes only."""
    found = {}
    for file, entry, constants in _listed(arch):
        named = set(DTYPES) & set(map(str, constants.values()))
        if not named or named & set(dtypes):
            alone = entry if file.endswith(".py") else ""  # Numba compiles each for itself
            entries = found.setdefault((file, tuple(sorted(constants.items())), alone), [])
            if entry not in entries:
                entries.append(entry)
    return [Variant(file, tuple(entries), constants) for (file, constants, _), entries in found.items()]


def _listed(arch):
    for module in pkgutil.iter_modules(rawkernels.__path__):
        if not module.name.startswith("_"):
            launcher = importlib.import_module(f"{rawkernels.__name__}.{module.name}")
            yield from getattr(launcher, "variants", lambda _: ())(arch)
    yield from _numba.variants()


def compiled(variant, arch, root=None):
    """Compile a variant, or read it from the disk; `root` stands for CuPy's cache folder."""
    if variant.file.endswith(".py"):
        return _numba.compiled(variant.file, *variant.entries, arch, dict(variant.constants), root)
    return _compile.compiled(variant.file, arch, dict(variant.constants), root)


def usage(log):
    """Entry point -> Usage, from the log of the assembler."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = [
            re.search(pattern, part)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill stores")
        ]
        if all(numbers):
            found[part.partition("'")[0]] = Usage(*(int(match[1]) for match in numbers))
    return found


_PLAIN = re.compile(
    r"^(\s*|ptxas info +: (\d+ bytes gmem.*|Compiling entry function .*|Function properties for .*|Used \d+ registers.*"
    r"|Compile time = .*)|(ptxas +\. +|\s+)\d+ bytes stack frame.*)$"
)


def remarks(log):
    """Lines of the log that say more than what each kernel takes: warnings, and losses such as C7510."""
    return [line.strip() for line in log.splitlines() if not _PLAIN.match(line)]
