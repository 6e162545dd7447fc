"""Threads of recorded calls find CPUs of their own, and may run where they might before."""

import contextlib
import os
import sys
import threading
import time

import numpy as np
import pytest
from strategies import make_problem
from test_recorded import call, prepare, recorded

from cumoe.cpu import _intrinsics
from cumoe.cpu._jit import jit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no name for it")


@jit()
def move(cpus):
    cpus[0] = _intrinsics.cpu()
    _intrinsics.move_from(cpus[0])
    cpus[1] = _intrinsics.cpu()


@pytest.mark.parametrize("allowed", ["all", "one"])
def test_a_thread_moves_to_another_cpu_if_it_may(allowed):
    found = {}

    def run():  # in a thread of its own: whose CPUs are set
        all_cpus = os.sched_getaffinity(0)
        cpus = all_cpus if allowed == "all" else {max(all_cpus)}
        os.sched_setaffinity(0, cpus)
        places = np.full(2, -7)
        move(places)
        found.update(places=places.tolist(), before=cpus, after=os.sched_getaffinity(0))

    move(np.empty(2, np.int64))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    first, second = found["places"]
    assert found["after"] == found["before"] and {first, second} <= found["before"]
    assert (first == second) == (len(found["before"]) == 1)


def test_calls_leave_the_cpus_of_every_thread_as_they_were():
    def cpus_of_threads():
        found = {}
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                found[task] = os.sched_getaffinity(int(task))
        return found

    problem = make_problem(64, 4, 8, 256, 192, "bfloat16")
    prepared = prepare(problem)
    expected = {call(problem, prepared).tobytes() for _ in range(3)}
    before = cpus_of_threads()
    for _ in range(30):
        time.sleep(0.002)  # long enough for threads to fall asleep
        expected.add(call(problem, prepared).tobytes())
    assert recorded(prepared)[0]._words[2].any() and len(expected) == 1  # there is enough to do
    after = cpus_of_threads()
    assert {task: after[task] for task in before.keys() & after.keys()} == {
        task: before[task] for task in before.keys() & after.keys()
    }
