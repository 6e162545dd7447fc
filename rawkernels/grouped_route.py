"""Launches grouped_route.cu: top-k inside the best groups of experts."""

import numpy as np

from cumoe.rawkernels import _load, _rows

_MOST_GROUPS = 32  # that the lanes of a warp own


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
    held = _rows.in_registers(router_logits, top_k) and num_expert_group <= _MOST_GROUPS
    if held:
        layout = _rows.values_and_width(router_logits)
        layout.update(GROUPS=num_expert_group, GROUP_SIZE=num_experts // num_expert_group)
        sizes = (num_tokens, topk_group, top_k)
    else:
        layout = {**_rows.ONE_BY_ONE, "GROUPS": 1, "GROUP_SIZE": 1}
        sizes = (num_tokens, num_experts, num_expert_group, topk_group, top_k)
    kernel = _load.kernel(
        "grouped_route.cu",
        "grouped_topk" if held else "grouped_topk_long",
        X=dtype,
        ID=_rows.c_type(topk_ids),
        SCORING=scoring_func.upper(),
        BIASED=int(bias is not None),
        WARPS=_rows.WARPS,
        **layout,
    )
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
