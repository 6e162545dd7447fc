"""NumPy in CuPy's clothes: what the GPU benchmarks ask of CuPy, on the host, so that their Python runs everywhere."""

import contextlib
import importlib
import importlib.machinery
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np

from cumoe import _arrays
from cumoe.bench import gpu_arrays, gpu_timing

log = []  # (what, stream) of everything that a stream was given


class Pointer:
    """Memory that is only ever set."""

    def memset_async(self, value, size, stream):
        """Note it."""
        log.append(("flush", stream))


class Stream:
    """In order, at once."""

    def __init__(self, non_blocking=False):
        self.ptr, self.capturing, self.depth = 7, False, 0

    def __enter__(self):
        self.depth += 1
        return self

    def __exit__(self, *error):
        self.depth -= 1

    def begin_capture(self):
        """Start."""
        self.capturing = True

    def end_capture(self):
        """Stop."""
        self.capturing = False
        return Graph()


class Graph:
    """Knows when it was launched."""

    def launch(self, stream):
        """Note it."""
        log.append(("launch", stream))


class Event:
    """A time."""

    done = True

    def __init__(self, disable_timing=False):
        self.timing = not disable_timing

    def record(self, stream):
        """Take it."""
        if stream.capturing:
            raise RuntimeError("an event while capturing")
        self.when = time.perf_counter()
        if self.timing:
            log.append(("event", stream))


class Device:
    """A small H200."""

    id = 0
    mem_info = (64 << 30, 64 << 30)
    attributes = {"MultiProcessorCount": 2}  # noqa: RUF012
    pci_bus_id = "0000:00:00.0"

    def synchronize(self):
        """Nothing is ever pending."""


def _normal(grid, block, arguments):
    out, count, scale, seed, kind = arguments
    assert count == out.size
    values = np.random.default_rng([int(seed)]).standard_normal(out.shape, np.float32) * scale
    types = {0: "float32", 1: "bfloat16", 2: "float16"}
    out[...] = values.astype(types[int(kind)]).view(out.dtype)


def _read_sum(grid, block, arguments):
    words, count, total = arguments
    total[0] += words[: 4 * int(count)].sum(dtype=np.uint64)


_FUNCTIONS = {"normal": _normal, "read_sum": _read_sum, "nothing": lambda grid, block, arguments: None}


def _empty(shape, dtype=np.float32):
    if shape == gpu_timing.FLUSH_BYTES:
        return SimpleNamespace(data=Pointer())
    return np.empty(shape, dtype)


def install(monkeypatch, device="NVIDIA H200"):
    """Put the stand-in into `sys.modules` for one test."""
    log.clear()
    monkeypatch.setitem(sys.modules, "cupy", _module(device))
    monkeypatch.setattr(gpu_timing, "_WARM_S", 0.0)
    for name in ("_function", "_blocks"):
        monkeypatch.setattr(gpu_arrays, name, getattr(gpu_arrays, name).__wrapped__)
    return sys.modules["cupy"]


def _module(device):
    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: {"name": device.encode(), "major": 9, "minor": 0, "totalGlobalMem": 1 << 30},
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
    )
    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        Device=type("Device", (Device,), {}),  # its own, whose attributes a test may change
        runtime=runtime,
        is_available=lambda: True,
        get_elapsed_time=lambda start, end: 1e3 * (end.when - start.when),
    )
    names = ("asarray", "zeros", "ones", "empty_like", "matmul", "sum", "sqrt", "abs", "stack")
    types = ("uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64")
    module = ModuleType("cupy")
    module.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    vars(module).update(
        {name: getattr(np, name) for name in names + types},
        empty=_empty,
        cuda=cuda,
        RawModule=lambda code: SimpleNamespace(get_function=_FUNCTIONS.__getitem__),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=contextlib.nullcontext),
    )
    return module


def cpu_rooms(monkeypatch):
    """The rooms of the CPU in place of those of the GPU, which has a list of tiles besides."""
    cpu = importlib.import_module("cumoe.cpu.permute")

    def sort_by_expert(topk_ids, expert_map, offsets, order, inverse, schedule, block_rows):
        cpu.sort_by_expert(topk_ids, expert_map, offsets, order, inverse)
        schedule[0] = sum(-(-np.diff(offsets) // block_rows))

    permute = SimpleNamespace(sort_by_expert=sort_by_expert, schedule_size=lambda pairs, experts, rows: 4)
    grouped_gemm = SimpleNamespace(block_rows=lambda *sizes: 8, explain=lambda *sizes: ())
    rooms = {"permute": permute, "grouped_gemm": grouped_gemm, "pack": importlib.import_module("cumoe.cpu.pack")}
    room = _arrays.room
    monkeypatch.setattr(_arrays, "room", lambda xp, name: room(xp, name) if xp is np else rooms[name])
