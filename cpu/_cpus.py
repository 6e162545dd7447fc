"""
Two threads of a call on two CPUs.

Linux may put a woken thread behind the one that woke it although the other CPU is idle, and move it only when it looks
at its queues again, after some milliseconds. Here the thread that comes first lets others run, and again before each
step of a recorded call until the other is there; one that finds itself on the same CPU leaves it. Two threads only: of
more, one that moves may meet another. Threads that are still awake stay where they are.
"""

import time

import numpy as np

from cumoe.cpu import _intrinsics
from cumoe.cpu._jit import jit

_THREADS = 2
_MANY_PRODUCTS = 1 << 21  # take longer than to move a thread
_ASLEEP_S = 0.0005  # after so long without a call threads are asleep
_ended = [0.0]  # when the last product or recorded call of several threads did


def are_asleep():
    """Whether the threads have had nothing to do for so long that they must be woken."""
    return time.monotonic() - _ended[0] > _ASLEEP_S


def were_awake(workers):
    """Say that so many threads have just ended their work: of one, the others may be asleep."""
    if workers > 1:
        _ended[0] = time.monotonic()


def is_of_use(workers, products):
    """Whether so many threads should find CPUs for so much work: elements of products times K."""
    return workers == _THREADS and products >= _MANY_PRODUCTS


@jit()
def arrive(arrivals):
    """Begin the part of a thread; at the address `arrivals` are two int64 that are zero in the beginning."""
    here = _intrinsics.cpu()
    if here < 0:
        return
    if _intrinsics.next_task(arrivals) == 0:
        _intrinsics.put_word(arrivals + 8, here + 1)
        _intrinsics.let_others_run()  # who waits behind this thread comes now, and goes
    elif _intrinsics.word(arrivals + 8) == here + 1:
        _intrinsics.move_from(here)


@jit()
def let_come(arrivals):
    """Let others run once more if the other thread is not there yet: it may wait behind this one."""
    if _intrinsics.word(arrivals) == 1:
        _intrinsics.let_others_run()


@jit()
def end(arrivals):
    """End it: this thread may do the part of the other too, and who is late stays where it is."""
    _intrinsics.put_word(arrivals + 8, np.int64(0))
