"""
The best elements of a row, one after the other: greatest first, equal ones by the lower index.

A number and its index become one uint64: the number's bits, made to grow with the number, above the
complement of the index. No two are equal, so the order is total and a plain maximum finds both. NaN comes
last, after -inf; -0 equals +0. Maxima of blocks of 16 are kept, so that taking one element looks at E / 16
maxima and at one block.
"""

import numpy as np

from cumoe.cpu._jit import jit

BLOCK = 16

_NOTHING = np.uint64(0)  # below every packed number
_SIGN = np.uint32(0x80000000)
_ALL = np.uint32(0xFFFFFFFF)
_INFINITY = np.uint32(0x7F800000)


@jit()
def room_for(num_elements):
    """Return (elements, blocks) of the two scratch arrays for a row of this length."""
    num_blocks = (num_elements + BLOCK - 1) // BLOCK
    return num_blocks * BLOCK, num_blocks


@jit()
def pack(values, packed):
    """Pack a row; what is left of `packed` after it must hold 0."""
    for e in range(values.size):
        bits = np.float32(values[e] + np.float32(0)).view(np.uint32)  # + 0 makes -0 to +0
        grows = np.uint32(bits ^ (_ALL if bits >= _SIGN else _SIGN))
        is_nan = np.uint32(bits & ~_SIGN) > _INFINITY
        grows = np.uint32(np.uint32(0) if is_nan else grows)
        packed[e] = (np.uint64(grows) << np.uint64(32)) | np.uint64(np.uint32(_ALL - np.uint32(e)))


@jit()
def _block_maximum(packed, b):
    best = _NOTHING
    for i in range(b * BLOCK, b * BLOCK + BLOCK):
        best = packed[i] if packed[i] > best else best
    return best


@jit()
def begin(packed, maxima):
    """Fill the maxima of a packed row."""
    for b in range(maxima.size):
        maxima[b] = _block_maximum(packed, b)


@jit()
def take(packed, maxima):
    """Return the index of the best element that is left, and take it out."""
    best = _NOTHING
    for b in range(maxima.size):
        best = maxima[b] if maxima[b] > best else best
    index = np.int64(np.uint32(_ALL - np.uint32(best & np.uint64(0xFFFFFFFF))))
    packed[index] = _NOTHING
    maxima[index // BLOCK] = _block_maximum(packed, index // BLOCK)
    return index
