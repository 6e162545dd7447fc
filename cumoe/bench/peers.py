"""
The same layer by other means: what cumoe is measured against.

Each contender is a function of (hidden_states, topk_weights, topk_ids) for weights that are already where
it wants them, as a server holds them: whatever a method can do once, it does before the clock starts.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Layer = Callable[[Array, Array, Array], Array]

# Relative error of a token (Euclidean norm) that rounding alone explains: bfloat16 methods round the
# intermediate and often the sum too, float32 ones add thousands of products in an order of their own.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-5}


@dataclass(frozen=True)
class Peer:
    """One contender: `make` takes (w1, w2) and gives the layer; `bytes_copied` per byte of weights."""

    name: str
    what: str
    needs: str
    dtypes: tuple[str, ...]
    make: Callable[[Array, Array], Layer]
    bytes_copied: Callable[[str], float]

    def missing(self, dtype: str) -> str:
        """Why it cannot run here, or ""."""
        if dtype not in self.dtypes:
            return f"{self.name} has no {dtype}"
        if importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.name == "torch grouped_mm":
            import torch

            if not hasattr(torch.nn.functional, "grouped_mm"):
                return f"torch {torch.__version__} has no nn.functional.grouped_mm"
        return ""


def _torch_view(array: Array) -> Any:
    """The same memory as a torch tensor; torch asks for a writeable array but nothing here writes."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numpy_view(tensor: Any, dtype: np.dtype[Any]) -> Array:
    import torch

    bits = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return bits.view(dtype)


def _torch_loop(w1: Array, w2: Array) -> Layer:
    import torch

    silu, linear = torch.nn.functional.silu, torch.nn.functional.linear
    w1_t, w2_t = _torch_view(w1), _torch_view(w2)
    intermediate = w2.shape[2]

    def layer(hidden_states: Array, topk_weights: Array, topk_ids: Array) -> Array:
        with torch.inference_mode():
            x, weights, ids = map(_torch_view, (hidden_states, topk_weights, topk_ids))
            out = torch.zeros_like(x)
            for e in torch.unique(ids).tolist():
                token, choice = torch.where(ids == e)
                h = linear(x[token], w1_t[e])
                h = silu(h[:, :intermediate]) * h[:, intermediate:]
                out.index_add_(0, token, linear(h, w2_t[e]) * weights[token, choice, None].to(x.dtype))
            return _numpy_view(out, hidden_states.dtype)

    return layer


def _torch_grouped_mm(w1: Array, w2: Array) -> Layer:
    import torch

    functional = torch.nn.functional
    w1_t, w2_t = _torch_view(w1).transpose(1, 2), _torch_view(w2).transpose(1, 2)
    experts, intermediate = w2.shape[0], w2.shape[2]

    def layer(hidden_states: Array, topk_weights: Array, topk_ids: Array) -> Array:
        with torch.inference_mode():
            x, weights, ids = map(_torch_view, (hidden_states, topk_weights, topk_ids))
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
            return _numpy_view(by_pair.view(x.shape[0], top_k, -1).sum(1), hidden_states.dtype)

    return layer


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


_ALL = ("bfloat16", "float16", "float32")
PEERS: tuple[Peer, ...] = (
    Peer("torch loop", "torch, one expert after the other", "torch", _ALL, _torch_loop, lambda dtype: 0.0),
    Peer(
        "torch grouped_mm",
        "torch.nn.functional.grouped_mm on sorted rows",
        "torch",
        _ALL,
        _torch_grouped_mm,
        lambda dtype: 0.0,
    ),
    Peer(
        "NumPy loop",
        "NumPy + its BLAS, one expert after the other, float32 weights",
        "numpy",
        _ALL,
        _numpy_loop,
        lambda dtype: 0.0 if dtype == "float32" else 2.0,
    ),
)


def use_threads(threads: int) -> None:
    """Give torch as many threads as cumoe has, if torch is there; the BLAS of NumPy takes all cores by itself."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)


def sample_error(
    out: Array, hidden_states: Array, w1: Array, w2: Array, topk_weights: Array, topk_ids: Array, sample: int = 4
) -> float:
    """Largest relative error (Euclidean norm) of a few tokens against the layer in float64."""
    worst = 0.0
    intermediate = w2.shape[2]
    for t in np.unique(np.linspace(0, len(out) - 1, min(sample, len(out))).astype(int)):
        x = hidden_states[t].astype(np.float64)
        exact = np.zeros_like(x)
        for weight, e in zip(topk_weights[t].astype(np.float64), topk_ids[t], strict=True):
            h = w1[e].astype(np.float64) @ x
            gate, up = h[:intermediate], h[intermediate:]
            exact += weight * (w2[e].astype(np.float64) @ (gate / (1.0 + np.exp(-gate)) * up))
        error = float(np.linalg.norm(out[t].astype(np.float64) - exact) / np.linalg.norm(exact))
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst
