"""
The parallel region of everything that is not recorded: one compiled loop, whatever its threads do.

To Numba a parallel loop is a function of all that it touches, and to compile one takes seconds. Here its threads are
handed an address and words (`_frozen.py`), from which a small function of those types reads the arguments.
"""

import functools

import numpy as np
from numba import _dispatcher, prange, types

from cumoe.cpu import _cpus, _frozen, _indirect, _intrinsics, _thunks
from cumoe.cpu._frozen import Address, Each
from cumoe.cpu._jit import jit

_KNOWN: dict[tuple[object, bytes], tuple[int, int]] = {}  # finding types takes fifty times as long as to look here


def run(function, given, workers, arrivals):
    """
    Call `function` once in each of the threads, with the arguments `given`.

    They may be an `Each` or an `Address`. `arrivals` is the address for `_cpus.arrive`, or 0.
    """
    key = function, _dispatcher.compute_fingerprint(tuple(map(_of_one_thread, given)))
    if key not in _KNOWN:
        _KNOWN[key] = _thunks.whole(function, _frozen.kind(given))
    where, thunk = _KNOWN[key]
    _start(thunk, (where, given), workers, arrivals)


def run_rows(loop, num_rows, blocks, arguments, workers):
    """Call a row loop (first, last, arguments) for blocks of rows, which the threads take one after the other."""
    key = loop, _dispatcher.compute_fingerprint(arguments)
    if key not in _KNOWN:
        _KNOWN[key] = _thunks.rows(loop, _frozen.kind(arguments))
    where, thunk = _KNOWN[key]
    counter = np.zeros(8, np.int64)
    _start(thunk, (where, Address(counter), num_rows, blocks, arguments), workers, 0)


def _of_one_thread(value):
    """An argument as a thread gets it, for its type."""
    if isinstance(value, Each):
        return value.array[0]
    return 0 if isinstance(value, Address) else value


def _start(thunk, given, workers, arrivals):
    words = [thunk, arrivals]
    _frozen.freeze(given, _here, words)
    _on_all_threads(_entry(), np.array(words, np.int64), workers)


def _here(array):
    return array.ctypes.data if array.size else 0


@functools.cache
def _entry():
    return _indirect.address_for(_enter, (types.int64, types.int64))


@jit(parallel=True)
def _on_all_threads(enter, block, workers):
    for w in prange(workers):
        _indirect.call(enter, (np.int64(block.ctypes.data), np.int64(w)))


@jit(inner=True)
def _enter(block, thread):
    """What each thread does."""
    arrivals = _intrinsics.word(block + 8)
    if arrivals:
        _cpus.arrive(arrivals)
    _indirect.call(_intrinsics.word(block), (block + 16, thread))
    if arrivals:
        _cpus.end(arrivals)
