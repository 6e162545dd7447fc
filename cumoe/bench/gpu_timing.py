"""
Times of a GPU: each contender is one CUDA graph, replayed over a cold L2 cache between two CUDA events.

Before each replay 256 MB are written, which drives everything else out of L2; the write is not timed. It
also takes the GPU so long that the host has queued the replay before the clock starts, so no time of the
host is in a number. An empty graph measures about 3 us this way: the least that any figure can be.
What was written goes back to memory while the replay runs, tens of megabytes of it; a layer of a model comes
after others that were read. So a burst can be `clean`: the write is followed by a read of as many bytes.

A GPU under a heavy load lowers its clock after a tenth of a second. So there are two figures for long
kernels: `burst`, a few replays after a pause, and `sustained`, all contenders in turn until the clock has settled.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from cumoe.bench import gpu_arrays
from cumoe.bench.timing import Timing

FLUSH_BYTES = 256 << 20
REPEATS = 20

HUNG = 3  # exit status

_HUNG_S = 60
_SPIN_S = 0.001
_WARM_CALLS = 3
_WARM_S = 0.05  # an idle GPU runs at a fraction of its clock and takes some milliseconds to wake
_UNSETTLED = 0.4  # of a sustained run: its first part, in which the clock still falls
_QUEUED_US = 20e3  # of work between two waits of a sustained run, so that the waits do not count
_QUEUED_CALLS = 40

Replay = Callable[[], object]


class Stopwatch:
    """
    The one stream of a run, and the clock beside it.

    All work of a run, allocations too, belongs inside ``with stopwatch:``, CuPy's and torch's: then the
    order of the stream is the order of everything, and no memory is handed out again too early.
    """

    def __init__(self) -> None:
        import cupy as cp

        self._cp = cp
        self.stream = cp.cuda.Stream(non_blocking=True)
        self._open = contextlib.ExitStack()
        with self.stream:
            self._flush = cp.empty(FLUSH_BYTES, cp.uint8)

    @functools.cached_property
    def _others(self) -> tuple[Any, Any]:
        """What a clean burst reads, and where its sum goes."""
        return self._cp.zeros(FLUSH_BYTES // 4, self._cp.uint32), self._cp.zeros(1, self._cp.uint64)

    def __enter__(self) -> "Stopwatch":
        self._cp.cuda.Device().synchronize()
        self._open.enter_context(self.stream)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def also_for_torch(self) -> None:
        """Make torch use this stream too, until the run ends."""
        import torch

        if torch.cuda.current_stream().cuda_stream == self.stream.ptr:
            return
        self._open.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(self.stream.ptr)))

    def wait(self) -> None:
        """Wait until the GPU has done everything; end the process if it never does."""
        done = self._cp.cuda.Event(disable_timing=True)
        done.record(self.stream)
        started = time.perf_counter()
        while not done.done:
            waited = time.perf_counter() - started
            if waited > _HUNG_S:
                # every call would wait for the kernel that hangs, those of an orderly end too
                print(f"cumoe: the GPU has not answered for {_HUNG_S} s: giving up", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(HUNG)
            if waited > _SPIN_S:
                time.sleep(_SPIN_S)

    def capture(self, call: Callable[[], Any]) -> Replay:
        """Turn `call` into a graph. It runs twice before, so that kernels are compiled and memory is at hand."""
        for _ in range(2):
            call()
        self.wait()
        self.stream.begin_capture()
        try:
            kept = call()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to hear of
                self.stream.end_capture()
            raise
        return _Graph(self.stream.end_capture(), self.stream, (call, kept))

    def burst(
        self, replay: Replay, repeats: int = REPEATS, idle_s: float = 0.0, flush: bool = True, clean: bool = False
    ) -> Timing:
        """Time `repeats` replays after a warm-up and a pause of `idle_s`; `clean`: they find nothing to write back."""
        started, calls = time.perf_counter(), 0
        while calls < _WARM_CALLS or time.perf_counter() - started < _WARM_S:
            self._cold(flush)
            replay()
            self.wait()
            calls += 1
        time.sleep(idle_s)
        return Timing(tuple(self._timed([replay] * repeats, flush, clean)))

    def sustained(self, replays: Mapping[str, Replay], seconds: float, flush: bool = True) -> dict[str, Timing]:
        """Time all in turn for `seconds`; only what comes after the clock has settled is counted."""
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in replays}
        names, rounds = list(replays), 1
        started, now = time.perf_counter(), 0.0
        while now < seconds or len(samples[names[0]]) < 2:
            times = self._timed([replays[name] for name in names] * rounds, flush)
            now = time.perf_counter() - started
            for name, time_us in zip(names * rounds, times, strict=True):
                samples[name].append((now, time_us))
            rounds = max(1, min(_QUEUED_CALLS, int(_QUEUED_US * rounds / max(sum(times), 1e-9))))
        return {name: Timing(settled(taken)) for name, taken in samples.items()}

    def _timed(self, replays: list[Replay], flush: bool, clean: bool = False) -> list[float]:
        """Microseconds of each, queued without a wait between them."""
        cuda = self._cp.cuda
        events = [(cuda.Event(), cuda.Event()) for _ in replays]
        for replay, (start, end) in zip(replays, events, strict=True):
            self._cold(flush, clean)
            start.record(self.stream)
            replay()
            end.record(self.stream)
        self.wait()
        return [1e3 * cuda.get_elapsed_time(start, end) for start, end in events]

    def _cold(self, flush: bool, clean: bool = False) -> None:
        if flush:
            self._flush.data.memset_async(0, FLUSH_BYTES, self.stream)
        if clean:
            gpu_arrays.read_sum(*self._others)


class _Graph:
    """A captured graph that keeps alive what it reads and writes: what its call refers to, and what that returned."""

    def __init__(self, graph: Any, stream: Any, kept: Any) -> None:
        self._graph, self._stream, self._kept = graph, stream, kept

    def __call__(self) -> None:
        self._graph.launch(self._stream)


def settled(taken: list[tuple[float, float]]) -> tuple[float, ...]:
    """The times of (when, time) samples that were taken after the first part of the run; at least the last one."""
    last = taken[-1][0]
    return tuple(time_us for when, time_us in taken if when >= _UNSETTLED * last)
