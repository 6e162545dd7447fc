"""Wrong calls of what stands around the layer: preparing, routing, the parts, `verify` and `plan`."""

import numpy as np
import pytest
from wrong_calls import (
    HUGE,
    IDS,
    INTERLEAVED,
    LAYER,
    LOGITS,
    MAP,
    NAMES,
    PREPARED,
    W1,
    W2,
    WEIGHTS,
    E,
    H,
    I,
    K,
    T,
    X,
    put,
    refused,
    table,
    zeros,
)

import cumoe

# ---- prepare ----


@table(
    ({"w1": PREPARED}, "TypeError: w1 must be an array (E, 2I, H), got PreparedExperts; it is prepared already"),
    ({"w1": W1.tolist()}, "TypeError: w1 must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray"),
    ({"w2": None}, "TypeError: w2 must be an array, got None"),
    (
        {"w1": W1.transpose(0, 2, 1)},
        "ValueError: w1 must have shape (E, 2I, H) = (4, 48, 32), got (4, 32, 48); the last two axes look swapped",
    ),
    ({"device": "cuda:0"}, "ValueError: device must be that of the arrays = cpu, got 'cuda:0'; copy them there"),
    ({"out": np.zeros(3)}, "TypeError: out must be PreparedExperts, got ndarray"),
    ({"out": INTERLEAVED}, "ValueError: out must have activation = 'silu', got 'swigluoai'"),
    ({"w1": W1[:3], "w2": W2[:3], "out": PREPARED}, "ValueError: out must have num_experts = 3, got 4"),
    (
        {"out": PREPARED, "quant_config": cumoe.biased_moe_quant_config(None, np.zeros((E, H), "float32"))},
        "ValueError: out must have been prepared with a w2_bias, like quant_config; prepare it anew",
    ),
)
def test_prepare(change, message):
    before = [experts.w1.tobytes() for experts in (PREPARED.experts, INTERLEAVED.experts)]
    refused(cumoe.prepare, {"w1": W1, "w2": W2} | change, message)
    assert [experts.w1.tobytes() for experts in (PREPARED.experts, INTERLEAVED.experts)] == before


# ---- the whole layer ----


@table(
    ({"top_k": 5}, "ValueError: top_k must be in 1..4, got 5"),
    ({"top_k": 0}, "ValueError: top_k must be in 1..4, got 0"),
    ({"top_k": 2.0}, "TypeError: top_k must be an int, got float"),
    (
        {"router_logits": LOGITS[0]},
        "ValueError: router_logits must have 2 axes (T, global_num_experts), got shape (4,)",
    ),
    (
        {"router_logits": np.zeros((T, 6), "float32")},
        "ValueError: router_logits must have shape (T, global_num_experts) = (5, 4), got (5, 6)",
    ),
    (
        {"router_logits": np.zeros((T, 6), "float32"), "w1": PREPARED, "w2": None},
        "ValueError: router_logits must have shape (T, global_num_experts) = (5, 4), got (5, 6)",
    ),
    (
        {"expert_map": MAP},
        "ValueError: router_logits must have shape (T, global_num_experts) = (5, 6), got (5, 4)",
    ),
    ({"router_logits": LOGITS[:4]}, "ValueError: hidden_states must have shape (T, H) = (4, H), got (5, 32)"),
    (
        {"router_logits": LOGITS.astype("float64")},
        "TypeError: router_logits must be float32, float16 or bfloat16, got float64",
    ),
    (
        {"router_logits": LOGITS.tolist()},
        "TypeError: router_logits must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    (
        {"router_logits": put(LOGITS, (2, 3), np.nan), "check": True},
        "ValueError: router_logits must be finite or -inf, got nan at [2, 3]",
    ),
    (
        {"router_logits": put(LOGITS, (0, 1), np.inf), "check": True},
        "ValueError: router_logits must be finite or -inf, got inf at [0, 1]",
    ),
    (
        {"hidden_states": put(X, (0, 0), np.nan), "check": True},
        "ValueError: hidden_states must be finite, got nan at [0, 0]",
    ),
    ({"scoring_func": "tanh"}, "ValueError: scoring_func must be softmax, sigmoid or sqrtsoftplus, got 'tanh'"),
    ({"use_grouped_topk": True}, "ValueError: num_expert_group must be given with use_grouped_topk, got None"),
    ({"custom_routing_function": "llama4"}, "TypeError: custom_routing_function must be callable, got str"),
    (
        {"custom_routing_function": lambda x, logits, k, renormalize: (WEIGHTS[:, :1], IDS)},
        "ValueError: topk_weights of custom_routing_function must have shape (T, k) = (5, 2), got (5, 1)",
    ),
    (
        {"e_score_correction_bias": np.zeros(5, "float32")},
        "ValueError: e_score_correction_bias must have shape (E,) = (4,), got (5,)",
    ),
    ({"w2": W2[:, :, :20]}, "ValueError: w1 must have shape (E, 2I, H) = (4, 40, 32), got (4, 48, 32)"),
)
def test_fused_moe(change, message):
    arguments = {"hidden_states": X, "w1": W1, "w2": W2, "router_logits": LOGITS, "top_k": 2}
    refused(cumoe.fused_moe, arguments | {"out": np.full((T, H), 7, "float32")} | change, message)


# ---- the parts ----

OFFSETS = np.array([0, 1, 1, 4, 5])
PARTS = {
    "fused_topk": {"router_logits": LOGITS, "top_k": 2},
    "grouped_topk": {"router_logits": LOGITS, "top_k": 2, "num_expert_group": 2, "topk_group": 1},
    "hash_topk": {"router_logits": LOGITS, "input_ids": IDS[:, 0], "hash_indices_table": IDS},
    "llama4_routing": {"hidden_states": None, "gating_output": LOGITS, "topk": 1, "renormalize": False},
    "append_shared_experts": {
        "topk_weights": WEIGHTS,
        "topk_ids": IDS,
        "num_experts": E,
        "num_fused_shared_experts": 1,
    },
    "moe_align_block_size": {"topk_ids": IDS, "block_size": 16, "num_experts": E},
    "moe_permute": {"hidden_states": X, "a1q_scale": None, "topk_ids": IDS, "num_experts": E},
    "moe_unpermute": {"permuted_hidden_states": X, "topk_weights": WEIGHTS, "inv_permuted_idx": IDS},
    "silu_and_mul": {"x": X},
    "moe_activation": {"x": X, "activation": "silu"},
    "grouped_gemm": {"a": X, "b": W1, "group_offsets": OFFSETS},
    "verify": {"out": X, **LAYER},
    "plan": {"num_tokens": 1, "hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fused_topk", {"router_logits": None}, "TypeError: router_logits must be an array, got None"),
        ("fused_topk", {"top_k": 5}, "ValueError: top_k must be in 1..4, got 5"),
        (
            "fused_topk",
            {"router_logits": LOGITS[:, :0]},
            "ValueError: router_logits.shape[1] must be in 1..2147483647, got 0",
        ),
        ("fused_topk", {"is_padding": np.zeros(T, "int8")}, "TypeError: is_padding must be bool, got int8"),
        (
            "fused_topk",
            {"indices_dtype": "int8"},
            "ValueError: indices_dtype must be int32, int64 or uint32, got 'int8'",
        ),
        ("grouped_topk", {"num_expert_group": 3}, "ValueError: num_expert_group must divide E = 4, got 3"),
        ("grouped_topk", {"top_k": 3}, "ValueError: top_k must be in 1..2, got 3"),
        ("grouped_topk", {"topk_group": 3}, "ValueError: topk_group must be in 1..2, got 3"),
        ("hash_topk", {"input_ids": None}, "TypeError: input_ids must be an array, got None"),
        (
            "llama4_routing",
            {"gating_output": LOGITS[0]},
            "ValueError: gating_output must have 2 axes (T, E), got shape (4,)",
        ),
        ("llama4_routing", {"topk": 5}, "ValueError: topk must be in 1..4, got 5"),
        (
            "append_shared_experts",
            {"num_experts": HUGE},
            "ValueError: num_experts + num_fused_shared_experts must be in 1..2147483647, got 2147483649",
        ),
        ("moe_align_block_size", {"block_size": 0}, "ValueError: block_size must be in 1..2147483647, got 0"),
        (
            "moe_align_block_size",
            {"num_experts": HUGE},
            "ValueError: num_experts must be in 1..2147483647, got 2147483648",
        ),
        (
            "moe_align_block_size",
            {"topk_ids": zeros(HUGE // 2, 2, dtype="int32")},
            "ValueError: topk_ids must have fewer than 2**31 elements, got shape (1073741824, 2)",
        ),
        ("moe_align_block_size", {"expert_map": MAP}, "ValueError: expert_map must have shape (E,) = (4,), got (6,)"),
        ("moe_permute", {"topk_ids": IDS[:4]}, "ValueError: topk_ids must have shape (T, k) = (5, 2), got (4, 2)"),
        (
            "moe_permute",
            {"hidden_states": zeros(HUGE, 8), "topk_ids": zeros(HUGE, 1, dtype="int32")},
            "ValueError: topk_ids must have fewer than 2**31 elements, got shape (2147483648, 1)",
        ),
        ("moe_permute", {"out": X[:4]}, "ValueError: out must have shape (T*k, H) = (10, 32), got (4, 32)"),
        (
            "moe_unpermute",
            {"out": X},
            "ValueError: out must not share memory with permuted_hidden_states; pass a separate array or out=None",
        ),
        (
            "moe_unpermute",
            {"inv_permuted_idx": IDS[:4]},
            "ValueError: inv_permuted_idx must have shape (T, k) = (5, 2), got (4, 2)",
        ),
        (
            "silu_and_mul",
            {"x": X[:, :31]},
            "ValueError: x must have an even last axis (..., 2I) for 'silu', got shape (5, 31)",
        ),
        ("silu_and_mul", {"x": None}, "TypeError: x must be an array, got None"),
        (
            "silu_and_mul",
            {"out": X[:, :16]},
            "ValueError: out must be C-contiguous, got strides (128, 4) for shape (5, 16); pass a separate "
            "array or out=None",
        ),
        ("moe_activation", {"activation": None}, f"ValueError: activation must be {NAMES}, got None"),
        ("moe_activation", {"alpha": 2.0}, "ValueError: alpha must be None for 'silu', which does not use it, got 2.0"),
        ("grouped_gemm", {"b": W1.transpose(0, 2, 1)}, "ValueError: a must have shape (M, K) = (5, 48), got (5, 32)"),
        (
            "grouped_gemm",
            {"group_offsets": OFFSETS[:4]},
            "ValueError: group_offsets must have shape (G + 1,) = (5,), got (4,)",
        ),
        (
            "grouped_gemm",
            {"group_offsets": np.array([0, 3, 1, 4, 5]), "out": np.full((T, 2 * I), 7, "float32")},
            "ValueError: group_offsets must ascend within 0..M = 0..5, got 1 at index 2",
        ),
        (
            "verify",
            {"w1": PREPARED, "w2": None},
            "TypeError: w1 must be an array (E, 2I, H), got PreparedExperts; pass what it was prepared from",
        ),
        ("verify", {"out": X[:4]}, "ValueError: out must have shape (T, H) = (5, 32), got (4, 32)"),
        ("verify", {"topk_ids": IDS[:, :1]}, "ValueError: topk_weights must have shape (T, k) = (5, 1), got (5, 2)"),
        (
            "verify",
            {"apply_router_weight_on_input": "no"},
            "ValueError: apply_router_weight_on_input must be False, True, hidden_states or accumulator, got 'no'",
        ),
        ("verify", {"sample": -1}, "ValueError: sample must be >= 0, got -1"),
        (
            "verify",
            {"quant_config": cumoe.biased_moe_quant_config(np.zeros((E, I), "float32"), None)},
            "ValueError: w1_bias must have shape (E, 2I) = (4, 48), got (4, 24)",
        ),
        ("plan", {"num_tokens": -1}, "ValueError: num_tokens must be >= 0, got -1"),
        ("plan", {"top_k": 5}, "ValueError: top_k must be in 0..4, got 5"),
        ("plan", {"hidden_size": 0}, "ValueError: hidden_size must be >= 1, got 0"),
        ("plan", {"num_tokens": 2.5}, "TypeError: num_tokens must be an int, got float"),
        ("plan", {"dtype": "int8"}, "ValueError: dtype must be float32, float16 or bfloat16, got 'int8'"),
        ("plan", {"workspace_limit": 0}, "ValueError: workspace_limit must be >= one token = 1536, got 0"),
        ("plan", {"device": "gpu"}, "ValueError: device must be cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_parts(name, change, message):
    refused(getattr(cumoe, name), PARTS[name] | change, message)


def test_a_plan_of_any_size_costs_nothing():
    plan = cumoe.plan(10**9, 10**6, 10**6, 10**4, 8)
    assert plan.flops == 2 * 3 * 10**9 * 8 * 10**12
    assert plan.workspace_bytes > 2**54
