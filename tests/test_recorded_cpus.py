"""Threads of recorded calls find CPUs of their own, and may run where they might before."""

import contextlib
import os
import sys
import threading
import time

import numba
import numpy as np
import pytest
from strategies import make_problem
from test_recorded import GENERAL, call, prepare, recorded

from cumoe.cpu import _cpus, _intrinsics, _region
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


@pytest.mark.parametrize("asleep", [True, False])
def test_threads_of_a_product_of_its_own_find_cpus_after_a_pause_only(monkeypatch, asleep):
    seen = []
    run = _region.run

    def region(worker, given, workers, arrivals):
        seen.append((workers, arrivals != 0))
        run(worker, given, workers, arrivals)

    monkeypatch.setattr(_region, "run", region)
    monkeypatch.setattr(_cpus, "_THREADS", numba.get_num_threads())
    monkeypatch.setattr(_cpus, "_ASLEEP_S", 0.5)
    problem = make_problem(64, 4, 8, 256, 192, "bfloat16")
    prepared = prepare(problem)
    for _ in range(2):
        _cpus._ended[0] = time.monotonic() - (1 if asleep else 0)
        call(problem, prepared, **GENERAL)
    expected = [asleep, False] * 2  # the second product of a call finds them awake
    assert [together for _, together in seen] == (expected if seen[0][0] > 1 else [False] * 4)


def test_a_call_of_one_thread_does_not_say_that_the_others_are_awake():
    problem, default = make_problem(64, 4, 8, 256, 192, "bfloat16"), numba.get_num_threads()
    prepared = prepare(problem)
    for _ in range(3):
        call(problem, prepared)
    try:
        for count in range(1, default + 1):
            numba.set_num_threads(count)
            _cpus._ended[0] = 0.0
            call(problem, prepared)
            assert (_cpus._ended[0] > 0) == (count > 1)
    finally:
        numba.set_num_threads(default)
    assert len(recorded(prepared)) == 1
