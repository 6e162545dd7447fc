"""Launches route.cu: scores and top-k of router logits, or ids by a table."""

import numpy as np

from cumoe.rawkernels import _load, _rows


def fused_topk(
    router_logits,
    bias,
    input_ids,
    hash_indices_table,
    image_bias,
    first_image_id,
    is_padding,
    per_expert_scale,
    dtype,
    scoring_func,
    renormalize,
    scale,
    topk_weights,
    topk_ids,
):
    """As the twin in cumoe.cpu.route, on the current stream."""
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        return
    top_k = topk_ids.shape[1]
    table = hash_indices_table
    held = _rows.in_registers(num_experts, top_k)
    layout = _rows.values_and_width(num_experts, _rows.width(router_logits)) if held else _rows.ONE_BY_ONE
    biased = bias is not None or image_bias is not None
    constants = _constants(dtype, scoring_func, biased, layout, _rows.c_type(topk_ids), _rows.c_type(table))
    kernel = _load.kernel("route.cu", "fused_topk" if held else "fused_topk_long", **constants)
    kernel(
        _rows.blocks(num_tokens),
        _rows.BLOCK,
        router_logits,
        bias,
        input_ids,
        table,
        image_bias,
        is_padding,
        per_expert_scale,
        topk_weights,
        topk_ids,
        first_image_id,
        0 if table is None else table.shape[0],
        num_tokens,
        num_experts,
        top_k,
        int(renormalize),
        np.float32(scale),
        overlap=True,
    )


def variants(arch):
    """Routers of well-known layers: (experts, scoring function, bias), for rows that allow wide loads."""
    routers = [(8, "softmax", False), (128, "softmax", False), (512, "softmax", False), (128, "softmax", True)]
    routers += [(16, "sigmoid", False), (256, "sigmoid", True), (384, "sigmoid", True), (256, "sqrtsoftplus", True)]
    for dtype, neighbours in (("bfloat16", 8), ("float16", 8), ("float32", 4)):
        for num_experts, scoring_func, biased in routers:
            layout = _rows.values_and_width(num_experts, neighbours)
            yield "route.cu", "fused_topk", _constants(dtype, scoring_func, biased, layout)
        yield "route.cu", "fused_topk_long", _constants(dtype, "softmax", False, _rows.ONE_BY_ONE)
    # ids of 64 bits, a table, a row that allows no wide load
    yield (
        "route.cu",
        "fused_topk",
        _constants("float32", "sqrtsoftplus", True, {"VALUES": 4, "WIDTH": 1}, "int64", "int64"),
    )


def _constants(dtype, scoring_func, biased, layout, ids="int", table="int"):
    constants = {"X": dtype, "ID": ids, "TABLE": table, "SCORING": scoring_func.upper(), "BIASED": int(biased)}
    return constants | layout | {"WARPS": _rows.WARPS}
