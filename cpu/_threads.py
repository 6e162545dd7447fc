"""
The threads of the CPU side: TBB where its library can be found, never Numba's workqueue.

Numba looks for TBB on the loader's path only, and pip puts it beside the interpreter; loading it by
its full name first is enough. Workqueue ends the process when two Python threads call at once, and
libgomp's spinning threads starve each other on few cores. Nothing here touches the environment.
"""

import ctypes
import functools
import sys
import warnings
from pathlib import Path

import numba


@functools.cache
def start() -> None:
    """Make Numba's parallel loops safe to call from any thread; runs once, before the first of them."""
    for name in ("libtbb.so.12", "libtbb.12.dylib", "tbb12.dll"):
        for folder in ("lib", "Library/bin"):
            path = Path(sys.prefix) / folder / name
            if path.exists():
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "threadsafe"  # tbb, else omp; workqueue is not in the list


@functools.cache
def warn_if_slow() -> None:
    """Say once that the loops run on libgomp; call it after the first parallel loop ran."""
    if numba.threading_layer() == "omp":
        warnings.warn(
            "cumoe runs on Numba's OpenMP layer, which starves threads on shared cores; pip install tbb",
            RuntimeWarning,
            stacklevel=4,
        )
