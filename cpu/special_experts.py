"""
Experts that compute nothing: a choice of expert id >= num_experts adds weight * x, or nothing at all.

    out[t, h] = (sum over j of topk_weights[t, j] where topk_ids[t, j] >= num_experts) * x[t, h]

The other choices are handed on as they are, these ones with `masked_id` and weight 0.
"""

import numpy as np

from cumoe.cpu import rows
from cumoe.cpu.bits import CODECS

LOAD, STORE = CODECS["float32"]  # constants of the template below; rows.run(...) sets them


def zero_experts(
    hidden_states, topk_weights, topk_ids, dtype, num_experts, masked_id, copies, real_weights, real_ids, out
):
    """
    Write ``real_weights``, ``real_ids`` (T, k) and ``out`` (T, H), which is 0 unless `copies`.

    Ids are signed; `dtype` names what the bits of `hidden_states` and `out` mean: float32, bfloat16 or
    float16.
    """
    load, store = CODECS[dtype]
    arguments = (
        hidden_states,
        topk_weights,
        topk_ids,
        num_experts,
        masked_id,
        copies,
        real_weights,
        real_ids,
        out,
    )
    rows.run(_zero_expert_rows, len(out), out.size, arguments, LOAD=load, STORE=store)


def _zero_expert_rows(first, last, arguments):
    hidden_states, topk_weights, topk_ids, num_experts, masked_id, copies, real_weights, real_ids, out = arguments
    for t in range(first, last):
        weight = np.float32(0)
        for j in range(topk_ids.shape[1]):
            special = topk_ids[t, j] >= num_experts
            if special and copies:
                weight += topk_weights[t, j]
            real_ids[t, j] = masked_id if special else topk_ids[t, j]
            real_weights[t, j] = np.float32(0) if special else topk_weights[t, j]
        if weight == np.float32(0):  # also keeps NaN and infinities of x out
            out[t, :] = 0
            continue
        x, y = hidden_states[t], out[t]
        for h in range(x.size):
            y[h] = STORE(weight * LOAD(x[h]))
