"""
`jit`: how every CPU loop is compiled, and a disk cache that many processes may share.

Numba's own cache numbers its data files through an index: two processes that add two signatures at
once may end with an index that names the other's machine code, and an edit of the file that emits a
micro-kernel is not noticed by the files that call it. Here each compiled signature is one file, named
by a hash of everything it depends on (every source of this folder, signature, CPU, Numba) and opened
by a checksum. It is written under a temporary name and renamed, so that a reader sees all of it or none.
"""

import contextlib
import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba.core.caching import FunctionCache, dumps
from numba.core.registry import CPUDispatcher

from cumoe.cpu import _threads

_threads.start()  # every CPU room imports this module before it asks Numba for threads

_HERE = Path(__file__).parent
_SOURCES = hashlib.sha256(
    b"\0".join(path.name.encode() + path.read_bytes() for path in sorted(_HERE.glob("*.py")))
).hexdigest()


class _CacheFile:
    """One file a compiled signature; twin of numba's IndexDataCacheFile, without an index."""

    def __init__(self, folder: str, base: str) -> None:
        self._folder, self._base = Path(folder), base

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(repr((numba.__version__, _SOURCES, key)).encode()).hexdigest()
        return self._folder / f"{self._base}.{digest[:32]}.nbc"

    def load(self, key: Any) -> Any:
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != checksum:  # damaged: compile again and replace it
            return None
        return pickle.loads(payload)

    def save(self, key: Any, data: Any) -> None:
        payload = dumps(data)
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".writing-")
        except OSError:
            return
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, self._path(key))
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if not isinstance(error, OSError):  # a full disk costs the cache, not the result
                raise

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._base}.*.nbc"):
            path.unlink(missing_ok=True)


class _Cache(FunctionCache):
    def __init__(self, py_func: FunctionType) -> None:
        super().__init__(py_func)
        self._cache_file = _CacheFile(self._cache_path, self._impl.filename_base)


class _Inner(CPUDispatcher):
    """A function that has no entry for Python."""

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.__name__} can be called by compiled code only")


def jit(
    parallel: bool = False, inline: bool = False, inner: bool = False, **constants: Any
) -> Callable[[Callable[..., Any]], Any]:
    """
    Compile a loop: GIL released, NumPy's error model, no fast-math, cached on disk.

    `inline` puts a function of numbers into every loop that calls it, however large: a call would keep
    the loop from becoming vector code. `inner` is for what only compiled code calls: code that takes a
    large tuple of arrays from Python costs more to compile than what is done with it. `constants` are
    globals of the compiled function, so that one template serves several kernels; their names become
    part of the function's name.
    """

    def wrap(function: Any) -> Any:
        if constants:
            code, scope = function.__code__, {**function.__globals__, **constants}
            special = FunctionType(code, scope, function.__name__, function.__defaults__)
            # the name is part of the cache key and must tell specialisations of specialisations apart
            named = {name: getattr(value, "__qualname__", repr(value)) for name, value in sorted(constants.items())}
            named |= {"parallel": repr(parallel), "inner": repr(inner)}
            special.__qualname__ = f"{function.__qualname__}-{hashlib.sha256(repr(named).encode()).hexdigest()[:16]}"
            special.__module__ = function.__module__
            function = special
        entries = {"no_cpython_wrapper": inner, "no_cfunc_wrapper": inner}
        options = {"parallel": parallel, "nogil": True, "error_model": "numpy", "forceinline": inline, **entries}
        dispatcher = numba.njit(**options)(function)
        if inner:
            dispatcher.__class__ = _Inner  # Numba's own would jump to nowhere
        with contextlib.suppress(RuntimeError):  # no folder can be written: every process compiles for itself
            dispatcher._cache = _Cache(function)
        return dispatcher

    return wrap
