"""
Run a loop over rows: on this thread if there is little to do, else in blocks of rows on all threads.

A row loop is a function ``loop(first, last, arguments)`` that writes rows first..last-1 and
nothing else, so that its bits depend on no other row and on no thread count.
"""

import functools

import numba

from cumoe.cpu._jit import jit

_PARALLEL_ELEMENTS = 1 << 15  # below this, waking the threads costs more than it saves


def run(loop, num_rows, num_elements, arguments, **constants):
    """Run `loop`, compiled with `constants`, over all rows; `num_elements` says how much work that is."""
    if num_rows == 0:
        return
    names = tuple(sorted(constants.items()))
    if num_elements < _PARALLEL_ELEMENTS:
        _serial(loop, names)(0, num_rows, arguments)
    else:
        # the number of threads is asked for here: a loop that asks itself cannot be kept on disk
        num_blocks = min(num_rows, 8 * numba.get_num_threads())
        _parallel(loop, names)(num_rows, num_blocks, arguments)


@functools.cache
def _serial(loop, names):
    return jit(**dict(names))(loop)


@functools.cache
def _parallel(loop, names):
    # LOOP already holds the constants; here they only tell the compiled files apart
    return jit(parallel=True, LOOP=_serial(loop, names), **dict(names))(_blocks)


def _blocks(num_rows, num_blocks, arguments):
    for b in numba.prange(num_blocks):
        LOOP(b * num_rows // num_blocks, (b + 1) * num_rows // num_blocks, arguments)  # noqa: F821
