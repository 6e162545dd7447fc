"""
Compiled kernels as functions of the current device, launched on CuPy's current stream.

    unpermute = _load.kernel("unpermute.cu", "unpermute", X="bfloat16")
    unpermute((num_tokens, blocks), 128, y, idx, out, hidden_size, top_k)

The first call of a kernel compiles it, or reads it from the disk (`_cache`), and puts it on the device; do that
once before a graph is captured.
"""

import ctypes
import functools
import threading

import numpy as np

from cumoe.rawkernels import _compile

_LOCK = threading.Lock()


def kernel(file, name, **constants):
    """The function `name` of a kernel file, compiled with `constants` as macros, on the current device."""
    import cupy as cp

    return _kernel(file, name, tuple(sorted(constants.items())), cp.cuda.runtime.getDevice())


def capability(device=None):
    """Compute capability of a device (default: the current one) as a number: 90 for Hopper."""
    import cupy as cp

    return _capability(cp.cuda.runtime.getDevice() if device is None else device)


@functools.cache
def _capability(device):
    import cupy as cp

    return int(cp.cuda.Device(device).compute_capability)


def architecture(device=None):
    """What to compile for: "sm_90a" and the like; the "a" brings the instructions of that generation only."""
    number = capability(device)
    if number < 80:
        raise NotImplementedError(f"the kernels need compute capability 8.0, the device has {number / 10}")
    return f"sm_{number}a" if number >= 90 else f"sm_{number}"


@functools.cache
def multiprocessors(device):
    """Streaming multiprocessors of a device."""
    import cupy as cp

    return int(cp.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.cache
def _kernel(file, name, constants, device):
    with _LOCK:
        return Kernel(_compile.cubin(file, architecture(device), dict(constants)), name, device)


class Kernel:
    """
    One compiled function on one device.

    Arguments are CuPy arrays (their address), None (a null pointer), Python integers (for 32- and 64-bit
    parameters alike), NumPy scalars, and NumPy arrays of one void element (handed over by value: tensor maps).
    """

    def __init__(self, cubin, name, device):
        import cupy as cp
        from cuda.bindings import driver

        self.name = name
        self._module = cp.cuda.function.Module()
        self._module.load(cubin)
        function = self._module.get_function(name)
        self._keep, self._function = function, driver.CUfunction(function.ptr)
        self._shared, self._growing = 0, threading.Lock()
        self._overlap = capability(device) >= 90

    def attribute(self, attribute):
        """An attribute of the function by its name in the driver, for example "LOCAL_SIZE_BYTES"."""
        from cuda.bindings import driver

        which = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{attribute}")
        return _checked(driver.cuFuncGetAttribute(which, self._function))

    def __call__(self, grid, block, *arguments, shared=0, overlap=False):
        """
        Launch on the current stream.

        `grid` is a number or up to three of them, `block` a number of threads, `shared` the bytes of dynamic
        shared memory. With `overlap` the kernel may start while its predecessor in the stream still runs: its
        code must call ``wait_for_previous`` before it touches what others write (Hopper and later; elsewhere it
        starts in turn).
        """
        import cupy as cp
        from cuda.bindings import driver

        if shared > self._shared:
            self._allow(shared)
        grid = grid if isinstance(grid, tuple) else (grid,)
        config = _config(grid, block, shared, overlap and self._overlap, cp.cuda.get_current_stream().ptr)
        count = len(arguments)
        slots, pointers = (ctypes.c_uint64 * count)(), (ctypes.c_void_p * count)()
        base = ctypes.addressof(slots)
        for i, argument in enumerate(arguments):
            pointers[i] = base + 8 * i
            if isinstance(argument, int):
                slots[i] = argument & 0xFFFFFFFFFFFFFFFF
            elif isinstance(argument, np.float32):
                slots[i] = int(argument.view(np.uint32))
            elif argument is None:
                slots[i] = 0
            elif isinstance(argument, np.ndarray):
                pointers[i] = argument.ctypes.data
            elif isinstance(argument, np.integer):
                slots[i] = int(argument) & 0xFFFFFFFFFFFFFFFF
            else:
                slots[i] = argument.data.ptr
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0), self.name)

    def _allow(self, shared):
        """Let launches take so many bytes of shared memory; never fewer than before, whatever other threads ask for."""
        from cuda.bindings import driver

        with self._growing:
            if shared > self._shared:
                # always, not beyond 48 KiB only: that limit counts the kernel's static shared memory too
                which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(driver.cuFuncSetAttribute(self._function, which, shared), self.name)
                self._shared = shared


@functools.lru_cache(maxsize=4096)
def _config(grid, block, shared, overlap, stream):
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    return config


def _checked(result, what="driver call"):
    if int(result[0]) != 0:
        raise RuntimeError(f"{what} failed: {result[0].name}")
    return result[1] if len(result) > 1 else None
