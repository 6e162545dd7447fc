"""The scratch memory of a call: one block of bytes, the caller's or the call's own, of which pieces are cut."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array

ALIGNMENT = 256  # of every piece: whole sectors of memory, and more than the copy engines of a GPU ask for


def rounded(num_bytes: int) -> int:
    """Bytes that a piece takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Workspace:
    """A block of which pieces are cut, one after the other."""

    def __init__(self, xp: ModuleType, memory: Array) -> None:
        self._xp, self._memory = xp, memory
        self.used = -_check.byte_bounds(memory)[0] % ALIGNMENT

    def must_hold(self, num_bytes: int) -> None:
        """Raise unless `num_bytes`, those for a block that begins anywhere included, are left."""
        needed = self.used + num_bytes - ALIGNMENT
        if needed > self._memory.size:
            raise ValueError(
                f"workspace must have at least {needed} bytes, got {self._memory.size}; see plan(...).workspace_bytes"
            )

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Cut off an array, not initialised."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if num_bytes == 0:
            return self._xp.empty(shape, dtype)
        start = self._cut(num_bytes)
        return self._memory[start : start + num_bytes].view(dtype).reshape(shape)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """
        Let CuPy take the memory of new arrays from here, for a while.

        So a call with a workspace allocates nothing, whatever it has to convert on the way. NumPy's arrays
        come from the system as ever.
        """
        if self._xp is np:
            yield
            return
        with sys.modules["cupy"].cuda.using_allocator(self._allocate):
            yield

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """`lent`, for arrays that are of no use afterwards: their memory is free again."""
        used = self.used
        with self.lent():
            yield
        self.used = used

    def _allocate(self, num_bytes: int) -> Any:
        return self._memory.data + (self._cut(num_bytes) if num_bytes else 0)

    def _cut(self, num_bytes: int) -> int:
        self.must_hold(num_bytes + ALIGNMENT)
        start = self.used
        self.used += rounded(num_bytes)
        return start


def given_workspace(xp: ModuleType, memory: Array, taken: int = 0) -> Workspace:
    """Check what a caller gave as `workspace`, taken in already; of which `taken` bytes are in use."""
    _check.ndim("workspace", memory, "(bytes,)", 1)
    _check.dtype("workspace", memory, ("uint8",))
    if not memory.flags.c_contiguous:
        raise ValueError(f"workspace must be C-contiguous, got strides {tuple(memory.strides)}")
    _check.writeable("workspace", memory)
    space = Workspace(xp, memory)
    space.used = max(space.used, taken)
    return space


@contextlib.contextmanager
def lent(workspace: Array | None) -> Iterator[Callable[[], int]]:
    """Lend what a caller gave as `workspace`, see `Workspace.lent`; gives a function that tells how much is in use."""
    if workspace is None:
        yield lambda: 0
        return
    side, (memory,) = _arrays.enter(workspace=workspace)
    space = given_workspace(side.xp, memory)
    with space.lent():
        yield lambda: space.used
