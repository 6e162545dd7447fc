"""
How a layer of the CPU suite holds its weights: plain, or as codes and scales.

A quantised scheme names both factors of its products, "int8 w8a8": eight bits of a weight and eight of an activation.
Sixteen stand for activations that stay bfloat16, as all tokens here do.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumoe.bench import weights
from cumoe.bench.shapes import DTYPES, Shape

_CODE_BITS = {"int8": 8, "fp8": 8, "int4": 4, "mxfp4": 4}
_SCALE_BYTES = {"int8": 4, "fp8": 4, "int4": 2, "mxfp4": 1}  # what `cumoe.quantize` gives for bfloat16 weights


@dataclass(frozen=True)
class Scheme:
    """One way to hold weights; without a `format` they are numbers of `dtype`."""

    name: str
    dtype: str  # of the tokens, and of the weights as they are drawn
    products: str  # what is multiplied: it chooses the arithmetic ceiling
    format: str = ""  # scheme of `cumoe.quantize`
    group: tuple[int, int] = (1, -1)  # rows and columns that share a scale
    builder: str = ""  # of the config, in `cumoe`; without one it is made here
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, shape: Shape, seed: int = 0) -> tuple[Any, Any]:
        """Draw ``w1`` and ``w2``: arrays, or what `cumoe.quantize` makes of them."""
        import cumoe

        w1, w2 = weights.draw(shape, self.dtype, seed)
        if not self.format:
            return w1, w2
        return cumoe.quantize(w1, self.format, self.group), cumoe.quantize(w2, self.format, self.group)

    def config(self, w1: Any, w2: Any) -> Any:
        """Describe what `draw` gave to `cumoe`, None for plain weights."""
        import cumoe

        if not self.format:
            return None
        build = _int4_w4a8 if self.builder == "" else getattr(cumoe, self.builder)
        return build(w1.scale, w2.scale, **self.options)

    def expert_bytes(self, shape: Shape) -> int:
        """Bytes of the weights of one expert, codes and scales."""
        if not self.format:
            return shape.expert_bytes(self.dtype)
        H, I = shape.hidden_size, shape.intermediate_size
        return self._matrix_bytes(2 * I, H) + self._matrix_bytes(H, I)

    def _matrix_bytes(self, rows: int, columns: int) -> int:
        down, across = (size if part == -1 else part for part, size in zip(self.group, (rows, columns), strict=True))
        groups = -(-rows // down) * -(-columns // across)
        return rows * columns * _CODE_BITS[self.format] // 8 + groups * _SCALE_BYTES[self.format]

    def weight_bytes(self, shape: Shape) -> int:
        """Bytes of the weights of all experts."""
        return shape.num_experts * self.expert_bytes(shape)

    def drawing_bytes(self, shape: Shape) -> int:
        """Bytes that `draw` takes beside what it gives."""
        return shape.weight_bytes(self.dtype) if self.format else 0

    def moved_bytes(self, shape: Shape, num_tokens: int, experts_hit: int) -> int:
        """Bytes that any method must move: the weights of the experts hit, tokens in, tokens out."""
        tokens = 2 * num_tokens * shape.hidden_size * DTYPES[self.dtype].itemsize
        return experts_hit * self.expert_bytes(shape) + tokens


def _int4_w4a8(w1_scale: Any, w2_scale: Any, group: tuple[int, int]) -> Any:
    """Describe int4 weights and tokens of int8, for which no builder has a name."""
    import cumoe

    tokens, shape = cumoe.FusedMoEQuantDesc("int8", cumoe.GroupShape.PER_TOKEN), cumoe.GroupShape(*group)
    operands = (cumoe.FusedMoEQuantDesc("int4", shape, scale) for scale in (w1_scale, w2_scale))
    return cumoe.FusedMoEQuantConfig(tokens, tokens, *operands)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(Scheme(dtype, dtype, dtype) for dtype in DTYPES),
        Scheme(
            "int8 w8a8",
            "bfloat16",
            "int8",
            "int8",
            builder="int8_w8a8_moe_quant_config",
            options={"per_act_token_quant": True},
        ),
        Scheme("int8 w8a16", "bfloat16", "bfloat16", "int8", builder="int8_w8a16_moe_quant_config"),
        Scheme(
            "int4 w4a16",
            "bfloat16",
            "bfloat16",
            "int4",
            (1, 128),
            builder="int4_w4a16_moe_quant_config",
            options={"block_shape": [0, 128]},
        ),
        Scheme(
            "int4 w4a8",
            "bfloat16",
            "int8",
            "int4",
            (1, 128),
            options={"group": (1, 128)},
        ),
        Scheme(
            "fp8 w8a16",
            "bfloat16",
            "bfloat16",
            "fp8",
            (128, 128),
            builder="fp8_w8a16_moe_quant_config",
            options={"block_shape": [128, 128]},
        ),
        Scheme("mxfp4 w4a16", "bfloat16", "bfloat16", "mxfp4", (1, 32), builder="mxfp4_w4a16_moe_quant_config"),
    )
}


class Numbers:
    """What codes stand for, one expert at a time: float32 of all would take four to eight times their memory."""

    def __init__(self, quantised: Any) -> None:
        self._quantised = quantised
        experts, rows, columns = quantised.values.shape
        self.shape = experts, rows, columns * 8 // _CODE_BITS[quantised.scheme]

    def __getitem__(self, expert: int) -> np.ndarray[Any, Any]:
        import cumoe

        one = self._quantised
        decoded: np.ndarray[Any, Any] = cumoe.dequantize(
            one._replace(values=one.values[expert], scale=one.scale[expert])
        )
        return decoded


def numbers(w: Any) -> Any:
    """Something whose item ``e`` is the matrix of expert ``e``, of what `Scheme.draw` gives."""
    return Numbers(w) if hasattr(w, "values") else w


def stored(w: Any) -> np.ndarray[Any, Any]:
    """Plain weights as they are, or the codes."""
    array: np.ndarray[Any, Any] = w if isinstance(w, np.ndarray) else w.values
    return array


def num_bytes(w: Any) -> int:
    """Bytes of plain weights, or of codes and scales."""
    return int(w.nbytes if isinstance(w, np.ndarray) else w.values.nbytes + w.scale.nbytes)
