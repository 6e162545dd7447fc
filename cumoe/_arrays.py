"""
The door for arrays: whose they are, which side works on them, and how a result goes back.

This is the only file of the front desk that knows that CuPy may exist. A CuPy array cannot exist
before its module is imported, so `sys.modules` answers that question without importing anything.
"""

import importlib
import sys
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers "bfloat16" and the small floats as NumPy dtype names
import numpy as np

from cumoe import _dlpack

Array = Any  # a NumPy, CuPy or DLPack array; checked at run time


class Side(NamedTuple):
    """Where a call runs (`xp`) and the foreign array whose kind the results take, if any."""

    xp: ModuleType
    foreign: Any

    def leave(self, array: Array) -> Array:
        """Hand a result back in the caller's kind, without a copy."""
        return array if self.foreign is None else _dlpack.export_like(array, self.foreign)


def enter(**arrays: Array) -> tuple[Side, list[Array]]:
    """
    Take in the array arguments of a public function, by name; None passes through.

    NumPy and CuPy arrays go in as they are, any other DLPack producer without a copy. All must come
    from one library.
    """
    kinds = {name: _kind(name, array) for name, array in arrays.items() if array is not None}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise TypeError(f"arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, got {listed}")
    kind = next(iter(kinds.values()), "numpy")
    if kind == "numpy":
        return Side(np, None), list(arrays.values())
    if kind == "cupy":
        return Side(sys.modules["cupy"], None), list(arrays.values())
    foreign = next(array for array in arrays.values() if array is not None)
    inside = [None if array is None else _dlpack.from_dlpack(array) for array in arrays.values()]
    xp = np if all(isinstance(array, np.ndarray) for array in inside if array is not None) else sys.modules["cupy"]
    return Side(xp, foreign), inside


def _kind(name: str, array: Array) -> str:
    if isinstance(array, np.ndarray):
        return "numpy"
    root = type(array).__module__.partition(".")[0]
    if root == "cupy" or hasattr(array, "__dlpack__") and not isinstance(array, np.generic):
        return root
    raise TypeError(f"{name} must be a NumPy, CuPy or DLPack array, got {type(array).__name__}; use numpy.asarray")


def room(xp: ModuleType, name: str) -> ModuleType:
    """Import the room `name` of the side that works on arrays of `xp`."""
    side = "cpu" if xp is np else "rawkernels"
    return importlib.import_module(f"cumoe.{side}.{name}")


def bits(array: Array) -> Array:
    """
    The same memory as kernels see it: C-contiguous, small floats as unsigned bit patterns.

    float32, float64 and integers keep their dtype; float16, bfloat16 and the float8 family become
    uint16 and uint8. An array that is not C-contiguous is copied. A read-only NumPy array loses its
    flag, so that one compiled kernel serves both; kernels never write their inputs.
    """
    if not array.flags.c_contiguous:
        array = array.copy(order="C") if isinstance(array, np.ndarray) else array.copy()
    if array.dtype.kind == "V" or array.dtype.itemsize < 4 and array.dtype.kind == "f":
        array = array.view(f"u{array.dtype.itemsize}")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = _dlpack.writeable_alias(array)
    return array


def float32_scalar(value: float) -> Any:
    """A number as the kernels take it."""
    return np.float32(value)
