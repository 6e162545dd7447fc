"""
What a GPU can do at most: reading its memory, and one large matrix product.

    floor    of a problem = max(bytes / read rate, operations / product rate): no method can be faster

Two sets of ceilings. `RECORDED` are those of one NVIDIA H200 on a good day; fractions of that floor can be
compared between runs and methods. `measure` takes those of this machine and this minute, each of them twice:
the best of a burst, and what is left after a second of load, when the power limit has lowered the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cumoe.bench import gpu_arrays
from cumoe.bench.gpu_clocks import Watch
from cumoe.bench.gpu_timing import Stopwatch
from cumoe.bench.timing import Timing

READ_BYTES = 4 << 30  # a quarter of what is free, where that is less
PRODUCT_SIZE = 8192
_IDLE_S = 0.2
_MEGA, _TERA = 1e6, 1e12


@dataclass(frozen=True)
class Limits:
    """Bytes and operations per second."""

    read: float
    product: float

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """Microseconds below which a problem of so many bytes and operations cannot go."""
        return max(num_bytes / self.read, flops / self.product) * _MEGA

    def bound(self, num_bytes: int, flops: int) -> str:
        """Which of the two limits holds: "memory" or "compute"."""
        return "memory" if num_bytes / self.read >= flops / self.product else "compute"


# The sum of 2 G bfloat16 numbers; cuBLAS, 8192 x 8192 x 8192, random numbers, a burst of launches.
RECORDED_DEVICE = "NVIDIA H200"
RECORDED = {
    "bfloat16": Limits(4.22 * _TERA, 795 * _TERA),
    "float16": Limits(4.22 * _TERA, 795 * _TERA),
}


def recorded(device: str, dtype: str) -> Limits | None:
    """The recorded ceilings, for the device that they belong to."""
    return RECORDED.get(dtype) if device == RECORDED_DEVICE else None


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of this run; `sm_mhz` and `watts` are those at the end of the sustained product."""

    best: Limits
    sustained: Limits
    product_by: str
    empty_graph_us: float
    sm_mhz: float | None
    watts: float | None

    def facts(self) -> dict[str, str]:
        """Lines for the header of a result file."""
        return {
            "ceiling read": f"best {self.best.read / _TERA:.3f} TB/s, sustained {self.sustained.read / _TERA:.3f} TB/s",
            "ceiling product": f"best {self.best.product / _TERA:.0f} TFLOP/s, sustained "
            f"{self.sustained.product / _TERA:.0f} TFLOP/s at {_number(self.sm_mhz)} MHz, {_number(self.watts)} W, "
            f"by {self.product_by}",
            "empty graph": f"{self.empty_graph_us:.2f} us",
        }


def measure(stopwatch: Stopwatch, dtype: str, sustained_s: float = 1.0) -> Ceilings:
    """Measure both limits for matrices of `dtype`; takes about twice `sustained_s` and a second."""
    read, num_bytes = _read(stopwatch)
    read_burst, read_load, _ = _twice(stopwatch, read, sustained_s / 2)
    del read
    product, name = _product(stopwatch, dtype)
    burst, load, watch = _twice(stopwatch, product, sustained_s)
    nothing = stopwatch.burst(stopwatch.capture(gpu_arrays.nothing))
    flops = 2 * PRODUCT_SIZE**3
    return Ceilings(
        Limits(num_bytes / read_burst.best_us * _MEGA, flops / burst.best_us * _MEGA),
        Limits(num_bytes / read_load.median_us * _MEGA, flops / load.median_us * _MEGA),
        name,
        nothing.median_us,
        watch.sm_mhz,
        watch.watts,
    )


def _twice(stopwatch: Stopwatch, run: Callable[[], object], sustained_s: float) -> tuple[Timing, Timing, Watch]:
    burst = stopwatch.burst(run, idle_s=_IDLE_S, flush=False)
    with Watch() as watch:
        load = stopwatch.sustained({"": run}, sustained_s, flush=False)[""]
    return burst, load, watch


def _read(stopwatch: Stopwatch) -> tuple[Callable[[], object], int]:
    """One read of an array that no cache holds, after a look that all of it is read; and its bytes."""
    import cupy as cp

    num_bytes = min(READ_BYTES, int(cp.cuda.Device().mem_info[0]) // 64 * 16)
    words, total = cp.ones(num_bytes // 4, cp.uint32), cp.zeros(1, cp.uint64)
    gpu_arrays.read_sum(words, total)
    if int(total[0]) != words.size:
        raise RuntimeError(f"the sum of {words.size} ones must be {words.size}, got {int(total[0])}")
    return stopwatch.capture(lambda: gpu_arrays.read_sum(words, total)), num_bytes


def _product(stopwatch: Stopwatch, dtype: str) -> tuple[Callable[[], object], str]:
    """One large product by cuBLAS, through torch where it is installed, and what it is called."""
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    a, b = gpu_arrays.normal(shape, dtype, seed=1), gpu_arrays.normal(shape, dtype, seed=2)
    try:
        import torch

        from cumoe.bench.gpu_peers import as_torch

        if not torch.cuda.is_available():
            raise ImportError("torch without CUDA")
        stopwatch.also_for_torch()
        a_t, b_t = as_torch(a), as_torch(b)
        out_t = torch.empty_like(a_t)
        return lambda: torch.mm(a_t, b_t, out=out_t), f"cuBLAS, {dtype}, torch"
    except ImportError:
        import cupy as cp

        if dtype == "bfloat16":  # CuPy may not multiply these; float16 goes at the same rate
            dtype = "float16"
            a, b = gpu_arrays.normal(shape, dtype, seed=1), gpu_arrays.normal(shape, dtype, seed=2)
        out = cp.empty_like(a)
        return lambda: cp.matmul(a, b, out=out), f"cuBLAS, {dtype}, CuPy"


def _number(value: Any) -> str:
    return "?" if value is None else f"{value:.0f}"
