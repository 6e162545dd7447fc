"""
DLPack in and out, for the dtypes that NumPy's own importer and exporter refuse (bfloat16, float8).

In: the structure behind the producer's capsule is read in place. The capsule is never renamed to
"used": the new array keeps it as its owner, and its destructor, which gives the memory back, runs
when the last view is gone. Out: NumPy or CuPy export the bits, and the dtype in the structure is
overwritten before anybody sees it. So every deleter is the producer's own C code, none is Python.
"""

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import ml_dtypes  # noqa: F401  registers the names of the small floats
import numpy as np

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
_READ_ONLY = 1  # bit of flags

# dtype name -> DLDataTypeCode, for numbers of 16 or 8 bits that NumPy itself does not have
_SMALL_FLOATS = {
    "bfloat16": 4,
    "float8_e3m4": 7,
    "float8_e4m3": 8,
    "float8_e4m3b11fnuz": 9,
    "float8_e4m3fn": 10,
    "float8_e4m3fnuz": 11,
    "float8_e5m2": 12,
    "float8_e5m2fnuz": 13,
    "float8_e8m0fnu": 14,
}
# what holds no tensor of another library; to look into each of them takes longer than the rest of a small call
WITHOUT_TENSORS: set[type] = {np.ndarray, type(None), bool, int, float, str}
_DEPTH = 3  # an argument, a descriptor in it, an array in that
_PACKED_FP4 = (17, 4, 2)  # two numbers a byte: comes in as raw uint8
_DTYPES = {
    **{(code, 8 * np.dtype(name).itemsize, 1): np.dtype(name) for name, code in _SMALL_FLOATS.items()},
    **{(0, 8 * size, 1): np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{(1, 8 * size, 1): np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{(2, 8 * size, 1): np.dtype(f"f{size}") for size in (2, 4, 8)},
    (6, 8, 1): np.dtype(bool),
    _PACKED_FP4: np.dtype(np.uint8),
}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor, which is also the head of the unversioned managed structure."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned, from DLPack 1.0 on."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# prototypes of our own: setting argtypes on ctypes.pythonapi would change them for the whole process
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def library(x: Any) -> Any:
    """Return the module whose ``from_dlpack`` makes arrays like `x`, or None."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    for cls in type(x).__mro__:  # a subclass of a tensor may live in anybody's module
        module = sys.modules.get(cls.__module__.partition(".")[0])
        if hasattr(module, "from_dlpack"):
            return module
    return None


def from_dlpack(x: Any, name: str = "array", stream: int | None = None) -> Any:
    """
    View the memory of any DLPack producer as a NumPy array (host memory) or a CuPy array (CUDA).

    No copy. Small floats get their ml_dtypes dtype, packed fp4 pairs come in as uint8. The result is
    read-only where the producer says so, and it keeps the producer's memory alive. `stream` is what
    `stream_wish` gave for an array of the same library.
    """
    try:
        kind, index = x.__dlpack_device__()
    except (BufferError, ValueError) as error:  # torch's meta device, for one
        raise TypeError(f"{name} must be in host or CUDA memory, got {type(x).__name__}: {error}") from error
    if kind not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise TypeError(f"{name} must be in host or CUDA memory, got DLPack device type {int(kind)}; copy it first")
    on_host = kind in (_CPU, _CUDA_HOST)
    if not on_host:
        _must_be_current(name, index)
    capsule = _export(x, name, {} if on_host else {"stream": stream_wish(x) if stream is None else stream})
    tensor, read_only = _open(capsule)
    key = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    if key not in _DTYPES:
        raise TypeError(f"{name} must have a dtype that cumoe knows, got DLPack (code, bits, lanes) = {key}")
    dtype = _DTYPES[key]
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    address = (tensor.data or 0) + tensor.byte_offset
    bits = np.dtype(f"u{dtype.itemsize}") if dtype.name in _SMALL_FLOATS else dtype
    if on_host:
        return _at(address, shape, strides, bits, read_only, owner=capsule).view(dtype)
    cupy = _cupy()
    reach = sum((extent - 1) * abs(step) for extent, step in zip(shape, strides or (), strict=False))
    num_bytes = reach + dtype.itemsize if strides else int(np.prod(shape)) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, max(1, num_bytes), capsule, index)
    array = cupy.ndarray(shape, bits, cupy.cuda.MemoryPointer(memory, 0), strides=strides)
    return array if bits is dtype else array.view(dtype)


def stream_wish(x: Any) -> int | None:
    """
    What to ask of a producer of CUDA memory: our stream, or -1 where its library works on that one anyway.

    -1 costs nothing, and nothing else may be asked while a graph is captured. None: not CUDA memory.
    """
    try:
        if x.__dlpack_device__()[0] not in (_CUDA, _CUDA_MANAGED):
            return None
    except (BufferError, ValueError):
        return None
    ours = _current_stream()
    return -1 if _stream_of(x) == ours else ours


def stream_of_first(values: Iterable[Any]) -> Any:
    """
    Return the stream that the library of the first CUDA tensor works on, as a CuPy stream; None: it has none.

    Tensors among `values` come first, then those in tuples (`Quantized`) and in dataclasses (a config, whose
    descriptors have them).
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    level = [value for value in values if type(value) not in WITHOUT_TENSORS]
    for _ in range(_DEPTH):
        for value in level:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                stream = torch.cuda.current_stream(value.device)
                streams = _cupy().cuda.Stream
                return streams.from_external(_Stream(stream)) if stream.cuda_stream else streams.null
        level = [part for value in level for part in _parts(value)]
    return None


def _parts(value: Any) -> Iterable[Any]:
    """What a tuple or a dataclass holds."""
    if isinstance(value, tuple):
        return value
    return [getattr(value, name) for name in getattr(type(value), "__dataclass_fields__", ())]


class _Stream:
    """A stream of torch under the protocol that CuPy knows; older ones do not speak it themselves."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # kept alive

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def writeable_alias(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same memory with the writeable flag set; only for kernels, which never write their inputs."""
    bits = array.view(f"u{array.itemsize}") if array.dtype.name in _SMALL_FLOATS else array
    alias = _at(array.ctypes.data, array.shape, array.strides, bits.dtype, False, owner=array)
    return alias.view(array.dtype)


def export_like(array: Any, foreign: Any) -> Any:
    """Hand `array` (NumPy or CuPy) to the library that made `foreign`, without a copy."""
    return library(foreign).from_dlpack(_Exporter(array))


class _Exporter:
    """A producer around a NumPy or CuPy array of any dtype above."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._array.__dlpack_device__()
        return kind, index

    def __dlpack__(self, **wishes: Any) -> Any:
        dtype = self._array.dtype
        if wishes.get("stream") is not None and wishes["stream"] == _current_stream():
            wishes["stream"] = -1  # CuPy would record an event, whose use under capture is limited
        if dtype.name not in _SMALL_FLOATS:
            return self._array.__dlpack__(**wishes)
        capsule = self._array.view(f"u{dtype.itemsize}").__dlpack__(**wishes)
        _open(capsule)[0].dtype.code = _SMALL_FLOATS[dtype.name]
        return capsule


class _Owner:
    """What an array made from an address keeps as its base, and with it whatever owns the memory."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = interface
        self._owner = owner


def _at(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: "np.dtype[Any]",
    read_only: bool,
    owner: Any,
) -> np.ndarray[Any, Any]:
    interface = {
        "version": 3,
        "typestr": dtype.str,
        "shape": shape,
        "strides": strides,
        "data": (address, read_only),
    }
    return np.asarray(_Owner(interface, owner))


def _export(x: Any, name: str, wishes: dict[str, Any]) -> Any:
    if getattr(x, "requires_grad", False):
        raise TypeError(f"{name} must not require gradients, got requires_grad=True; pass {name}.detach()")
    if getattr(x, "is_neg", bool)():  # torch exports the memory of a lazy negation without its sign
        raise TypeError(f"{name} must not be a negated view, got is_neg() = True; pass {name}.resolve_neg()")
    try:
        try:
            return x.__dlpack__(max_version=(1, 0), **wishes)
        except TypeError:  # a producer older than DLPack 1.0
            return x.__dlpack__(**wishes)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array that can be shared, got {type(x).__name__}: {error}") from error


def _open(capsule: Any) -> tuple[Any, bool]:
    """Return the tensor structure inside a capsule, in place, and whether it must not be written."""
    if not _capsule_is_valid(capsule, b"dltensor_versioned"):
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), False
    managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    if managed.major > 1:
        raise BufferError(f"DLPack {managed.major}.{managed.minor} is newer than this importer, which reads 1.x")
    return managed.tensor, bool(managed.flags & _READ_ONLY)


def _must_be_current(name: str, index: int) -> None:
    current = int(_cupy().cuda.runtime.getDevice())
    if index != current:
        raise ValueError(
            f"{name} must be on the current device cuda:{current}, got cuda:{index}; "
            f"set it by cupy.cuda.Device({index}) or torch.cuda.device({index})"
        )


def _stream_of(x: Any) -> int | None:
    """The stream that the library of `x` works on, as DLPack counts them; None: it does not say."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor) or not x.is_cuda:
        return None
    return int(torch.cuda.current_stream(x.device).cuda_stream) or 1


def _current_stream() -> int:
    """CuPy's current stream as DLPack counts them: 0 is ambiguous there, 1 is the legacy default stream."""
    return int(_cupy().cuda.get_current_stream().ptr) or 1


def _cupy() -> Any:
    """Import CuPy, if a CUDA tensor comes before it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError("CUDA arrays need CuPy: pip install 'cumoe[cuda13]' or 'cumoe[cuda12]'") from error
    return cupy
