"""Wrong calls of the layer on given choices: the exact message, and nothing written to `out`."""

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
    READY,
    W1,
    W2,
    WEIGHTS,
    E,
    H,
    I,
    T,
    X,
    put,
    read_only,
    refused,
    table,
    tensor,
    unaligned,
    zeros,
)

import cumoe

# ---- shapes ----


@table(
    ({"hidden_states": X[0]}, "ValueError: hidden_states must have 2 axes (T, H), got shape (32,)"),
    ({"hidden_states": X[None]}, "ValueError: hidden_states must have 2 axes (T, H), got shape (1, 5, 32)"),
    ({"hidden_states": X[:, :31]}, "ValueError: hidden_states must have shape (T, H) = (5, 32), got (5, 31)"),
    (
        {"hidden_states": X.T},
        "ValueError: hidden_states must have shape (T, H) = (5, 32), got (32, 5); the last two axes look swapped",
    ),
    ({"hidden_states": X[:4]}, "ValueError: topk_ids must have shape (T, k) = (4, 2), got (5, 2)"),
    ({"w1": W1[0]}, "ValueError: w1 must have 3 axes (E, 2I, H), got shape (48, 32)"),
    (
        {"w1": W1.transpose(0, 2, 1)},
        "ValueError: w1 must have shape (E, 2I, H) = (4, 48, 32), got (4, 32, 48); the last two axes look swapped",
    ),
    (
        {"w2": W2.transpose(0, 2, 1)},
        "ValueError: w2 must have shape (E, H, I) = (4, 32, 24), got (4, 24, 32); the last two axes look swapped",
    ),
    ({"w1": W1[:, :I]}, "ValueError: w1 must have shape (E, 2I, H) = (4, 48, 32), got (4, 24, 32)"),
    ({"w1": W1[:, :47]}, "ValueError: w1 must have shape (E, 2I, H) = (4, 48, 32), got (4, 47, 32)"),
    ({"w1": W1[:, :, :31]}, "ValueError: w1 must have shape (E, 2I, H) = (4, 48, 32), got (4, 48, 31)"),
    ({"w2": W2[:3]}, "ValueError: w2 must have shape (E, H, I) = (4, 32, 24), got (3, 32, 24)"),
    ({"w2": W2[:, :31]}, "ValueError: w2 must have shape (E, H, I) = (4, 32, 24), got (4, 31, 24)"),
    ({"activation": "silu_no_mul"}, "ValueError: w1 must have shape (E, I, H) = (4, 24, 32), got (4, 48, 32)"),
    ({"topk_ids": IDS[0]}, "ValueError: topk_ids must have 2 axes (T, k), got shape (2,)"),
    ({"topk_ids": IDS[:4]}, "ValueError: topk_ids must have shape (T, k) = (5, 2), got (4, 2)"),
    (
        {"topk_ids": IDS.T, "topk_weights": WEIGHTS.T},
        "ValueError: topk_ids must have shape (T, k) = (5, 5), got (2, 5)",
    ),
    ({"topk_weights": WEIGHTS[:, :1]}, "ValueError: topk_weights must have shape (T, k) = (5, 2), got (5, 1)"),
    ({"expert_map": MAP[None]}, "ValueError: expert_map must have 1 axis (global_num_experts,), got shape (1, 6)"),
    (
        {"expert_map": MAP, "global_num_experts": 8},
        "ValueError: expert_map must have shape (global_num_experts,) = (8,), got (6,)",
    ),
    ({"global_num_experts": 3}, "ValueError: global_num_experts must be >= 4, got 3"),
    (
        {"quant_config": cumoe.biased_moe_quant_config(np.zeros((E, I), "float32"), None)},
        "ValueError: w1_bias must have shape (E, 2I) = (4, 48), got (4, 24)",
    ),
    (
        {"quant_config": cumoe.biased_moe_quant_config(None, np.zeros((E, I), "float32"))},
        "ValueError: w2_bias must have shape (E, H) = (4, 32), got (4, 24)",
    ),
    ({"w1": W1[:0], "w2": W2[:0]}, "ValueError: w1 and w2 must have E >= 1, got shapes (0, 48, 32) and (0, 32, 24)"),
    (
        {"w1": W1[:, :, :0], "w2": W2[:, :0], "hidden_states": X[:, :0]},
        "ValueError: w1 and w2 must have H >= 1, got shapes (4, 48, 0) and (4, 0, 24)",
    ),
    (
        {"w1": W1[:, :0], "w2": W2[:, :, :0]},
        "ValueError: w1 and w2 must have I >= 1, got shapes (4, 0, 32) and (4, 32, 0)",
    ),
    (
        {
            "hidden_states": zeros(HUGE, H),
            "topk_weights": zeros(HUGE, 1),
            "topk_ids": zeros(HUGE, 1, dtype="int32"),
            "out": None,
        },
        "ValueError: T * k must be in 0..2147483647, got 2147483648",
    ),
)
def test_shapes(change, message):
    arguments = LAYER | {"out": np.full((T, H), 7, "float32")} | change
    refused(cumoe.fused_experts, arguments, message)


# ---- dtypes and kinds ----


@table(
    (
        {"hidden_states": X.tolist()},
        "TypeError: hidden_states must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    ({"hidden_states": None}, "TypeError: hidden_states must be an array, got None"),
    ({"w1": None}, "TypeError: w1 must be an array, got None"),
    ({"w2": None}, "TypeError: w2 must be an array, got None"),
    ({"topk_weights": None}, "TypeError: topk_weights must be an array, got None"),
    ({"topk_ids": None}, "TypeError: topk_ids must be an array, got None"),
    (
        {"topk_ids": np.int32(3)},
        "TypeError: topk_ids must be a NumPy, CuPy or DLPack array, got int32; use numpy.asarray",
    ),
    (
        {"hidden_states": X.astype("float64")},
        "TypeError: hidden_states must have the dtype of w1 = float32, got float64; convert one of them",
    ),
    (
        {"hidden_states": X.astype("bfloat16")},
        "TypeError: hidden_states must have the dtype of w1 = float32, got bfloat16; convert one of them",
    ),
    ({"w1": W1.astype("float64")}, "TypeError: w1 must be float32, float16 or bfloat16, got float64"),
    ({"w1": W1.astype("float8_e4m3fn")}, "TypeError: w1 must be float32, float16 or bfloat16, got float8_e4m3fn"),
    (
        {"w2": W2.astype("float16")},
        "TypeError: w2 must have the dtype of w1 = float32, got float16; convert one of them",
    ),
    ({"topk_ids": IDS.astype("float32")}, "TypeError: topk_ids must be int32, int64 or uint32, got float32"),
    ({"topk_ids": IDS.astype("int16")}, "TypeError: topk_ids must be int32, int64 or uint32, got int16"),
    (
        {"topk_weights": WEIGHTS.astype("int32")},
        "TypeError: topk_weights must be float32, float64, float16 or bfloat16, got int32",
    ),
    ({"expert_map": MAP.astype("int64")}, "TypeError: expert_map must be int32, got int64"),
    (
        {"hidden_states": X.astype(object)},
        "TypeError: hidden_states must have the dtype of w1 = float32, got object; convert one of them",
    ),
    (
        {"hidden_states": np.ma.masked_less(X, 0)},
        "TypeError: hidden_states must be a plain array, got MaskedArray; its mask would be ignored, "
        "use hidden_states.filled",
    ),
    ({"w1": W1.astype(">f4")}, "TypeError: w1 must be in native byte order, got >f4; use w1.astype"),
    ({"topk_ids": IDS.astype(">i4")}, "TypeError: topk_ids must be in native byte order, got >i4; use topk_ids.astype"),
    (
        {"quant_config": cumoe.biased_moe_quant_config(np.zeros((E, 2 * I), "int8"), None)},
        "TypeError: w1_bias must be float32, float16 or bfloat16, got int8",
    ),
    ({"quant_config": {"w1_bias": None}}, "TypeError: quant_config must be a FusedMoEQuantConfig, got dict"),
    ({"global_num_experts": 6.0}, "TypeError: global_num_experts must be an int, got float"),
    ({"workspace_limit": "1 GB"}, "TypeError: workspace_limit must be an int, got str"),
    ({"workspace_limit": 100}, "ValueError: workspace_limit must be >= one token = 1536, got 100"),
    ({"workspace_limit": -1}, "ValueError: workspace_limit must be >= 0, got -1"),
    ({"activation": "swish"}, f"ValueError: activation must be {NAMES}, got 'swish'"),
    ({"activation": np.array(["silu", "gelu"])}, f"TypeError: activation must be {NAMES}, got ndarray"),
    (
        {"quant_config": cumoe.FusedMoEQuantConfig.make(gemm1_clamp_limit=3.0), "activation": "gelu"},
        "ValueError: quant_config.gemm1_clamp_limit must be None for 'gelu', which does not use it, got 3.0",
    ),
    (
        {"apply_router_weight_on_input": "yes"},
        "ValueError: apply_router_weight_on_input must be False, True, hidden_states or accumulator, got 'yes'",
    ),
)
def test_kinds(change, message):
    arguments = LAYER | {"out": np.full((T, H), 7, "float32")} | change
    refused(cumoe.fused_experts, arguments, message)


# ---- what cannot be shared, and mixtures ----

KINDS = "TypeError: arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, got "


def torch_arguments(**change):
    return {name: tensor(array) for name, array in LAYER.items()} | change


def test_libraries_do_not_mix():
    message = KINDS + "w1: numpy, w2: numpy, hidden_states: {0}, topk_weights: numpy, topk_ids: numpy, out: {1}"
    out = np.full((T, H), 7, "float32")
    refused(
        cumoe.fused_experts,
        LAYER | {"hidden_states": tensor(X), "out": out},
        message.format("torch", "numpy"),
    )
    refused(cumoe.fused_experts, LAYER | {"out": tensor(X)}, message.format("numpy", "torch"))
    config = cumoe.biased_moe_quant_config(np.zeros((E, 2 * I), "float32"), None)
    message = KINDS + "w1: torch, w2: torch, w1_bias: numpy, hidden_states: torch, topk_weights: torch, topk_ids: torch"
    refused(cumoe.fused_experts, torch_arguments(quant_config=config), message)
    message = KINDS + "router_logits: torch, e_score_correction_bias: numpy"
    arguments = {"router_logits": tensor(LOGITS), "top_k": 2, "e_score_correction_bias": np.zeros(E, "float32")}
    refused(cumoe.fused_topk, arguments, message)


def test_tensors_that_are_no_plain_memory():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = tensor(X)
    for wrong, message in (
        (x.clone().requires_grad_(), "must not require gradients, got requires_grad=True; pass hidden_states.detach()"),
        (torch._neg_view(x), "must not be a negated view, got is_neg() = True; pass hidden_states.resolve_neg()"),
        (x.to("meta"), "must be in host or CUDA memory, got Tensor: Unknown device type meta for Dlpack"),
        (x.to(torch.complex64), "must have a dtype that cumoe knows, got DLPack (code, bits, lanes) = (5, 64, 1)"),
        (
            x.to_sparse(),
            "must be an array that can be shared, got Tensor: "
            "Can't export tensors with layout other than torch.strided",
        ),
    ):
        arguments = torch_arguments(hidden_states=wrong)
        refused(cumoe.fused_experts, arguments, f"TypeError: hidden_states {message}")


# ---- out ----


@table(
    (lambda a: np.empty((T, H + 1), "float32"), "ValueError: out must have shape (T, H) = (5, 32), got (5, 33)"),
    (
        lambda a: np.empty((H, T), "float32"),
        "ValueError: out must have shape (T, H) = (5, 32), got (32, 5); the last two axes look swapped",
    ),
    (lambda a: np.empty((T, H), "float64"), "TypeError: out must be float32, got float64"),
    (
        lambda a: np.empty((H, T), "float32").T,
        "ValueError: out must be C-contiguous, got strides (4, 20) for shape (5, 32); pass a separate "
        "array or out=None",
    ),
    (
        lambda a: np.empty((T, 2 * H), "float32")[:, ::2],
        "ValueError: out must be C-contiguous, got strides (256, 8) for shape (5, 32); pass a separate "
        "array or out=None",
    ),
    (
        lambda a: unaligned((T, H)),
        "ValueError: out must be aligned to 4 bytes, got an address 1 bytes off; pass a separate array or out=None",
    ),
    (
        lambda a: read_only(np.zeros((T, H), "float32")),
        "ValueError: out must be writeable, got a read-only array; pass a copy",
    ),
    (
        lambda a: a["hidden_states"],
        "ValueError: out must not share memory with hidden_states; pass a separate array or out=None",
    ),
    (
        lambda a: a["w1"].reshape(-1)[7 : 7 + T * H].reshape(T, H),
        "ValueError: out must not share memory with w1; pass a separate array or out=None",
    ),
    (
        lambda a: a["w2"][1, :, :5].base.reshape(-1)[: T * H].reshape(T, H),
        "ValueError: out must not share memory with w2; pass a separate array or out=None",
    ),
    (lambda a: [[0.0] * H] * T, "TypeError: out must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray"),
)
def test_outputs(change, message):
    arguments = {name: array.copy() for name, array in LAYER.items()}
    refused(cumoe.fused_experts, arguments | {"out": change(arguments)}, message)


def test_an_output_may_not_overlap_in_part():
    memory = np.zeros(2 * T * H, "float32")
    x, out = memory[: T * H].reshape(T, H), memory[T * H - 1 : 2 * T * H - 1].reshape(T, H)
    message = "ValueError: out must not share memory with hidden_states; pass a separate array or out=None"
    refused(cumoe.fused_experts, LAYER | {"hidden_states": x, "out": out}, message)
    cumoe.fused_experts(**LAYER | {"hidden_states": x, "out": memory[T * H :].reshape(T, H)})  # neighbours are fine


# ---- prepared weights ----


@table(
    ({"w2": W2}, "TypeError: w2 must be None when w1 is PreparedExperts, got ndarray"),
    (
        {"quant_config": cumoe.FUSED_MOE_UNQUANTIZED_CONFIG},
        "ValueError: quant_config must be None when w1 is PreparedExperts; pass it to cumoe.prepare",
    ),
    (
        {"w1": INTERLEAVED, "activation": "gelu"},
        "ValueError: activation must be that of w1 = 'swigluoai', got 'gelu'; prepare w1 for it",
    ),
    ({"hidden_states": X[:, :31]}, "ValueError: hidden_states must have shape (T, H) = (5, 32), got (5, 31)"),
    (
        {"hidden_states": X.astype("float16")},
        "TypeError: hidden_states must have the dtype of w1 = float32, got float16; convert one of them",
    ),
    ({"global_num_experts": 3}, "ValueError: global_num_experts must be >= 4, got 3"),
)
def test_prepared(change, message):
    refused(cumoe.fused_experts, READY | {"out": np.full((T, H), 7, "float32")} | change, message)


# ---- values, with check=True ----


@table(
    (
        {"topk_ids": put(IDS, (3, 1), 4)},
        "ValueError: topk_ids must be in 0..3, or -1 to skip, got 4 for token 3, choice 1",
    ),
    (
        {"topk_ids": put(IDS, (0, 0), -2)},
        "ValueError: topk_ids must be in 0..3, or -1 to skip, got -2 for token 0, choice 0",
    ),
    (
        {"topk_ids": put(IDS.astype("uint32"), (1, 0), 2**31)},
        "ValueError: topk_ids must be in 0..3, or -1 to skip, got 2147483648 for token 1, choice 0",
    ),
    ({"topk_ids": put(IDS, (2, 1), 1)}, "ValueError: topk_ids must be distinct in a row, got 1 twice for token 2"),
    (
        {"topk_ids": put(IDS, (2, 1), 6), "expert_map": MAP},
        "ValueError: topk_ids must be in 0..5, or -1 to skip, got 6 for token 2, choice 1",
    ),
    ({"expert_map": put(MAP, 2, 4)}, "ValueError: expert_map must be < E = 4, got 4 at index 2"),
    ({"hidden_states": put(X, (4, 31), np.nan)}, "ValueError: hidden_states must be finite, got nan at [4, 31]"),
    ({"hidden_states": put(X, (1, 0), -np.inf)}, "ValueError: hidden_states must be finite, got -inf at [1, 0]"),
    ({"topk_weights": put(WEIGHTS, (0, 1), np.inf)}, "ValueError: topk_weights must be finite, got inf at [0, 1]"),
)
def test_values(change, message):
    arguments = LAYER | {"out": np.full((T, H), 7, "float32"), "check": True} | change
    refused(cumoe.fused_experts, arguments, message)
    cumoe.fused_experts(**arguments | {"check": False})  # defined, as the docstring says


def test_what_check_accepts():
    ids, weights = put(IDS, (0, 0), -1), put(put(WEIGHTS, (1, 1), 0), (1, 0), 1)
    ids[1] = 2  # twice, but one of the two has weight 0
    cumoe.fused_experts(**LAYER | {"topk_ids": ids, "topk_weights": weights}, check=True)
    cumoe.fused_experts(**LAYER | {"topk_ids": ids.astype("uint32"), "topk_weights": weights}, check=True)
    masked = put(LOGITS, (slice(None), 1), -np.inf)
    cumoe.fused_moe(X, W1, W2, masked, top_k=2, check=True)
