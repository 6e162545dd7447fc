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
    held = _rows.in_registers(router_logits, top_k)
    table = hash_indices_table
    kernel = _load.kernel(
        "route.cu",
        "fused_topk" if held else "fused_topk_long",
        X=dtype,
        ID=_rows.c_type(topk_ids),
        TABLE="int" if table is None else _rows.c_type(table),
        SCORING=scoring_func.upper(),
        BIASED=int(bias is not None or image_bias is not None),
        WARPS=_rows.WARPS,
        **(_rows.values_and_width(router_logits) if held else _rows.ONE_BY_ONE),
    )
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
