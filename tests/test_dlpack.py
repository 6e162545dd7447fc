"""Arrays of other libraries: in without a copy, the same kind out, nothing leaked."""

import gc
import inspect
import resource
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch

import cumoe
from cumoe import _arrays, _dlpack

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "bool": torch.bool,
}
SHAPES = [(3, 4), (2, 3, 5), (7,), (), (0, 4), (4, 0)]


def patterned(shape, dtype):
    """A tensor whose bytes are 0, 1, 0, 1, ...: legal and tellable apart in every dtype."""
    tensor = torch.zeros(shape, dtype=dtype)
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    if tensor.numel():
        flat.copy_(torch.arange(flat.numel()) % 2)
    return tensor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_torch_goes_in_without_a_copy(name, shape):
    tensor = patterned(shape, DTYPES[name])
    array = _dlpack.from_dlpack(tensor)
    assert array.dtype == np.dtype(name)
    assert array.shape == shape
    assert array.flags.writeable
    if tensor.numel():
        assert array.ctypes.data == tensor.data_ptr()
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_results_go_back_without_a_copy(name, shape):
    caller = patterned(shape, DTYPES[name])
    result = _dlpack.from_dlpack(caller).copy()
    tensor = _dlpack.export_like(result, caller)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == DTYPES[name]
    assert tuple(tensor.shape) == shape
    if tensor.numel():
        assert tensor.data_ptr() == result.ctypes.data
        assert tensor.reshape(-1).view(torch.uint8).equal(caller.reshape(-1).view(torch.uint8))


def test_values_of_bfloat16_and_float8_survive_both_ways():
    values = [0.0, 1.0, -1.5, 0.25, 448.0, float("nan")]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        array = _dlpack.from_dlpack(torch.tensor(values).to(dtype))
        np.testing.assert_array_equal(array.astype(np.float32), np.float32(values))
        back = _dlpack.export_like(array + array.dtype.type(0), torch.zeros(1, dtype=dtype))
        np.testing.assert_array_equal(back.float().numpy(), np.float32(values))


def test_strides_come_through():
    tensor = torch.arange(24, dtype=torch.float32).to(torch.bfloat16).reshape(4, 6)
    for view in (tensor.T, tensor[1:, ::2], tensor[:, 3], tensor[:1].expand(5, 6)):
        array = _dlpack.from_dlpack(view)
        assert array.strides == tuple(2 * step for step in view.stride())
        np.testing.assert_array_equal(array.astype(np.float32), view.float().numpy())


def test_packed_fp4_comes_in_as_bytes():
    packed = torch.tensor([0x12, 0xF0, 0x07], dtype=torch.uint8)
    array = _dlpack.from_dlpack(packed.view(torch.float4_e2m1fn_x2))
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, packed.numpy())


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int64, np.bool_])
def test_read_only_producers_stay_read_only(dtype):
    source = np.ones((3, 4), dtype)
    source.flags.writeable = False
    array = _dlpack.from_dlpack(source)
    assert not array.flags.writeable
    assert array.ctypes.data == source.ctypes.data


class Unversioned:
    """A producer of before DLPack 1.0: it does not know max_version."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


def test_producers_before_dlpack_1_work():
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = _dlpack.from_dlpack(Unversioned(source))
    assert array.ctypes.data == source.ctypes.data
    np.testing.assert_array_equal(array, source)


def test_consumers_before_dlpack_1_work():
    source = np.arange(6).astype(ml_dtypes.bfloat16)
    array = _dlpack.from_dlpack(Unversioned(_dlpack._Exporter(source)))
    assert array.dtype == source.dtype
    assert array.ctypes.data == source.ctypes.data


class Library:
    """A small array library with a namespace of its own, as the array API standard has it."""

    __name__ = "library"

    class Array:
        def __init__(self, data):
            self.data = data

        def __array_namespace__(self):
            return Library()

        def __dlpack_device__(self):
            return self.data.__dlpack_device__()

        def __dlpack__(self, **wishes):
            return self.data.__dlpack__(**wishes)

    def from_dlpack(self, x):
        return Library.Array(np.from_dlpack(x))


def test_any_array_namespace_is_served():
    caller = Library.Array(np.arange(5, dtype=np.float32))
    side, (inside,) = _arrays.enter(x=caller)
    assert side.xp is np
    assert inside.ctypes.data == caller.data.ctypes.data
    result = inside * 2
    back = side.leave(result)
    assert isinstance(back, Library.Array)
    assert back.data.ctypes.data == result.ctypes.data


def test_requires_grad_names_detach():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(TypeError) as caught:
        _arrays.enter(w1=weight)
    assert str(caught.value) == "w1 must not require gradients, got requires_grad=True; pass w1.detach()"
    side, (inside,) = _arrays.enter(w1=weight.detach())
    assert side.xp is np
    assert inside.ctypes.data == weight.data_ptr()


def test_what_cannot_be_shared_is_named():
    with pytest.raises(TypeError, match=r"^w1 must be an array that can be shared, got Tensor: "):
        _arrays.enter(w1=torch.zeros(2, 2).to_sparse())
    with pytest.raises(TypeError, match=r"^w1 must have a dtype that cumoe knows, got DLPack .* = \(5, 64, 1\)$"):
        _arrays.enter(w1=torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^w1 must be in host or CUDA memory, got DLPack device type 8; copy it"):
        _dlpack.from_dlpack(Elsewhere(), "w1")


class Elsewhere:
    def __dlpack_device__(self):
        return 8, 0  # Metal


def test_memory_outlives_the_producer():
    tensor = torch.arange(1000, dtype=torch.float32)
    gone = weakref.ref(tensor)
    array = _dlpack.from_dlpack(tensor)
    del tensor
    gc.collect()
    overwrite = [torch.full((1000,), 7.0) for _ in range(50)]
    np.testing.assert_array_equal(array, np.arange(1000, dtype=np.float32))
    view = array[10:20]
    del array, overwrite
    np.testing.assert_array_equal(view, np.arange(10, 20, dtype=np.float32))
    assert gone() is not None
    del view
    assert gone() is None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_results_live_as_long_as_the_tensor_and_no_longer(dtype):
    caller = _dlpack.export_like(np.zeros(1, dtype), torch.zeros(1))
    result = np.ones((100, 150), dtype)
    gone = weakref.ref(result)
    tensor = _dlpack.export_like(result, caller)
    del result
    gc.collect()
    assert gone() is not None
    assert tensor.float().sum() == 100 * 150
    part = tensor[3]
    del tensor
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


def test_hundreds_of_rounds_leak_nothing():
    def round_trip():
        tensor = torch.ones(250_000, dtype=torch.bfloat16)  # 0.5 MB
        side, (inside,) = _arrays.enter(x=tensor)
        result = np.array(inside)
        live.extend((weakref.ref(tensor), weakref.ref(result)))
        assert side.leave(result).dtype == torch.bfloat16

    live = []
    for _ in range(20):  # the allocators settle
        round_trip()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(400):  # 400 MB if either direction leaked
        round_trip()
    gc.collect()
    assert not any(ref() is not None for ref in live)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_writeable_alias_is_the_same_memory_and_keeps_it():
    for dtype in (np.uint16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        source = np.arange(12).astype(dtype).reshape(3, 4)
        expected = source.tobytes()
        source.flags.writeable = False
        gone = weakref.ref(source)
        alias = _dlpack.writeable_alias(source)
        assert alias.flags.writeable
        assert alias.dtype == source.dtype
        assert alias.strides == source.strides
        assert alias.ctypes.data == source.ctypes.data
        assert not source.flags.writeable
        del source
        assert gone() is not None
        assert alias.tobytes() == expected
        del alias
        assert gone() is None


# -- the door ---------------------------------------------------------------------------------------


def test_a_given_out_leaves_as_the_same_object(xp):
    x, out = xp.zeros(3), xp.zeros(3)
    side, (_, inside) = _arrays.enter(x=x, out=out)
    assert side.xp is xp
    assert side.leave(inside) is out


def test_a_given_torch_out_is_written_in_place_and_returned():
    x, out = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    side, (_, inside) = _arrays.enter(x=x, out=out)
    inside[:] = 2
    assert side.leave(inside) is out
    assert out.float().tolist() == [2.0, 2.0, 2.0]


def test_none_passes_and_no_array_at_all_is_numpy():
    side, inside = _arrays.enter(x=None, y=torch.zeros(2), z=None)
    assert inside[0] is None and inside[2] is None
    assert isinstance(side.leave(np.zeros(3)), torch.Tensor)
    assert _arrays.enter(x=None)[0].xp is np


def test_subclasses_of_ndarray_come_in_as_plain_memory(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4,))
    side, (inside,) = _arrays.enter(x=mapped)
    assert type(inside) is np.ndarray
    inside[:] = 3
    assert mapped.tolist() == [3, 3, 3, 3]
    assert side.leave(inside) is mapped


def test_subclasses_of_a_tensor_count_as_its_library():
    class Weight(torch.Tensor):
        pass

    side, inside = _arrays.enter(x=torch.zeros(2), w=torch.zeros(2).as_subclass(Weight))
    assert side.xp is np
    assert all(isinstance(array, np.ndarray) for array in inside)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.zeros(1), "w": torch.zeros(1)},
            "arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, got x: numpy, w: torch",
        ),
        ({"x": [1, 2]}, "x must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray"),
        ({"x": np.float32(1)}, "x must be a NumPy, CuPy or DLPack array, got float32; use numpy.asarray"),
        (
            {"x": np.ma.masked_array([1.0, 2.0], [0, 1])},
            "x must be a plain array, got MaskedArray; its mask would be ignored, use x.filled",
        ),
        ({"x": np.zeros(1, ">f4")}, "x must be in native byte order, got >f4; use x.astype"),
        ({"x": Elsewhere()}, "x must be a NumPy, CuPy or DLPack array, got Elsewhere; use numpy.asarray"),
    ],
)
def test_wrong_kinds_are_named(arrays, message):
    with pytest.raises(TypeError) as caught:
        _arrays.enter(**arrays)
    assert str(caught.value) == message


# -- bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("float32", "float32"),
        ("float64", "float64"),
        ("int64", "int64"),
        ("bool", "bool"),
        ("float16", "uint16"),
        ("bfloat16", "uint16"),
        ("float8_e4m3fn", "uint8"),
        ("float8_e5m2", "uint8"),
        ("float8_e8m0fnu", "uint8"),
    ],
)
def test_bits_are_the_same_memory(name, seen):
    array = np.zeros((3, 4), name)
    assert _arrays.bits(array).dtype == seen
    assert np.shares_memory(_arrays.bits(array), array)
    array.flags.writeable = False
    locked = _arrays.bits(array)
    assert locked.flags.writeable
    assert locked.ctypes.data == array.ctypes.data
    turned = _arrays.bits(np.asfortranarray(np.arange(12).reshape(3, 4).astype(name)))
    assert turned.flags.c_contiguous
    assert turned.tobytes() == np.arange(12).reshape(3, 4).astype(name).tobytes()


def test_bits_of_unaligned_memory_are_copied():
    array = np.zeros(17, np.uint8)[1:].view(np.float32)
    assert not array.flags.aligned
    assert _arrays.bits(array).flags.aligned


def test_read_only_as_plain_keeps_strides(xp):
    array = xp.arange(12, dtype=xp.uint16).reshape(3, 4).T
    assert _arrays.read_only_as_plain(array) is array
    locked = np.arange(12, dtype=np.uint16).reshape(3, 4).T
    locked.flags.writeable = False
    plain = _arrays.read_only_as_plain(locked)
    assert plain.flags.writeable
    assert (plain.ctypes.data, plain.strides) == (locked.ctypes.data, locked.strides)


def test_public_functions_that_take_arrays_work_on_their_stream():
    """Each is decorated, or CUDA tensors could not be captured in a graph of theirs."""
    functions = [getattr(cumoe, name) for name in cumoe._HOME if inspect.isfunction(getattr(cumoe, name))]
    classes = [getattr(cumoe, name) for name in cumoe._HOME if inspect.isclass(getattr(cumoe, name))]
    functions += [one for cls in classes for key, one in vars(cls).items() if inspect.isfunction(one) and key[0] != "_"]
    takers = [one for one in functions if "_arrays.enter(" in inspect.getsource(inspect.unwrap(one))]
    assert len(takers) > 20
    assert [one.__qualname__ for one in takers if inspect.unwrap(one) is one] == []
