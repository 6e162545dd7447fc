"""Named model shapes, their costs, and the two kinds of routing that every suite runs."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class Shape:
    """One MoE layer: E experts, k of them per token, hidden size H, intermediate size I."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        return f"{self.name} (E {self.num_experts}, k {self.top_k}, H {self.hidden_size}, I {self.intermediate_size})"

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of the weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size * DTYPES[dtype].itemsize

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights of all experts."""
        return self.num_experts * self.expert_bytes(dtype)

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of the two matrix products: ``6 T k H I``."""
        return 6 * num_tokens * self.top_k * self.hidden_size * self.intermediate_size

    def moved_bytes(self, num_tokens: int, experts_hit: int, dtype: str) -> int:
        """Bytes that any method must move: the weights of the experts hit, tokens in, tokens out."""
        return experts_hit * self.expert_bytes(dtype) + 2 * num_tokens * self.hidden_size * DTYPES[dtype].itemsize


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("mixtral", 8, 2, 2048, 7168),  # half the width of mixtral-8x7b: what a CPU study can hold twice
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("qwen3-next", 512, 10, 2048, 512),
        Shape("dsv3-ep", 32, 8, 7168, 2048),  # one rank of DeepSeek-V3 with 8 expert-parallel ranks
        Shape("dsv3-tp8", 256, 8, 7168, 256),  # one rank of DeepSeek-V3 with 8 tensor-parallel ranks
        Shape("small", 16, 4, 512, 512),
        Shape("tiny", 8, 2, 64, 96),
    )
}

ROUTINGS = ("uniform", "skewed")


def routing(
    shape: Shape, num_tokens: int, kind: str = "uniform", seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """
    Draw ``topk_weights`` (T, k) float32 and ``topk_ids`` (T, k) int32 without a router.

    "uniform" takes k distinct experts at random; "skewed" gives the r-th most popular expert a
    probability proportional to ``1 / r``, its popularity order drawn from `seed` too.
    """
    if kind not in ROUTINGS:
        raise ValueError(f"routing must be {' or '.join(ROUTINGS)}, got {kind!r}")
    rng = np.random.default_rng([seed, num_tokens, shape.num_experts])
    # Adding Gumbel noise to log-probabilities and keeping the k largest draws k experts without replacement.
    scores = rng.gumbel(size=(num_tokens, shape.num_experts))
    if kind == "skewed":
        scores -= np.log(1.0 + rng.permutation(shape.num_experts))
    topk_ids = np.argsort(-scores, axis=1, kind="stable")[:, : shape.top_k].astype(np.int32)
    topk_weights = rng.uniform(0.5, 1.5, size=(num_tokens, shape.top_k))
    topk_weights /= topk_weights.sum(axis=1, keepdims=True)
    return topk_weights.astype(np.float32), topk_ids


def tokens(shape: Shape, num_tokens: int, dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """Draw hidden states (T, H) of unit variance."""
    rng = np.random.default_rng([seed, 1])
    return rng.standard_normal((num_tokens, shape.hidden_size), dtype=np.float32).astype(DTYPES[dtype])
