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
    constants = _constants(dtype, _rows.width(hidden_states, out), _rows.c_type(topk_ids))
    kernel = _load.kernel("special_experts.cu", "zero_experts", **constants)
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


def variants(arch):
    """For rows that allow wide loads, and for one that does not."""
    for dtype, width in (("bfloat16", 8), ("float16", 8), ("float32", 4)):
        yield "special_experts.cu", "zero_experts", _constants(dtype, width)
    yield "special_experts.cu", "zero_experts", _constants("float16", 1, "int64")


def _constants(dtype, width, ids="int"):
    return {"X": dtype, "ID": ids, "WIDTH": width, "BLOCK": _BLOCK}
