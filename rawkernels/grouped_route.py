"""Launches grouped_route.cu: top-k inside the best groups of experts."""

import numpy as np

from cumoe.rawkernels import _load, _rows

_MOST_GROUPS = 32  # that the lanes of a warp own
_NO_LAYOUT = {**_rows.ONE_BY_ONE, "GROUPS": 1, "GROUP_SIZE": 1}


def grouped_topk(
    router_logits,
    bias,
    is_padding,
    dtype,
    num_expert_group,
    topk_group,
    scoring_func,
    renormalize,
    scale,
    topk_weights,
    topk_ids,
):
    """As the twin in cumoe.cpu.grouped_route, on the current stream."""
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        return
    top_k = topk_ids.shape[1]
    held = _rows.in_registers(num_experts, top_k) and num_expert_group <= _MOST_GROUPS
    if held:
        layout = _layout(num_experts, num_expert_group, _rows.width(router_logits))
        sizes = (num_tokens, topk_group, top_k)
    else:
        layout = _NO_LAYOUT
        sizes = (num_tokens, num_experts, num_expert_group, topk_group, top_k)
    constants = _constants(dtype, scoring_func, bias is not None, layout, _rows.c_type(topk_ids))
    kernel = _load.kernel("grouped_route.cu", "grouped_topk" if held else "grouped_topk_long", **constants)
    kernel(
        _rows.blocks(num_tokens),
        _rows.BLOCK,
        router_logits,
        bias,
        is_padding,
        topk_weights,
        topk_ids,
        *sizes,
        int(renormalize),
        np.float32(scale),
        overlap=True,
    )


def variants(arch):
    """Routers of well-known layers: (experts, groups, scoring function, bias), for rows that allow wide loads."""
    routers = [(160, 8, "softmax", False), (256, 8, "sigmoid", True), (384, 1, "sigmoid", True)]
    for dtype, neighbours in (("bfloat16", 8), ("float16", 8), ("float32", 4)):
        for num_experts, num_expert_group, scoring_func, biased in routers:
            layout = _layout(num_experts, num_expert_group, neighbours)
            yield "grouped_route.cu", "grouped_topk", _constants(dtype, scoring_func, biased, layout)
        yield "grouped_route.cu", "grouped_topk_long", _constants(dtype, "sigmoid", True, _NO_LAYOUT)
    # ids of 64 bits, groups of one expert, a row that allows no wide load
    layout = _layout(31, 31, 1)
    yield "grouped_route.cu", "grouped_topk", _constants("float32", "sqrtsoftplus", True, layout, "int64")


def _layout(num_experts, num_expert_group, neighbours):
    groups = {"GROUPS": num_expert_group, "GROUP_SIZE": num_experts // num_expert_group}
    return _rows.values_and_width(num_experts, neighbours) | groups


def _constants(dtype, scoring_func, biased, layout, ids="int"):
    constants = {"X": dtype, "ID": ids, "SCORING": scoring_func.upper(), "BIASED": int(biased)}
    return constants | layout | {"WARPS": _rows.WARPS}
