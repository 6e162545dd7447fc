"""
What rooms ask before they work: whether their steps are being recorded, to be done later and more than once.

A room that finds a recorder here hands it the compiled function and the arguments instead of calling the function.
Nothing that the arguments hold is looked at meanwhile.
"""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numba
import numpy as np

from cumoe.cpu import _cpus, _frozen, _thunks
from cumoe.cpu._frozen import Address, Word

NOTHING, MEMORY, WORDS, GIVEN = range(4)  # owners of words: those of what is given follow
ALIGNMENT = 64
_COUNTERS = 32  # each in a cache line of its own: one for the tasks of a step, two for who is in it
_HERE = threading.local()


class Step(NamedTuple):
    """A compiled function (address of words, number of the thread), the words, and how many began and ended it."""

    enter: int
    words: tuple[Word, ...]
    entered: Word
    left: Word


class Recorder:
    """Steps of a call, some before all threads and some in them, and the memory that they need between them."""

    def __init__(self, given: Iterable[np.ndarray]) -> None:
        self.workers = numba.config.NUMBA_NUM_THREADS  # all that there may be: fewer do the work of the others
        self.before: list[Step] = []
        self.together: list[Step] = []
        self.size = self.products = 0  # bytes of memory; elements of products times K
        self.constants: list[np.ndarray] = []
        self._counters = np.empty((_COUNTERS, ALIGNMENT // 8), np.int64)
        self._used = 0
        self._ranges: list[tuple[int, int, Word]] = []
        self._held: list[np.ndarray] = []
        self._know(self._counters, self._reserve(self._counters.nbytes))
        for number, array in enumerate(given):
            self._know(array, Word(GIVEN + number, 0))

    def arrivals(self) -> Word:
        """Where threads say that they came, for `_cpus`; 0 if they need not."""
        is_of_use = _cpus.is_of_use(self.workers, self.products)
        return self._place(self.counter().array) if is_of_use else Word(NOTHING, 0)

    @property
    def counter_bytes(self) -> int:
        """Bytes at the start of the memory that are zero in the beginning."""
        return self._counters.nbytes

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in the memory of the recording."""
        array = np.empty(shape, dtype)
        self._know(array, self._reserve(array.nbytes))
        return array

    def counter(self) -> Address:
        """An int64 that is zero in the beginning."""
        self._used += 1
        return Address(self._counters[self._used - 1])

    def first(self, function: Any, *arguments: Any) -> None:
        """Call `function` before any thread begins."""
        self.before.append(self._step(function, arguments))

    def all_threads(self, function: Any, *arguments: Any) -> None:
        """Call `function` in each thread, when what was recorded before is done."""
        self.together.append(self._step(function, arguments))

    def rows(self, loop: Any, num_rows: int, arguments: tuple[Any, ...]) -> None:
        """Call the row loop for blocks of rows, which the threads take one after the other."""
        blocks = min(num_rows, 8 * self.workers)
        where, thunk = _thunks.rows(loop, _frozen.kind(arguments))
        given = where, self.counter(), num_rows, blocks, arguments
        self.together.append(self._with_counters(thunk, given))

    def _step(self, function: Any, arguments: tuple[Any, ...]) -> Step:
        where, thunk = _thunks.whole(function, _frozen.kind(arguments))
        return self._with_counters(thunk, (where, arguments))

    def _with_counters(self, enter: int, given: tuple[Any, ...]) -> Step:
        found: list[Any] = []
        _frozen.freeze(given, self._place, found)
        words = tuple(one if isinstance(one, Word) else Word(NOTHING, one) for one in found)
        return Step(enter, words, self._place(self.counter().array), self._place(self.counter().array))

    def _reserve(self, num_bytes: int) -> Word:
        start = self.size
        self.size += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return Word(MEMORY, start)

    def _know(self, array: np.ndarray, at: Word) -> None:
        start = array.ctypes.data
        self._ranges.append((start, start + array.nbytes, at))
        self._held.append(array)  # nothing else may come to lie there

    def _place(self, array: np.ndarray) -> Word:
        if array.size == 0:
            return Word(NOTHING, 0)
        address = array.ctypes.data
        for start, end, at in self._ranges:
            if start <= address < end:
                return Word(at.owner, at.number + address - start)
        self.constants.append(array)
        return Word(NOTHING, address)


def current() -> Recorder | None:
    """Who records the steps of this thread of Python, if anybody does."""
    return getattr(_HERE, "recorder", None)


def set_current(recorder: Recorder | None) -> None:
    """Record the steps of this thread, or no longer."""
    _HERE.recorder = recorder
