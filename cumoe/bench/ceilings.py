"""
What the machine can do at most, measured in the same run as the numbers that are held against it.

    stream   bytes per second of reading memory that no cache holds
    peak     operations per second of the matrix micro-kernels with their operands in the nearest caches
    floor    of a problem = max(bytes / stream, operations / peak): no method is faster for long

The stream is the usual rate of a moment, not the best, so a single call may go below its floor.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

_CACHES_OVER = 3  # the streamed array is this many times the last-level cache, where memory allows
_LEAST_BYTES = 256 << 20
_MOST_BYTES = 2 << 30
_RUN_FLOPS = 200_000_000  # of one thread between two looks at the clock
_MOST_SUMS = 32 * 64  # of a tile
_OPERAND_BYTES = (16 << 10, 32 << 10, 128 << 10)  # few: all in L1; many: less overhead per step of K. The best counts.


@dataclass(frozen=True)
class Ceilings:
    """Measured limits; `peak_kernel` says what measured the peak."""

    stream_gbs: float
    stream_bytes: int
    peak_gflops: float
    peak_kernel: str
    threads: int

    def floor_s(self, num_bytes: int, flops: int) -> float:
        """Seconds of a problem of so many bytes and operations at these limits."""
        return max(num_bytes / self.stream_gbs, flops / self.peak_gflops) * 1e-9

    def around(self, after: "Ceilings") -> "Ceilings":
        """Limits of the time between two looks: the rate of reading between theirs, the peak that either saw."""
        stream, peak = (self.stream_gbs + after.stream_gbs) / 2, max(self.peak_gflops, after.peak_gflops)
        return replace(self, stream_gbs=stream, peak_gflops=peak)

    def bound(self, num_bytes: int, flops: int) -> str:
        """Which of the two limits holds: "memory" or "compute"."""
        return "memory" if num_bytes / self.stream_gbs >= flops / self.peak_gflops else "compute"


def measure(products: str, available_bytes: int | None = None, budget_s: float = 1.2) -> Ceilings:
    """
    Measure both limits of this machine's CPU for products of a dtype or "int8", in about `budget_s`.

    The streamed array takes at most a quarter of `available_bytes` and is freed at once; to fill it takes longer.
    """
    import numba

    stream, num_bytes = stream_read(stream_bytes(available_bytes), budget_s / 2)
    peak, kernel = int8_peak(budget_s / 2) if products == "int8" else matmul_peak(products, budget_s / 2)
    return Ceilings(stream, num_bytes, peak, kernel, numba.get_num_threads())


def stream_bytes(available_bytes: int | None = None) -> int:
    """Bytes that a streaming read should cover here: several times the last-level cache."""
    wanted = min(_MOST_BYTES, max(_LEAST_BYTES, _CACHES_OVER * last_level_cache_bytes()))
    return wanted if available_bytes is None else max(1 << 20, min(wanted, available_bytes // 4))


def last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports for the first CPU; 0 if it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return max(sizes)


def stream_read(num_bytes: int, budget_s: float = 0.6) -> tuple[float, int]:
    """
    GB/s of reading an array of `num_bytes` once, all threads together, median of a few passes; and its size.

    Not the best of them: on shared machines the rate depends on what others read, and changes within seconds.
    """
    total = np.ones(max(1, num_bytes // 8), np.uint64)  # ones are written, so that every page is really there
    sums = _stream_loop()
    sums(total[:64])
    usual = statistics.median(_times(lambda: sums(total), budget_s))
    return total.nbytes / usual * 1e-9, total.nbytes


def run_parallel_loop() -> None:
    """Run a parallel loop once, so that Numba has chosen its threading layer."""
    _stream_loop()(np.ones(64, np.uint64))


def matmul_peak(dtype: str, budget_s: float = 0.6) -> tuple[float, str]:
    """GFLOP/s of the micro-kernel that serves `dtype` here, all threads together; and the kernel's name."""
    from cumoe.cpu import microkernel

    kernel = microkernel.choose(dtype)
    groups = kernel.max_rows // kernel.row_group
    row_bytes, flops = groups * kernel.row_step_bytes, 2 * kernel.max_rows * kernel.columns * kernel.k_step
    return _peak(_peak_loop(kernel), groups, row_bytes, kernel.panel_step_bytes, flops, budget_s), kernel.name


def int8_peak(budget_s: float = 0.6) -> tuple[float, str]:
    """Peak of int8 products; where they are multiplied as bfloat16, that of these, and named so."""
    from cumoe.cpu import coded_panels

    if not coded_panels.multiplies_integers():
        gflops, name = matmul_peak("bfloat16", budget_s)
        return gflops, f"{name} of bfloat16"
    kernel, step, step_bytes = _int8_kernel()
    flops = 2 * kernel.max_rows * coded_panels.COLUMNS * step
    gflops = _peak(_peak_loop(kernel), kernel.max_rows, 4 * kernel.max_rows, step_bytes, flops, budget_s)
    return gflops, "avx512vnni"


@functools.cache
def _int8_kernel() -> tuple[Any, int, int]:
    """The micro-kernel of int8 products, K of a step of it, and bytes of a panel; one, so that its loop is kept."""
    from cumoe.cpu import _vector_tile, coded_panels, microkernel

    layout = coded_panels.Layout("bytes", "", False, 0, 1)
    tile = layout.tile(True)
    kernel = microkernel.choose("bfloat16")
    kernel = kernel._replace(tile=_vector_tile.emit(tile), max_rows=tile.max_rows, row_group=1)
    return kernel, layout.step, layout.step_bytes


def _peak(loop: Any, row_groups: int, row_bytes: int, panel_bytes: int, flops: int, budget_s: float) -> float:
    """GFLOP/s of a kernel, of which a step reads so many bytes of all rows and of the panel; all threads together."""
    import numba

    from cumoe.cpu import _threads

    _threads.start()  # before Numba is asked for threads, or it would pick a layer of its own
    threads = numba.get_num_threads()
    gflops = []
    for num_bytes in _OPERAND_BYTES:
        steps = num_bytes // (panel_bytes + row_bytes)
        rows = np.zeros((threads, steps * row_bytes), np.uint8)
        panels = np.zeros((threads, steps * panel_bytes), np.uint8)
        sums = np.zeros((threads, _MOST_SUMS), np.float32)
        repeats = max(1, _RUN_FLOPS // (steps * flops))
        run = functools.partial(loop, rows, steps * row_bytes // row_groups, panels, steps, sums, repeats)
        run()
        gflops.append(threads * repeats * steps * flops / min(_times(run, budget_s / len(_OPERAND_BYTES))) * 1e-9)
    return max(gflops)


def _times(run: Callable[[], object], budget_s: float) -> list[float]:
    """Seconds of each of at least three runs."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


@functools.cache
def _stream_loop() -> Any:
    from numba import prange

    from cumoe.cpu._jit import jit

    @jit(parallel=True)
    def stream(values):  # type: ignore[no-untyped-def]
        pieces = 64
        sums = np.zeros(pieces, np.uint64)
        for piece in prange(pieces):
            # Indices that start at 0 are never negative: others are looked at one by one, and gathered.
            part = values[piece * values.size // pieces : (piece + 1) * values.size // pieces]
            # Integers, because a float sum keeps its order and so its latency.
            one = np.uint64(0)
            for i in range(part.size):
                one += part[i]
            sums[piece] = one
        return sums

    return stream


@functools.cache
def _peak_loop(kernel: Any) -> Any:
    from numba import prange

    from cumoe.cpu import _amx
    from cumoe.cpu._jit import jit

    release = _amx.release if kernel.name == "amx" else jit()(_nothing)
    repeat = jit(tile=kernel.tile, max_rows=kernel.max_rows, release=release)(_repeat)
    return jit(parallel=True, repeat=repeat, prange=prange)(_on_all_threads)


def _nothing() -> None:
    """The other kernels hold no registers to release."""


# ---- templates; jit(...) gives the names below their values ----

max_rows = 0
tile: Any = None
release: Any = None
repeat: Any = None
prange: Any = None


def _repeat(a, a_stride, panel, steps, sums, repeats):  # type: ignore[no-untyped-def]
    for _ in range(repeats):
        tile(max_rows, a, a_stride, panel, steps, sums.ctypes.data, sums.nbytes // 2, 0, panel, 0, 0, 0, a, 0)
    release()


def _on_all_threads(rows, a_stride, panels, steps, sums, repeats):  # type: ignore[no-untyped-def]
    for w in prange(sums.shape[0]):
        repeat(rows[w].ctypes.data, a_stride, panels[w].ctypes.data, steps, sums[w], repeats)
