"""
The door for arrays: whose they are, which side works on them, and how a result goes back.

This is the only file of the front desk, with `_dlpack`, that knows that CuPy may exist. A CuPy array
cannot exist before its module is imported, so `sys.modules` answers that question without importing
anything.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import ml_dtypes  # noqa: F401  registers "bfloat16" and the small floats as NumPy dtype names
import numpy as np

from cumoe import _dlpack

Array = Any  # a NumPy, CuPy or DLPack array; checked at run time

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Side(NamedTuple):
    """
    Where a call runs, and how its results leave.

    `foreign` is an array whose kind the results take, or None; `given` pairs each array as it is used
    inside with the caller's own object, for those that differ.
    """

    xp: ModuleType
    foreign: Any
    given: tuple[tuple[Array, Array], ...] = ()

    def leave(self, array: Array) -> Array:
        """
        Hand a result back in the caller's kind, without a copy.

        An array that came in through `enter` (``out=``) leaves as the very object that the caller gave.
        """
        for inside, outside in self.given:
            if array is inside:
                if self.foreign is not None and self.xp is not np and _dlpack.stream_wish(self.foreign) != -1:
                    _dlpack.export_like(array, self.foreign)  # makes the caller's stream wait for ours
                return outside
        return array if self.foreign is None else _dlpack.export_like(array, self.foreign)


def on_callers_stream(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """
    Make a public function run on the stream that the library of its tensors works on.

    Kernels, copies and allocations go to CuPy's current stream. For CuPy arrays that is the caller's
    own. torch has another; without this, each call would make one stream wait for the other, twice,
    which costs time and cannot be captured in a graph. Tensors in a `Quantized` or a config count.
    """

    @functools.wraps(function)
    def run(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        stream = _dlpack.stream_of_first((*arguments, *keywords.values()))
        if stream is None:
            return function(*arguments, **keywords)
        with stream:
            return function(*arguments, **keywords)

    return run


def enter(**arrays: Array) -> tuple[Side, list[Array]]:
    """
    Take in the array arguments of a public function, by name; None passes through.

    NumPy and CuPy arrays go in as they are, any other DLPack producer without a copy. All must come
    from one library and lie on one device.
    """
    kinds = {name: _kind(name, array) for name, array in arrays.items() if array is not None}
    if len(set(kinds.values())) > 1:
        raise TypeError(
            "arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, got " + _listed(kinds)
        )
    kind = next(iter(kinds.values()), "numpy")
    foreign = None if kind in ("numpy", "cupy") else next(array for array in arrays.values() if array is not None)
    stream = None if foreign is None else _dlpack.stream_wish(foreign)
    inside = [None if array is None else _take_in(name, array, kind, stream) for name, array in arrays.items()]
    places = {name: place(array) for name, array in zip(arrays, inside, strict=True) if array is not None}
    if len(set(places.values())) > 1:
        raise TypeError("arguments must be on one device, got " + _listed(places))
    xp = np if next(iter(places.values()), "cpu") == "cpu" else _current_cupy(places)
    pairs = zip(inside, arrays.values(), strict=True)
    return Side(xp, foreign, tuple((taken, array) for taken, array in pairs if taken is not array)), inside


def _kind(name: str, array: Array) -> str:
    if isinstance(array, np.ndarray):
        return "numpy"
    if hasattr(array, "__dlpack__") and not isinstance(array, np.generic):
        maker = _dlpack.library(array)
        if maker is not None:
            return str(maker.__name__).partition(".")[0]
    raise TypeError(f"{name} must be a NumPy, CuPy or DLPack array, got {type(array).__name__}; use numpy.asarray")


def _take_in(name: str, array: Array, kind: str, stream: int | None) -> Array:
    if kind == "cupy":
        return array
    if kind != "numpy":
        return _dlpack.from_dlpack(array, name, stream)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got MaskedArray; its mask would be ignored, use {name}.filled")
    if not array.dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, got {array.dtype.str}; use {name}.astype")
    return np.asarray(array)  # a subclass (memmap, matrix) as what it is in memory


def place(array: Array) -> str:
    """Where a NumPy or CuPy array lies: "cpu", "cuda:0" and so on."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.data.device_id}"


def _current_cupy(places: dict[str, str]) -> ModuleType:
    """CuPy, on whose current device the arrays must lie: kernels are launched there."""
    cupy = sys.modules["cupy"]
    current = f"cuda:{cupy.cuda.runtime.getDevice()}"
    if current not in places.values():
        number = next(iter(places.values())).partition(":")[2]
        raise ValueError(
            f"arguments must be on the current device {current}, got {_listed(places)}; "
            f"set it by cupy.cuda.Device({number})"
        )
    return cupy


def _listed(names: dict[str, str]) -> str:
    return ", ".join(f"{name}: {what}" for name, what in names.items())


def namespace(device: str) -> ModuleType:
    """The array module of "cpu", "cuda" or "cuda:0"; raise if there is no such device."""
    kind, _, number = device.partition(":") if isinstance(device, str) else (device, "", "")
    if kind == "cpu" and not number:
        return np
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        import cupy
    except ImportError as error:
        raise ImportError("CUDA arrays need CuPy: pip install 'cumoe[cuda13]' or 'cumoe[cuda12]'") from error
    if not cupy.cuda.is_available():
        raise RuntimeError(f"device {device!r} needs a CUDA device and its driver, there is none here")
    if int(number or 0) >= cupy.cuda.runtime.getDeviceCount():
        raise ValueError(f"device must be one of {cupy.cuda.runtime.getDeviceCount()} here, got {device!r}")
    return cupy


def device_scope(device: str) -> AbstractContextManager[Any]:
    """Make the device of "cuda:1" the current one for a while; the others are there, or current, already."""
    number = device.partition(":")[2]
    return namespace(device).cuda.Device(int(number)) if number else nullcontext()


@functools.cache
def room(xp: ModuleType, name: str) -> ModuleType:
    """Import the room `name` of the side that works on arrays of `xp`."""
    side = "cpu" if xp is np else "rawkernels"
    return importlib.import_module(f"cumoe.{side}.{name}")


def zeros(xp: ModuleType, shape: tuple[int, ...], dtype: Any) -> Array:
    """New zeros of any dtype; CuPy cannot make those that it holds as labels only, the float8 family."""
    is_small_float = dtype.kind == "V" or (dtype.kind == "f" and dtype.itemsize < 4)
    return xp.zeros(shape, f"u{dtype.itemsize}").view(dtype) if is_small_float else xp.zeros(shape, dtype)


def bits(array: Array) -> Array:
    """
    The same memory as kernels see it: C-contiguous, small floats as unsigned bit patterns.

    float32, float64 and integers keep their dtype; float16, bfloat16 and the float8 family become
    uint16 and uint8. An array that is not C-contiguous is copied: outputs are checked first
    (`_check.output`). A read-only NumPy array loses its flag, so that one compiled kernel serves both;
    kernels never write their inputs.
    """
    # the view comes first: CuPy holds float8 arrays as labels only and cannot copy them
    if array.dtype.kind == "V" or (array.dtype.itemsize < 4 and array.dtype.kind == "f"):
        array = array.view(f"u{array.dtype.itemsize}")
    if not isinstance(array, np.ndarray):
        return array if array.flags.c_contiguous else array.copy()
    if not (array.flags.c_contiguous and array.flags.aligned):
        return array.copy(order="C")
    return read_only_as_plain(array)


def read_only_as_plain(array: Array) -> Array:
    """The same memory and strides, without the read-only flag of NumPy; for inputs of kernels only."""
    if not isinstance(array, np.ndarray) or array.flags.writeable:
        return array
    return _dlpack.writeable_alias(array)
