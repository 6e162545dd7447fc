"""
Compiled functions (address of words, number of the thread) that read the arguments of another one and call it.

Their words begin with the address of what they call, so that one of them serves every function of the same arguments.
"""

import functools

import numpy as np
from numba import types

from cumoe.cpu import _frozen, _indirect, _intrinsics
from cumoe.cpu._jit import jit


def whole(function, frozen):
    """Where the machine code of `function` begins, and of what calls it once, for arguments of the type `frozen`."""
    return _indirect.address_for(function, tuple(frozen)), _reader(_whole, frozen)


def rows(loop, frozen):
    """The same for a row loop: its words go on with a counter, the rows, and in how many blocks they are taken."""
    return _indirect.address_for(loop, (types.int64, types.int64, frozen)), _reader(_rows, frozen)


@functools.cache
def _reader(template, frozen):
    return _indirect.address_for(jit(inner=True, thaw=_frozen.thaw(frozen))(template), (types.int64, types.int64))


# ---- templates; jit(...) gives the names below their values ----

thaw = None


def _whole(block, thread):
    _indirect.call(_intrinsics.word(block), thaw(block + 8, thread))


def _rows(block, thread):
    loop, counter = _intrinsics.word(block), _intrinsics.word(block + 8)
    num_rows, blocks = _intrinsics.word(block + 16), _intrinsics.word(block + 24)
    while True:
        b = _intrinsics.next_task(counter)
        if b >= blocks:
            break
        first, last = np.int64(b * num_rows // blocks), np.int64((b + 1) * num_rows // blocks)
        _indirect.call(loop, (first, last, thaw(block + 32, thread)))
