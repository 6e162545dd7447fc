"""
Checks of what a caller passed: raise with the argument's name and both numbers, or return nothing.

They read shapes, dtypes and addresses, never the elements of a device array; looking at values is
left to ``check=True``.
"""

import functools
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np


@functools.cache
def name_of(dtype: Any) -> str:
    """The dtype's name; to ask NumPy takes longer than any other check."""
    return str(dtype.name)


def given(name: str, array: Any) -> None:
    """Raise TypeError if an array that must be there is None."""
    if array is None:
        raise TypeError(f"{name} must be an array, got None")


def shape(name: str, array: Any, letters: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `array` has the shape that `letters` spells, as in ``"(E, 2I, H)"``."""
    given(name, array)
    got = tuple(array.shape)
    if got == expected:
        return
    fix = ""
    if len(got) == len(expected) >= 2 and (*got[:-2], got[-1], got[-2]) == expected:
        fix = "; the last two axes look swapped"
    raise ValueError(f"{name} must have shape {letters} = {expected}, got {got}{fix}")


def ndim(name: str, array: Any, letters: str, expected: int) -> None:
    """Raise ValueError unless `array` has `expected` axes, spelt by `letters`."""
    given(name, array)
    if array.ndim != expected:
        axes = "axis" if expected == 1 else "axes"
        raise ValueError(f"{name} must have {expected} {axes} {letters}, got shape {tuple(array.shape)}")


def dtype(name: str, array: Any, allowed: Collection[str]) -> None:
    """Raise TypeError unless the dtype's name is one of `allowed`."""
    given(name, array)
    if name_of(array.dtype) not in allowed:
        raise TypeError(f"{name} must be {_either(allowed)}, got {array.dtype.name}")


def same_dtype(name: str, array: Any, other_name: str, other: Any) -> None:
    """Raise TypeError unless both arrays have one dtype."""
    given(name, array)
    if array.dtype != other.dtype:
        wanted, got = other.dtype.name, array.dtype.name
        raise TypeError(f"{name} must have the dtype of {other_name} = {wanted}, got {got}; convert one of them")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` as an int, or raise unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        rule = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {rule}, got {number}")
    return number


def choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if getattr(value, "shape", ()):  # comparing it would give an array
        raise TypeError(f"{name} must be {_either(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be {_either(allowed)}, got {value!r}")


def no_overlap(name: str, out: Any, **inputs: Any) -> None:
    """Raise ValueError if the memory of `out` touches the memory of any input."""
    low, high = byte_bounds(out)
    for other_name, other in inputs.items():
        if other is None or other.size == 0 or out.size == 0:
            continue
        other_low, other_high = byte_bounds(other)
        if low < other_high and other_low < high and (not isinstance(out, np.ndarray) or np.shares_memory(out, other)):
            raise ValueError(f"{name} must not share memory with {other_name}; pass a separate array or out=None")


def writeable(name: str, array: Any) -> None:
    """Raise ValueError if the array says that it must not be written."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array; pass a copy")


def contiguous(name: str, array: Any) -> None:
    """Raise ValueError unless the array is C-contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous, got strides {tuple(array.strides)} for shape {tuple(array.shape)}; "
            "pass a separate array or out=None"
        )


def aligned(name: str, array: Any) -> None:
    """Raise ValueError if the elements of a NumPy array lie across the addresses of their type."""
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        offset = array.ctypes.data % array.itemsize
        raise ValueError(
            f"{name} must be aligned to {array.itemsize} bytes, got an address {offset} bytes off; "
            "pass a separate array or out=None"
        )


def output(name: str, out: Any, letters: str, expected: tuple[int, ...], dtype_name: str, **inputs: Any) -> None:
    """Check an array that the caller gave to be written: shape, dtype, layout, and no shared memory with `inputs`."""
    shape(name, out, letters, expected)
    dtype(name, out, (dtype_name,))
    contiguous(name, out)
    aligned(name, out)
    writeable(name, out)
    no_overlap(name, out, **inputs)


def topk_ids(array: Any, num_tokens: int | None = None) -> None:
    """Check expert ids: (T, k), an integer dtype that routers give, fewer than 2**31 pairs."""
    ndim("topk_ids", array, "(T, k)", 2)
    dtype("topk_ids", array, ("int32", "int64", "uint32"))
    if num_tokens is not None:
        shape("topk_ids", array, "(T, k)", (num_tokens, array.shape[1]))
    if array.size >= 2**31:
        raise ValueError(f"topk_ids must have fewer than 2**31 elements, got shape {tuple(array.shape)}")


def expert_map(array: Any, num_experts: int | None = None) -> None:
    """Check a map from global to local experts: (E,) int32; None passes."""
    if array is None:
        return
    ndim("expert_map", array, "(E,)", 1)
    dtype("expert_map", array, ("int32",))
    if num_experts is not None:
        shape("expert_map", array, "(E,)", (num_experts,))


def byte_bounds(array: Any) -> tuple[int, int]:
    """First byte address of `array` and the one after its last, for NumPy and CuPy arrays."""
    start = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    low, high = start, start + array.itemsize
    for extent, stride in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high


def _either(allowed: Collection[Any]) -> str:
    names = [str(one) for one in allowed]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
