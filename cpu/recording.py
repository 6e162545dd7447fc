"""
Calls that are recorded once and then done by one compiled function, in one parallel region.

A step begins when all threads that began the one before it have ended it and none of its tasks is left. Those threads
are running, so nobody waits for a thread that has not come: any number of threads does the work, one included, which
holds for every threading layer. The memory of a call is kept for the next.
"""

import functools

import numba
import numpy as np
from numba import prange, types

from cumoe.cpu import _cpus, _indirect, _intrinsics, _recorder, _threads
from cumoe.cpu._frozen import Word
from cumoe.cpu._jit import jit

_MOST_PAIRS = 4096  # beyond, what a recording saves is little, and its scratch large
_KEPT = 8  # blocks of memory, of which only what a call touches is there
_MOST_KEPT_BYTES = 256 << 20  # of all of them
_HEAD = 3  # words before those of the steps
_PAUSES = 1000  # of a thread that waits, before it lets others run

_NO_MEMORY = np.empty(0, np.uint8)
_memory: list[np.ndarray] = []


def is_worthwhile(num_pairs):
    """Whether calls of so many pairs of tokens and experts should be recorded."""
    return 0 < num_pairs <= _MOST_PAIRS


def record(steps, given):
    """
    Record what `steps` (recorder, *arrays) does in the rooms, with arrays of its own in place of those of a call.

    They are made like the arrays `given`. The recorder gives more of them, in the memory of the call: ``take(shape,
    dtype)``. What they hold is neither set nor looked at.
    """
    given = [np.empty_like(array) for array in given]
    recorder = _recorder.Recorder(given)
    _recorder.set_current(recorder)
    try:
        steps(recorder, *given)
    finally:
        _recorder.set_current(None)
    return Recording(recorder)


class Recording:
    """
    The steps of a call as words: how many come first and how many follow, where threads say that they came, four words
    for each step, then what each has.
    """

    def __init__(self, recorder):
        steps = (*recorder.before, *recorder.together)
        words, details = [Word(0, len(recorder.before)), Word(0, len(recorder.together)), recorder.arrivals()], []
        for step in steps:
            behind = 8 * (_HEAD + 4 * len(steps) + len(details))
            words += [Word(0, step.enter), Word(_recorder.WORDS, behind), step.entered, step.left]
            details += step.words
        self._words = np.array(words + details, np.int64)
        self._sizes = recorder.size, recorder.counter_bytes
        self._num_bytes = recorder.size + 8 * len(self._words) + 2 * _recorder.ALIGNMENT
        self._workers = recorder.workers
        self._constants = recorder.constants  # whose addresses are among the words

    def __reduce__(self):
        return type(None), ()  # what is copied with the weights lies elsewhere

    def run(self, *given):
        """Do the steps with these arrays, of the shapes and dtypes of those that it was recorded with."""
        try:
            memory = _memory.pop()
        except IndexError:
            memory = _NO_MEMORY
        if memory.size < self._num_bytes:
            memory = np.empty(self._num_bytes, np.uint8)
        _replay(_conductor(), self._workers, self._words, (*self._sizes, _cpus.are_asleep()), memory, given)
        _cpus.were_awake(numba.get_num_threads())
        if len(_memory) < _KEPT and memory.size + sum(one.size for one in _memory) <= _MOST_KEPT_BYTES:
            _memory.append(memory)
        _threads.warn_if_slow()


@functools.cache
def _conductor():
    return _indirect.address_for(_conduct, (types.int64, types.int64))


@jit(parallel=True)
def _replay(conduct, workers, words, sizes, memory, given):
    block = _begin(words, sizes, memory, given)
    for w in prange(workers):
        _indirect.call(conduct, (block, np.int64(w)))


@jit()
def _begin(words, sizes, memory, given):
    """Put the words into memory, with addresses in place of distances; do the first steps. Returns their address."""
    size, counter_bytes, asleep = sizes
    skipped = -np.int64(memory.ctypes.data) % _recorder.ALIGNMENT
    own = memory[skipped:]
    own[:counter_bytes] = 0
    block = own[size : size + 8 * len(words)].view(np.int64)
    starts = np.zeros(_recorder.GIVEN + len(given), np.int64)
    starts[_recorder.MEMORY] = own.ctypes.data
    starts[_recorder.WORDS] = block.ctypes.data
    for i, array in enumerate(given):
        starts[_recorder.GIVEN + i] = array.ctypes.data
    for i in range(len(words)):
        block[i] = words[i, 1] + starts[words[i, 0]]
    if not asleep:
        block[2] = 0  # nobody is woken
    for step in range(block[0]):
        at = _HEAD + 4 * step
        _indirect.call(block[at], (block[at + 1], np.int64(0)))
    return np.int64(block.ctypes.data)


@jit(inner=True)
def _conduct(block, thread):
    """What each thread does."""
    word = _intrinsics.word
    steps, arrivals = word(block + 8), word(block + 16)
    if arrivals:
        _cpus.arrive(arrivals)
    step = block + 8 * _HEAD + 32 * word(block)
    for number in range(steps):
        entered, left = word(step + 16), word(step + 24)
        if arrivals:
            _cpus.let_come(arrivals)
        _intrinsics.next_task(entered)
        _indirect.call(word(step), (word(step + 8), thread))
        _intrinsics.next_task(left)
        pauses = 0
        while number + 1 < steps:
            ended = word(left)  # is read first: those who enter later find no task
            if ended == word(entered):
                break
            _intrinsics.pause()
            pauses += 1
            if pauses % _PAUSES == 0:
                _intrinsics.let_others_run()
        step += 32
    if arrivals:
        _cpus.end(arrivals)
