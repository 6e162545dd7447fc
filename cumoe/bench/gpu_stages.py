"""The layer on the GPU in its stages, each alone in a graph: where the time of a case goes."""

from collections.abc import Callable
from typing import Any

from cumoe._demo import STAGES, stage_bytes
from cumoe.bench.shapes import Shape


def calls(x: Any, prepared: Any, topk_weights: Any, topk_ids: Any, **named: Any) -> dict[str, Callable[[], Any]]:
    """Each stage behind the routing, as `cumoe.fused_experts` runs it; one finds what those before it have left."""
    from cumoe._call import enter_call

    arguments = (x, prepared, None, topk_weights, topk_ids, "silu", None, False, None, None, None, False, None)
    (piece,) = enter_call(*arguments, **named).pieces()
    steps = (piece.sort, piece.first_product, piece.second_product, piece.add_up)
    return dict(zip(STAGES[1:], steps, strict=True))


def work(shape: Shape, topk_ids: Any, itemsize: int, logit_size: int = 4) -> dict[str, tuple[int, int]]:
    """Bytes and operations of each stage; `topk_ids` is on the host."""
    products = shape.flops(len(topk_ids))
    flops = {"gemm1": 2 * products // 3, "gemm2": products // 3}
    num_bytes = stage_bytes(shape, topk_ids, logit_size, itemsize)
    return {name: (count, flops.get(name, 0)) for name, count in num_bytes.items()}
