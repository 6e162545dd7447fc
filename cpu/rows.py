"""
Run a loop over rows: on this thread if there is little to do, else in blocks of rows on all threads.

A row loop is a function ``loop(first, last, arguments)`` that writes rows first..last-1 and
nothing else, so that its bits depend on no other row and on no thread count.
"""

import functools

import numba

from cumoe.cpu import _recorder, _region
from cumoe.cpu._jit import jit

_PARALLEL_ELEMENTS = 1 << 15  # below this, waking the threads costs more than it saves


def run(loop, num_rows, num_elements, arguments, **constants):
    """Run `loop`, compiled with `constants`, over all rows; `num_elements` says how much work that is."""
    if num_rows == 0:
        return
    compiled, recorder = _compiled(loop, tuple(sorted(constants.items()))), _recorder.current()
    if recorder is not None:
        recorder.rows(compiled, num_rows, arguments)
    elif num_elements < _PARALLEL_ELEMENTS:
        compiled(0, num_rows, arguments)
    else:
        workers = numba.get_num_threads()
        _region.run_rows(compiled, num_rows, min(num_rows, 8 * workers), arguments, workers)


@functools.cache
def _compiled(loop, constants):
    return jit(**dict(constants))(loop)
