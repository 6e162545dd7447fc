"""
Kernels in Python, run by Python: a thread of the host for each thread of the device.

`install` puts a stand-in for ``cumoe.rawkernels._device`` in place, so that the kernel files run as they are: warp
functions, barriers and shared memory included. It sees what a GPU would not tell: an index outside an array, an
argument of another type than the kernel's, memory touched before the kernel before this one has ended, lanes that do
not meet in a warp function, and two threads at one element without a barrier in between.
"""

import importlib.util
import inspect
import sys
import threading
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np

from cumoe.rawkernels import _numba

WARP = 32
PATIENCE_S = 30  # a barrier that not all threads reach
POISON = 0x5A
_KERNELS = Path(_numba.__file__).parent
_here = threading.local()  # of a thread: launch, block, thread, epochs, waited


class Array(np.ndarray):
    """Host memory that looks like an array of the device."""

    @property
    def data(self):
        """Where it lies."""
        return SimpleNamespace(ptr=self.ctypes.data)


def asarray(array):
    """Copy to the "device"."""
    return np.array(array).view(Array)


def empty(shape, dtype=np.float32):
    """Memory with something in it."""
    memory = np.full(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize, POISON, np.uint8)
    return memory.view(dtype).reshape(shape).view(Array)


# -- one launch -------------------------------------------------------------------------------------


class Launch:
    """What the blocks of one launch share: who touched which element."""

    def __init__(self):
        self.lock, self.touched = threading.Lock(), {}

    def note(self, address, kind):
        """Note an access ("read", "write", "add"); raise if another thread's is not ordered with it."""
        me = (kind, _here.block.index, _here.thread, _here.epoch, _here.warp_epoch)
        with self.lock:
            before = self.touched.setdefault(address, set())
            for other in before:
                if kind != other[0] or kind == "write":
                    if other[1:3] != me[1:3] and not _ordered(other, me):
                        raise AssertionError(f"threads race for one element: {other}, {me}")
            before.add(me)


def _ordered(one, other):
    """Tell whether a barrier lies between two accesses of different threads."""
    if one[1] != other[1]:
        return False
    return one[3] != other[3] or (one[2] // WARP == other[2] // WARP and one[4] != other[4])


class Block:
    """Barriers and shared memory of a block."""

    def __init__(self, launch, index, threads, shared):
        self.launch, self.index, self.lock, self.arrays = launch, index, threading.Lock(), {}
        self.barrier = threading.Barrier(threads)
        self.warps = [
            SimpleNamespace(barrier=threading.Barrier(WARP), held=[None] * WARP) for _ in range(threads // WARP)
        ]
        self.dynamic = empty(shared, np.uint8)


class Memory:
    """A flat array as kernels see it: every index is checked, every access noted."""

    def __init__(self, array, shared=False):
        self.array, self.shared = array.reshape(-1).view(np.ndarray), shared
        assert self.array.size == 0 or np.shares_memory(self.array, array)

    def _touch(self, index, kind):
        if not 0 <= index < self.array.size:
            raise IndexError(f"{index} of {self.array.size}")
        if not (self.shared or _here.waited):
            raise AssertionError("memory is touched before wait_for_previous")
        place = self.array.ctypes.data + int(index) * self.array.itemsize
        _here.block.launch.note((_here.block.index if self.shared else None, place), kind)

    def __getitem__(self, index):
        self._touch(index, "read")
        return self.array[index]

    def __setitem__(self, index, value):
        self._touch(index, "write")
        self.array[index] = value

    def add(self, index, value):
        """In one step."""
        self._touch(index, "add")
        with _here.block.lock:
            self.array[index] += value


class Kernel:
    """One function of a kernel file under constants; launched like `_load.Kernel`."""

    def __init__(self, file, name, constants):
        template = getattr(sys.modules[f"cumoe.rawkernels.{file.partition('.')[0]}"], name)
        self.function = FunctionType(template.__code__, {**template.__globals__, **constants}, name)
        self.kinds = [
            (constants[kind],) if isinstance(kind, str) else kind for kind in template.__annotations__.values()
        ]
        assert len(self.kinds) == len(inspect.signature(template).parameters)

    def __call__(self, grid, block, *arguments, shared=0, overlap=False):
        """Run block after block."""
        assert block % WARP == 0 and block <= 1024 and shared <= 99 << 10
        values = [_taken(kind, value) for kind, value in zip(self.kinds, arguments, strict=True)]
        launch = Launch()
        for number in range(grid):
            self._run(Block(launch, number, block, shared), grid, block, values)

    def _run(self, block, grid, threads, values):
        errors = []

        def run(thread):
            vars(_here).update(block=block, thread=thread, epoch=0, warp_epoch=0, waited=False)
            vars(_here).update(cuda_sizes=(threads, grid))
            try:
                self.function(*values)
                assert _here.waited, "a thread ends before wait_for_previous"
            except BaseException as error:
                errors.append(error)
                for barrier in (block.barrier, *(warp.barrier for warp in block.warps)):
                    barrier.abort()

        running = [threading.Thread(target=run, args=(thread,), daemon=True) for thread in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()
        if errors:
            raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))


def _taken(kind, value):
    """An argument as the kernel gets it, after a look at its type."""
    if kind in (np.int32, np.int64):
        assert isinstance(value, int), value
        assert np.iinfo(kind).min <= value <= np.iinfo(kind).max, value
        return value
    (name,) = kind
    if value is None:
        return Memory(np.empty(0, np.uint8))
    if value.dtype == np.uint8 and name != "uint8":  # units of copied rows
        value = value.view("V16" if name == "bytes16" else name)
        assert value.data.ptr % value.itemsize == 0
    else:
        assert value.dtype == name, (value.dtype, name)
    return Memory(value)


# -- what kernels import ----------------------------------------------------------------------------


class _Cuda:
    threadIdx = property(lambda self: SimpleNamespace(x=_here.thread))
    blockIdx = property(lambda self: SimpleNamespace(x=_here.block.index))
    blockDim = property(lambda self: SimpleNamespace(x=_here.cuda_sizes[0]))
    gridDim = property(lambda self: SimpleNamespace(x=_here.cuda_sizes[1]))
    laneid = property(lambda self: _here.thread % WARP)

    @staticmethod
    def syncthreads():
        _here.block.barrier.wait(PATIENCE_S)
        _here.epoch += 1

    class shared:
        @staticmethod
        def array(shape, dtype):
            """Dynamic memory for shape 0; one static array of each kind."""
            block = _here.block
            if shape == 0:
                size = np.dtype(dtype).itemsize
                return Memory(block.dynamic[: block.dynamic.size // size * size].view(dtype), shared=True)
            with block.lock:
                return Memory(block.arrays.setdefault((shape, dtype), empty(shape, dtype)), shared=True)


def _meet(value):
    """Give a value to the warp, and get those of all its lanes."""
    warp, lane = _here.block.warps[_here.thread // WARP], _here.thread % WARP
    warp.held[lane] = value
    warp.barrier.wait(PATIENCE_S)
    held = list(warp.held)
    warp.barrier.wait(PATIENCE_S)
    return held


def _wait_for_previous():
    _here.waited = True


def _let_next_start():
    assert _here.waited, "let_next_start before wait_for_previous"


def _sync_warp():
    _meet(None)
    _here.warp_epoch += 1


def _bits(value):
    return int(value) & 0xFFFFFFFF


def _int32(value):
    return int(np.uint32(_bits(value)).view(np.int32))


def _divide(a, b):
    assert 0 <= a < 2**32 and 0 < b < 2**32, (a, b)
    return int(a) // int(b)


def _same_in_warp(value):
    held = _meet(_int32(value))
    return _int32(sum(1 << lane for lane in range(WARP) if held[lane] == _int32(value)))


def _from_lane(value, lane):
    assert 0 <= lane < WARP
    return _meet(_int32(value))[int(lane)]


def _sum_of_warp(value):
    total = sum(_meet(_int32(value)))
    assert _int32(total) == total
    return total


def _or_of_warp(value):
    return _int32(np.bitwise_or.reduce([np.int64(_bits(one)) for one in _meet(value)]))


def _store_four(target, index, *values):
    assert target.array.ctypes.data % 16 == 0
    for i, value in enumerate(values):
        target[4 * index + i] = value


def _device():
    module = ModuleType("cumoe.rawkernels._device")
    vars(module).update(
        cuda=_Cuda(),
        inlined=lambda function: function,
        Int32=np.int32,
        Int64=np.int64,
        Int32s=("int32",),
        Int64s=("int64",),
        Ids="ID",
        Counts="COUNT",
        Units="UNIT",
        keep_small=lambda: None,
        keep_rolled=lambda: None,
        let_next_start=_let_next_start,
        wait_for_previous=_wait_for_previous,
        sync_warp=_sync_warp,
        pointer=lambda array: array,
        divide=_divide,
        is_less=lambda a, b: int(_int32(a) < _int32(b)),
        add_to=lambda target, index, value: target.add(index, value),
        store_four=_store_four,
        load_unit=lambda source, index: source[index],
        store_unit=lambda target, index, unit: target.__setitem__(index, unit),
        count_bits=lambda mask: _bits(mask).bit_count(),
        count_below=lambda mask: (_bits(mask) & ((1 << _here.thread % WARP) - 1)).bit_count(),
        same_in_warp=_same_in_warp,
        from_lane=_from_lane,
        sum_up_to_lane=lambda value: sum(_meet(int(value))[: _here.thread % WARP + 1]),
        sum_of_warp=_sum_of_warp,
        or_of_warp=_or_of_warp,
    )
    return module


def install(monkeypatch):
    """Let the launchers of the sorting rooms run here, for one test; return what stands for CuPy."""
    cupy = ModuleType("cupy")
    vars(cupy).update(empty=empty, asarray=asarray, ndarray=Array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cumoe.rawkernels._device", _device())
    paths = {f"cumoe.rawkernels.{path.stem}": path for path in _KERNELS.glob("_*_kernels.py")}
    for name in paths:  # so that none is found that the real one was imported by
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, paths[name])
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)

    for name in ("_tile_kernels", "_sort_kernels", "_layout_kernels"):  # in the order of their imports
        load(f"cumoe.rawkernels.{name}")
    for name in paths:
        load(name)
    monkeypatch.setattr(_numba, "kernel", lambda file, name, **constants: Kernel(file, name, constants))
    return cupy
