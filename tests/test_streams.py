"""Whose stream a public function works on, with stand-ins for torch and CuPy: no GPU is needed."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import cumoe
from cumoe import FusedMoEQuantDesc, GroupShape, _arrays, _dlpack


class Tensor:
    """What is asked of a CUDA tensor."""

    def __init__(self, device="cuda:0", is_cuda=True):
        self.device, self.is_cuda, self.shape, self.dtype = device, is_cuda, (1,), "torch.float32"


class Stream:
    """What CuPy makes of another library's stream."""

    null = "null"
    current = None

    def __init__(self, number):
        self.number = number

    @classmethod
    def from_external(cls, stream):
        return cls(stream.__cuda_stream__()[1])

    def __enter__(self):
        Stream.current = self.number

    def __exit__(self, *error):
        Stream.current = None


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    numbers = {"cuda:0": 11, "cuda:1": 22, "default": 0}
    cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=numbers[device]))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor, cuda=cuda))
    monkeypatch.setattr(_dlpack, "_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(Stream=Stream)))


@_arrays.on_callers_stream
def seen(*arguments, **keywords):
    return Stream.current


def number_of(*values):
    stream = _dlpack.stream_of_first(values)
    return stream.number if isinstance(stream, Stream) else stream


HOST = np.ones(1, np.float32)
QUANTIZED = cumoe.Quantized(HOST, HOST, "nvfp4", GroupShape(1, 16))
CONFIG = cumoe.int8_w8a16_moe_quant_config(HOST, HOST)


def test_a_tensor_as_an_argument_or_by_name():
    assert seen(Tensor()) == seen(HOST, x=Tensor()) == 11
    assert Stream.current is None
    assert number_of(Tensor("default")) == "null"
    assert number_of(Tensor(is_cuda=False), Tensor("cuda:1")) == 22


@pytest.mark.parametrize("part", ["values", "scale", "zero_points", "global_scale"])
def test_a_tensor_in_any_part_of_an_operand(part):
    quantized = QUANTIZED._replace(**{part: Tensor()})
    assert seen(quantized) == seen(quantized=quantized) == 11


@pytest.mark.parametrize("operand", ["_a1", "_a2", "_w1", "_w2"])
@pytest.mark.parametrize("part", ["scale", "alpha_or_gscale", "zp", "bias"])
def test_a_tensor_in_any_descriptor_of_a_config(operand, part):
    descs = {name: FusedMoEQuantDesc() for name in ("_a1", "_a2", "_w1", "_w2")}
    config = cumoe.FusedMoEQuantConfig(**(descs | {operand: FusedMoEQuantDesc(**{part: Tensor()})}))
    assert seen(HOST, quant_config=config) == 11


def test_plain_arguments_come_first():
    assert seen(QUANTIZED._replace(scale=Tensor("cuda:1")), Tensor()) == 11


@pytest.mark.parametrize("values", [(), (HOST, None, "int8", (1, 16)), (QUANTIZED, CONFIG), (Tensor, CONFIG)])
def test_without_a_tensor_there_is_no_stream(values):
    assert seen(*values) is None
    assert number_of(*values) is None


def test_without_torch_nothing_is_looked_at(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert _dlpack.stream_of_first(_ for _ in [pytest.fail]) is None


@pytest.mark.parametrize(
    "call",
    [
        cumoe.dequantize,
        cumoe.to_compressed_tensors_nvfp4,
        lambda q: cumoe.fused_experts(
            HOST, HOST, HOST, HOST, HOST, quant_config=cumoe.int8_w8a16_moe_quant_config(q.scale, HOST)
        ),
    ],
)
def test_public_functions_enter_on_that_stream(call, monkeypatch):
    entered = []

    def enter(**arrays):
        entered.append(Stream.current)
        raise RuntimeError("seen")

    monkeypatch.setattr(_arrays, "enter", enter)
    with contextlib.suppress(RuntimeError):
        call(QUANTIZED._replace(scale=Tensor()))
    assert entered == [11]
