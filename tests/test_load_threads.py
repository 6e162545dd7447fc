"""Launches of one kernel by many threads, without a GPU: what the driver is told about shared memory."""

import threading
import time

import pytest

from cumoe.rawkernels import _load

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


def test_threads_never_lower_the_shared_memory_of_a_kernel(monkeypatch):
    told = []

    def tell(function, which, num_bytes):
        time.sleep(1e-3 * (num_bytes % 3))  # so that a smaller wish may come after a larger one
        told.append(num_bytes)
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuFuncSetAttribute", tell)
    kernel = object.__new__(_load.Kernel)
    kernel.name, kernel._function, kernel._shared, kernel._growing = "some", None, 0, threading.Lock()
    sizes, start = [7, 3, 11, 2, 10, 5, 8, 1], threading.Barrier(8)

    def launch(num_bytes):
        start.wait()
        kernel._allow(num_bytes)

    threads = [threading.Thread(target=launch, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == sorted(told)
    assert told[-1] == kernel._shared == max(sizes)
