"""CUDA tensors of other libraries: in as CuPy arrays without a copy, results back, streams in order."""

import gc

import numpy as np
import pytest

import cumoe
from cumoe import _arrays, _dlpack

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
torch = pytest.importorskip("torch")
if not cupy.cuda.is_available() or not torch.cuda.is_available():
    pytest.skip("no CUDA device that CuPy and torch both see", allow_module_level=True)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def patterned(shape, dtype):
    tensor = torch.zeros(shape, dtype=dtype, device="cuda")
    if tensor.numel():
        flat = tensor.reshape(-1).view(torch.uint8)
        flat.copy_(torch.arange(flat.numel()) % 2)
    return tensor


@pytest.mark.parametrize("shape", [(3, 4), (7,), (), (0, 4)])
@pytest.mark.parametrize("name", DTYPES)
def test_cuda_tensors_go_in_and_out_without_a_copy(name, shape):
    tensor = patterned(shape, DTYPES[name])
    side, (array,) = _arrays.enter(x=tensor)
    assert side.xp is cupy
    assert isinstance(array, cupy.ndarray)
    assert array.dtype == np.dtype(name)
    assert array.shape == shape
    back = side.leave(array.view())
    assert back.dtype == DTYPES[name]
    assert back.device == tensor.device
    if tensor.numel():
        assert array.data.ptr == tensor.data_ptr() == back.data_ptr()
        bits = _arrays.bits(array)
        assert bits.get().tobytes() == tensor.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def test_strides_come_through():
    tensor = torch.arange(24, dtype=torch.float32, device="cuda").to(torch.bfloat16).reshape(4, 6)
    for view in (tensor.T, tensor[1:, ::2], tensor[:, 3], tensor[:1].expand(5, 6)):
        array = _dlpack.from_dlpack(view)
        assert array.strides == tuple(2 * step for step in view.stride())
        turned = _arrays.bits(array)
        assert turned.flags.c_contiguous
        assert turned.get().tobytes() == view.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def test_bits_copies_turned_float8_labels():
    tensor = patterned((4, 6), torch.float8_e4m3fn).T
    turned = _arrays.bits(_dlpack.from_dlpack(tensor))
    assert turned.dtype == cupy.uint8
    assert turned.get().tobytes() == tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def test_host_and_device_do_not_mix():
    with pytest.raises(TypeError) as caught:
        _arrays.enter(hidden_states=torch.zeros(2), w2=torch.zeros(2, device="cuda"))
    assert str(caught.value) == "arguments must be on one device, got hidden_states: cpu, w2: cuda:0"
    with pytest.raises(TypeError) as caught:
        _arrays.enter(hidden_states=np.zeros(2), w2=cupy.zeros(2))
    assert str(caught.value) == (
        "arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, "
        "got hidden_states: numpy, w2: cupy"
    )


@pytest.mark.parametrize("given", [False, True], ids=["returned", "out="])
def test_work_on_different_streams_stays_in_order(given):
    ours = cupy.cuda.Stream(non_blocking=True)
    theirs = torch.cuda.Stream()
    n = 1 << 24
    for _ in range(5):
        with torch.cuda.stream(theirs), ours:
            source, out = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
            theirs.synchronize()
            for _ in range(50):  # long enough that a missing wait is seen
                source += 1
            side, (x, inside) = _arrays.enter(x=source, out=out)
            result = inside if given else cupy.empty_like(inside)
            for _ in range(50):
                cupy.add(x, x, out=result)
            back = side.leave(result)
            assert (back is out) == given
            assert bool((back == 100).all())


def test_a_public_function_works_on_torchs_stream():
    """No stream waits for another, and CuPy's current stream is afterwards what it was."""
    theirs, ours = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    seen = []

    @_arrays.on_callers_stream
    def double(source, out=None):
        seen.append(cupy.cuda.get_current_stream().ptr)
        side, (x, given) = _arrays.enter(x=source, out=out)
        result = cupy.empty_like(x) if given is None else given
        cupy.add(x, x, out=result)
        return side.leave(result)

    for stream in (theirs, torch.cuda.default_stream()):
        with torch.cuda.stream(stream), ours, pytest.MonkeyPatch.context() as patch:
            source, out = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
            patch.setattr(torch.cuda, "Event", None)  # what torch would make one stream wait for another with
            for _ in range(50):  # long enough that a missing order is seen
                source += 1
            assert double(source, out=out) is out
            back = double(source)
            assert cupy.cuda.get_current_stream().ptr == ours.ptr
            assert bool((out == 100).all()) and bool((back == 100).all())
        assert seen[-2:] == [stream.cuda_stream] * 2


def test_tensors_inside_an_argument_count():
    """Operands and configs of tensors: nothing waits, and results are those of the host."""
    theirs, ours = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    expected = cumoe.dequantize(cumoe.quantize(x, "mxfp4"))
    with torch.cuda.stream(theirs), ours, pytest.MonkeyPatch.context() as patch:
        quantized = cumoe.quantize(torch.from_numpy(x).cuda(), "mxfp4")
        config = cumoe.mxfp4_w4a16_moe_quant_config(quantized.scale, quantized.scale)
        patch.setattr(torch.cuda, "Event", None)
        assert bool((cumoe.dequantize(quantized).cpu() == torch.from_numpy(expected)).all())
        for value in (quantized, config):
            assert _dlpack.stream_of_first([value]).ptr == theirs.cuda_stream
        assert cupy.cuda.get_current_stream().ptr == ours.ptr


def test_an_error_gives_the_stream_back():
    @_arrays.on_callers_stream
    def fail(source):
        raise ValueError("no")

    before = cupy.cuda.get_current_stream().ptr
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(ValueError, match=r"^no$"):
        fail(torch.zeros(1, device="cuda"))
    assert cupy.cuda.get_current_stream().ptr == before


def test_arrays_of_another_device_are_refused(monkeypatch):
    tensor, array = torch.zeros(2, device="cuda"), cupy.zeros(2)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 5)
    with pytest.raises(ValueError) as caught:
        _arrays.enter(x=array)
    assert str(caught.value) == (
        "arguments must be on the current device cuda:5, got x: cuda:0; set it by cupy.cuda.Device(0)"
    )
    with pytest.raises(ValueError) as caught:
        _arrays.enter(x=tensor)
    assert str(caught.value) == (
        "x must be on the current device cuda:5, got cuda:0; set it by cupy.cuda.Device(0) or torch.cuda.device(0)"
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_second_device():
    with torch.cuda.device(1):
        tensor = torch.arange(6, dtype=torch.float32, device="cuda")
        side, (x,) = _arrays.enter(x=tensor)
        assert side.leave(x).device == tensor.device == torch.device("cuda:1")
        assert x.device.id == 1


def test_nothing_leaks():
    pool = cupy.get_default_memory_pool()

    def round_trip():
        tensor = torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16)
        side, (x,) = _arrays.enter(x=tensor)
        assert side.leave(x.copy()).shape == (1 << 20,)

    for _ in range(3):
        round_trip()
    gc.collect()
    before = torch.cuda.memory_allocated(), pool.used_bytes()
    for _ in range(100):
        round_trip()
    gc.collect()
    assert (torch.cuda.memory_allocated(), pool.used_bytes()) == before
