"""Launches special_experts.cu: experts that compute nothing."""

from cumoe.rawkernels import _load, _rows

_BLOCK = 256


def zero_experts(
    hidden_states, topk_weights, topk_ids, dtype, num_experts, masked_id, copies, real_weights, real_ids, out
):
    """As the twin in cumoe.cpu.special_experts, on the current stream."""
    num_tokens, hidden_size = out.shape
    if num_tokens == 0:
        return
    kernel = _load.kernel(
        "special_experts.cu",
        "zero_experts",
        X=dtype,
        ID=_rows.c_type(topk_ids),
        WIDTH=_rows.width(hidden_states, out),
        BLOCK=_BLOCK,
    )
    kernel(
        num_tokens,
        _BLOCK,
        hidden_states,
        topk_weights,
        topk_ids,
        real_weights,
        real_ids,
        out,
        num_experts,
        masked_id,
        int(copies),
        topk_ids.shape[1],
        hidden_size,
        overlap=True,
    )
