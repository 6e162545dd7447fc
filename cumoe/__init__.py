"""
The Mixture-of-Experts layer as array functions: NumPy in, NumPy out; CuPy in, CuPy out.

Every public name is imported at its first use, so that ``import cumoe`` loads neither numba nor cupy.
"""

import importlib
from typing import Any

from cumoe._version import __version__

# public name -> the module that defines it
_HOME: dict[str, str] = {}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604  they are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cumoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
