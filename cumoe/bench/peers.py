"""
The same layer by other means: what cumoe is measured against on a CPU.

Each contender is a function of (hidden_states, topk_weights, topk_ids) for weights that are already where
it wants them, as a server holds them: whatever a method can do once, it does before the clock starts.
`compiled_peers` has those that are compiled for the purpose.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.bench.shapes import DTYPES

Array = np.ndarray[Any, Any]
Layer = Callable[[Array, Array, Array], Array]


def _ready() -> str:
    return ""


@dataclass(frozen=True)
class Peer:
    """
    One contender: `make` takes (w1, w2), plain or `cumoe.Quantized`, and gives the layer.

    `schemes` are names of `cumoe.bench.schemes`; `bytes_copied` is per byte of weights. `load` makes the libraries
    ready, or says why it cannot. A peer that `rounds_activations` to eight bits is judged by that.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    schemes: tuple[str, ...]
    make: Callable[[Any, Any], Layer]
    bytes_copied: Callable[[str], float]
    load: Callable[[], str] = _ready
    rounds_activations: bool = False
    most_tokens: int | None = None

    def missing(self, scheme: str) -> str:
        """Why it cannot run here, or ""."""
        if scheme not in self.schemes:
            return f"it has no {scheme}"
        for library in self.needs:
            if importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        return self.load()


# ml_dtypes' number formats in torch, and the bits that NumPy hands over
_TORCH_NAMES = {
    "bfloat16": (np.int16, "bfloat16"),
    "float8_e4m3fn": (np.uint8, "float8_e4m3fn"),
    "float8_e8m0fnu": (np.uint8, "uint8"),  # exponents are bytes to those who take them
}


def as_torch(array: Array) -> Any:
    """The same memory as a torch tensor; torch asks for a writeable array but nothing here writes."""
    import torch

    if array.dtype.name not in _TORCH_NAMES:
        return torch.from_numpy(array)
    bits, name = _TORCH_NAMES[array.dtype.name]
    return torch.from_numpy(array.view(bits)).view(getattr(torch, name))


def as_numpy(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """The same memory as a NumPy array of `dtype`."""
    import torch

    bits = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return bits.view(dtype)


def in_torch(layer: Callable[[Any, Any, Any], Any]) -> Layer:
    """Make a layer of tensors one of arrays, without a graph of derivatives."""
    import torch

    def on_arrays(hidden_states: Array, topk_weights: Array, topk_ids: Array) -> Array:
        with torch.inference_mode():
            out = layer(as_torch(hidden_states), as_torch(topk_weights), as_torch(topk_ids))
            return as_numpy(out, hidden_states.dtype)

    return on_arrays


def use_threads(threads: int) -> None:
    """Give torch as many threads as cumoe has, if torch is there; the BLAS of NumPy takes all cores by itself."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)


def _torch_loop(w1: Array, w2: Array) -> Layer:
    import torch

    silu, linear = torch.nn.functional.silu, torch.nn.functional.linear
    w1_t, w2_t = as_torch(w1), as_torch(w2)
    intermediate = w2.shape[2]

    def layer(x: Any, weights: Any, ids: Any) -> Any:
        out = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            token, choice = torch.where(ids == e)
            h = linear(x[token], w1_t[e])
            h = silu(h[:, :intermediate]) * h[:, intermediate:]
            out.index_add_(0, token, linear(h, w2_t[e]) * weights[token, choice, None].to(x.dtype))
        return out

    return in_torch(layer)


def _load_grouped_mm() -> str:
    import torch

    if hasattr(torch.nn.functional, "grouped_mm"):
        return ""
    return f"torch {torch.__version__} has no nn.functional.grouped_mm"


def _torch_grouped_mm(w1: Array, w2: Array) -> Layer:
    import torch

    functional = torch.nn.functional
    w1_t, w2_t = as_torch(w1).transpose(1, 2), as_torch(w2).transpose(1, 2)
    experts, intermediate = w2.shape[0], w2.shape[2]

    def layer(x: Any, weights: Any, ids: Any) -> Any:
        top_k = ids.shape[1]
        order = torch.argsort(ids.flatten(), stable=True)
        counts = torch.bincount(ids.flatten(), minlength=experts)
        ends = torch.cumsum(counts, 0).to(torch.int32)
        h = functional.grouped_mm(x[order // top_k], w1_t, offs=ends)
        h = functional.silu(h[:, :intermediate]) * h[:, intermediate:]
        y = functional.grouped_mm(h, w2_t, offs=ends)
        y = y * weights.flatten()[order, None].to(x.dtype)
        by_pair = torch.empty_like(y)
        by_pair[order] = y
        return by_pair.view(x.shape[0], top_k, -1).sum(1)

    return in_torch(layer)


def _load_transformers() -> str:
    import transformers

    try:
        from transformers.integrations import moe  # noqa: F401
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: F401
    except ImportError as problem:
        return f"transformers {transformers.__version__} has no experts of its own: {problem}"
    return ""


def _transformers(implementation: str) -> Callable[[Array, Array], Layer]:
    """One of its implementations of the experts alone; its router and its checkpoint stay outside."""

    def make(w1: Array, w2: Array) -> Layer:
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        experts, hidden, intermediate = w2.shape
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        config._experts_implementation = implementation
        with torch.device("meta"):  # without memory: it gets the weights that are there
            module = MixtralExperts(config)
        module.gate_up_proj = torch.nn.Parameter(as_torch(w1), requires_grad=False)
        module.down_proj = torch.nn.Parameter(as_torch(w2), requires_grad=False)
        module.eval()
        # its routers hand over 64-bit ids
        return in_torch(lambda x, weights, ids: module(x, ids.to(torch.int64), weights))

    return make


def _numpy_loop(w1: Array, w2: Array) -> Layer:
    # NumPy multiplies no 16-bit matrices: this method keeps float32 weights, widened once.
    w1_f, w2_f = w1.astype(np.float32, copy=False), w2.astype(np.float32, copy=False)
    intermediate = w2.shape[2]

    def layer(hidden_states: Array, topk_weights: Array, topk_ids: Array) -> Array:
        x = hidden_states.astype(np.float32, copy=False)
        out = np.zeros_like(x)
        for e in np.unique(topk_ids):
            token, choice = np.nonzero(topk_ids == e)
            h = x[token] @ w1_f[e].T
            gate, up = h[:, :intermediate], h[:, intermediate:]
            h = gate / (1.0 + np.exp(-gate)) * up
            out[token] += topk_weights[token, choice, None] * (h @ w2_f[e].T)  # no token twice in one expert
        return out.astype(hidden_states.dtype, copy=False)

    return layer


def nothing_copied(scheme: str) -> float:
    """It works on the weights that are there."""
    return 0.0


def _float32_copied(scheme: str) -> float:
    return 0.0 if scheme == "float32" else 2.0


_PLAIN = tuple(DTYPES)
_GROUPED_MM = "torch.nn.functional.grouped_mm on sorted rows"
_FROM_TRANSFORMERS = "MixtralExperts of transformers, experts implementation "

PEERS: tuple[Peer, ...] = (
    Peer("torch loop", "torch, one expert after the other", ("torch",), _PLAIN, _torch_loop, nothing_copied),
    Peer("torch grouped_mm", _GROUPED_MM, ("torch",), _PLAIN, _torch_grouped_mm, nothing_copied, load=_load_grouped_mm),
    *(
        Peer(
            f"transformers {implementation}",
            _FROM_TRANSFORMERS + implementation,
            ("torch", "transformers"),
            _PLAIN,
            _transformers(implementation),
            nothing_copied,
            load=_load_transformers,
            most_tokens=most_tokens,
        )
        # batched_mm copies the weights of every choice of every token
        for implementation, most_tokens in (("eager", None), ("grouped_mm", None), ("batched_mm", 1))
    ),
    Peer(
        "NumPy loop",
        "NumPy + its BLAS, one expert after the other, float32 weights",
        ("numpy",),
        _PLAIN,
        _numpy_loop,
        _float32_copied,
    ),
)
