"""
The same layer by other libraries, on a GPU: what is installed runs in the same process and under the same clock.

Each contender is one CUDA graph of its own making, over the very arrays that cumoe gets.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cumoe.bench.gpu_timing import Replay

# Relative error of a token (Euclidean norm): methods that round the weighted rows, the intermediate and the
# sum stay below half of it, one wrong column group in a hundred is above.
TOLERANCE = {"bfloat16": 1.2e-2, "float16": 2e-3, "float32": 2e-5}


@dataclass(frozen=True)
class Peer:
    """One contender: `make` takes (x, w1, w2, topk_weights, topk_ids), all CuPy."""

    name: str
    needs: str
    layer: Callable[..., Callable[[], Any]]

    def missing(self) -> str:
        """Why it cannot run here, or ""."""
        for library in dict.fromkeys(("torch", self.needs)):
            if importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        import torch

        return "" if torch.cuda.is_available() else "torch sees no CUDA device"

    def make(self, *arrays: Any) -> tuple[Replay, Any]:
        """Capture the layer over these arrays; return the graph and the CuPy array that it writes."""
        import torch

        with torch.no_grad():
            layer = self.layer(*map(as_torch, arrays))
            for _ in range(2):
                layer()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer()
        return _TorchGraph(graph, layer), as_cupy(out)


class _TorchGraph:
    """Replays on torch's current stream; keeps what the graph reads."""

    def __init__(self, graph: Any, kept: Any) -> None:
        self._graph, self._kept = graph, kept

    def __call__(self) -> None:
        self._graph.replay()


def as_torch(array: Any) -> Any:
    """The same memory as a torch tensor."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def as_cupy(tensor: Any) -> Any:
    """The same memory as a CuPy array; bfloat16 keeps its name."""
    import cupy as cp
    import torch
    from ml_dtypes import bfloat16

    if tensor.dtype == torch.bfloat16:
        return cp.from_dlpack(tensor.view(torch.int16)).view(bfloat16)
    return cp.from_dlpack(tensor)


def _grouped_mm(x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> Callable[[], Any]:
    """The grouped product of torch, with its own sort, gather, activation and sum around it."""
    import torch

    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    silu = torch.nn.functional.silu
    w1_t, w2_t = w1.transpose(1, 2), w2.transpose(1, 2)
    num_tokens, top_k = topk_ids.shape
    intermediate = w2.shape[2]
    flat, weights = topk_ids.reshape(-1), topk_weights.reshape(-1)
    numbers = torch.arange(w1.shape[0], dtype=flat.dtype, device=flat.device)

    def layer() -> Any:
        ids, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(ids, numbers, right=True, out_int32=True)
        h = product(x[order // top_k], w1_t, offs=ends)
        h = silu(h[:, :intermediate]) * h[:, intermediate:]
        y = product(h, w2_t, offs=ends)
        y = y * weights[order, None].to(y.dtype)
        by_pair = torch.empty_like(y)
        by_pair[order] = y
        return by_pair.view(num_tokens, top_k, -1).sum(1)

    return layer


def _vllm(x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> Callable[[], Any]:
    """The fused experts of vLLM: Triton, with its tuned table where it has one for this GPU."""
    fused_experts = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
    return lambda: fused_experts(x, w1, w2, topk_weights, topk_ids)


PEERS = (
    Peer("torch grouped_mm", "torch", _grouped_mm),
    Peer("vLLM", "vllm", _vllm),
)
