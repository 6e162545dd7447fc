"""Four model families against their own MoE blocks of the newest transformers, on the same saved files."""

import numpy as np
import pytest

import cumoe
from cumoe.reference.experts import Bounded, ratio
from cumoe.reference.experts import fused_experts as reference_experts
from cumoe.reference.rounding import gamma, rounded, unit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

COMMON = {
    "vocab_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
CONFIGS = {
    "mixtral": ("MixtralConfig", {**COMMON, "hidden_size": 48, "intermediate_size": 56, "num_local_experts": 4}, 2),
    "mixtral, I > H": (
        "MixtralConfig",
        {**COMMON, "hidden_size": 72, "intermediate_size": 200, "num_local_experts": 16},
        4,
    ),
    "qwen2": (
        "Qwen2MoeConfig",
        {
            **COMMON,
            "hidden_size": 56,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 72,
            "num_experts": 5,
        },
        3,
    ),
    "qwen2, normed": (
        "Qwen2MoeConfig",
        {
            **COMMON,
            "hidden_size": 48,
            "moe_intermediate_size": 72,
            "shared_expert_intermediate_size": 40,
            "num_experts": 12,
            "norm_topk_prob": True,
        },
        4,
    ),
    "qwen3": ("Qwen3MoeConfig", {**COMMON, "hidden_size": 72, "moe_intermediate_size": 56, "num_experts": 16}, 4),
    "qwen3, normed": (
        "Qwen3MoeConfig",
        {**COMMON, "hidden_size": 48, "moe_intermediate_size": 48, "num_experts": 7, "norm_topk_prob": True},
        2,
    ),
    "qwen3, every second layer": (
        "Qwen3MoeConfig",
        {
            **COMMON,
            "hidden_size": 130,
            "moe_intermediate_size": 66,
            "intermediate_size": 40,
            "num_experts": 8,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
        3,
    ),
    "deepseek": (
        "DeepseekV3Config",
        {
            **COMMON,
            **LATENT,
            "hidden_size": 48,
            "intermediate_size": 40,
            "moe_intermediate_size": 56,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
        3,
    ),
    "deepseek, one group": (
        "DeepseekV3Config",
        {
            **COMMON,
            **LATENT,
            "hidden_size": 72,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
        4,
    ),
}
SAVES = {
    "one file": {},
    "shards": {"max_shard_size": "20KB"},
    "fused": {"save_original_format": False},
    "fused shards": {"save_original_format": False, "max_shard_size": "20KB"},
}


def model(case, dtype, head=True):
    """A random model of the family whose MoE blocks have weights of the usual size."""
    name, sizes, top_k = CONFIGS[case]
    config = getattr(transformers, name)(**sizes, num_experts_per_tok=top_k)
    torch.manual_seed(list(CONFIGS).index(case))
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    made = kind.from_config(config, dtype=getattr(torch, dtype))
    if config.hidden_size % 8:
        made.set_experts_implementation("batched_mm")  # torch's grouped_mm wants rows of multiples of 16 bytes
    block = made.get_decoder().layers[1].mlp if head else made.layers[1].mlp
    with torch.no_grad():
        for tensor in block.parameters():
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
        if hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias.normal_(0, 0.2)
    return made.eval(), block


def saved(case, dtype, folder, head=True, **save):
    made, block = model(case, dtype, head)
    made.save_pretrained(folder, **save)
    return block, cumoe.load_layer(folder, 1)


def inputs(case, dtype, B=3, S=16):
    generator = torch.Generator().manual_seed(7)
    shape = (B, S, CONFIGS[case][1]["hidden_size"])
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def rows(tensor):
    """(T, H) float64 of a tensor."""
    return tensor.detach().float().numpy().reshape(-1, tensor.shape[-1]).astype("float64")


def dense(weights, ids, num_experts):
    """(T, E) float64 router weights, 0 where not chosen."""
    table = np.zeros((len(ids), num_experts))
    np.put_along_axis(table, np.asarray(ids).astype("int64"), np.asarray(weights).astype("float64"), axis=-1)
    return table


# -- float32 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("case", CONFIGS)
def test_float32_equals_the_block(case, save, tmp_path):
    block, layer = saved(case, "float32", tmp_path, **SAVES[save])
    x = inputs(case, "float32")
    with torch.no_grad():
        expected = block(x)
        _, their_weights, their_ids = block.gate(x)
    out = layer(x)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape == x.shape
    weights, ids = layer.route(x)
    assert np.array_equal(np.sort(ids.numpy()), np.sort(their_ids.numpy()))
    theirs, ours = dense(their_weights, their_ids, layer.num_experts), dense(weights, ids, layer.num_experts)
    assert np.abs(ours - theirs).max() <= 1e-6 * theirs.max()
    error = np.abs(rows(out) - rows(expected)).max(axis=-1) / np.linalg.norm(rows(expected), axis=-1)
    assert error.max() <= 1e-5


@pytest.mark.parametrize("case", ["mixtral", "qwen2", "qwen3", "deepseek"])
def test_models_saved_without_a_head(case, tmp_path):
    block, layer = saved(case, "float32", tmp_path, head=False)
    x = inputs(case, "float32")
    with torch.no_grad():
        expected = block(x)
    error = np.abs(rows(layer(x)) - rows(expected)).max(axis=-1) / np.linalg.norm(rows(expected), axis=-1)
    assert error.max() <= 1e-5


@pytest.mark.parametrize("case", CONFIGS)
def test_dense_layers_are_those_of_the_model(case, tmp_path):
    made, _ = model(case, "float32")
    made.save_pretrained(tmp_path)
    if hasattr(made.get_decoder().layers[0].mlp, "gate"):
        assert cumoe.load_layer(tmp_path, 0).num_experts == made.get_decoder().layers[0].mlp.experts.num_experts
    else:
        with pytest.raises(ValueError, match=r"^layer must be an MoE layer of this \w+ model, got 0, a dense layer: "):
            cumoe.load_layer(tmp_path, 0)


def test_gpt_oss_equals_the_block(tmp_path):
    """Biases of router and experts, gates and ups in turn, an activation with limits."""
    sizes = {"hidden_size": 48, "intermediate_size": 56, "num_local_experts": 6, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**{**COMMON, **sizes})
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    block = made.get_decoder().layers[1].mlp
    with torch.no_grad():
        for tensor in block.parameters():
            tensor.normal_(0, 0.5)
    made.save_pretrained(tmp_path)
    layer, x = cumoe.load_layer(tmp_path, 1), torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(7))
    assert layer.quant_config.w1_bias.shape == (6, 112) and layer.quant_config.gemm1_clamp_limit == 7
    with torch.no_grad():
        expected, _ = block(x)
    error = np.abs(rows(layer(x)) - rows(expected)).max(axis=-1) / np.linalg.norm(rows(expected), axis=-1)
    assert error.max() <= 1e-5


# -- bfloat16 and float16 ---------------------------------------------------------------------------


def stored(tensor, dtype):
    """The memory of a 16-bit tensor as an array; some blocks keep the weight of their router in float32."""
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy()
    return tensor.detach().view(torch.int16).numpy().view(dtype)


def bounded_layer(block, x, weights, ids):
    """The block in float64 with the given routing, and how far an honest computation may be from it."""

    def array(tensor):
        return stored(tensor, x.dtype)

    experts = reference_experts(x, array(block.experts.gate_up_proj), array(block.experts.down_proj), weights, ids)
    mlp = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
    if mlp is None:
        return experts
    w1 = np.concatenate([array(mlp.gate_proj.weight), array(mlp.up_proj.weight)])[None]
    one, nothing = np.ones((len(x), 1)), np.zeros((len(x), 1), "int32")
    shared = reference_experts(x, w1, array(mlp.down_proj.weight)[None], one, nothing)
    if hasattr(block, "shared_expert_gate"):
        factor, factor_error = bounded_sigmoid(x, array(block.shared_expert_gate.weight))
        # the factor is rounded, and the product with it too
        error = factor * shared.error + (np.abs(shared.value) + shared.error) * factor_error
        value = factor * shared.value
        shared = Bounded(value, rounded(value, error, x.dtype))
    value = experts.value + shared.value
    return Bounded(value, rounded(value, experts.error + shared.error, x.dtype))


def bounded_sigmoid(x, weight):
    """sigmoid(x @ weight.T), float64, with the error of rounding logit and result; its slope is at most 1/4."""
    logit, error = bounded_logits(x, weight, rounds=True)
    factor = 1 / (1 + np.exp(-logit))
    return factor, rounded(factor, error / 4 + gamma(8) * factor, x.dtype)


def bounded_logits(x, weight, rounds):
    """x @ weight.T, float64, with the error of a float32 sum and, if it `rounds`, of storing it in the dtype of x."""
    wide, w = x.astype("float64"), weight.astype("float64")
    error = gamma(x.shape[1]) * (np.abs(wide) @ np.abs(w).T)
    value = wide @ w.T
    return value, rounded(value, error, x.dtype) if rounds else error


def check_routing(block, x, ours, theirs, same):
    """Compare two tables (T, E) of router weights made from logits with errors of their own."""
    in_float32 = hasattr(block.gate, "e_score_correction_bias")
    logits, error = bounded_logits(x, stored(block.gate.weight, x.dtype), rounds=not in_float32)
    most = error.max(axis=1, keepdims=True)
    # a logit off by d changes a score, and a sum of scores, by a factor of at most exp(d)
    far = np.exp(4 * most) * (1 + 4 * unit(x.dtype)) * (1 + gamma(16 + ours.shape[1])) - 1
    assert (np.abs(ours - theirs) <= far * theirs)[same].all()
    if in_float32:
        assert same.all()
    else:
        chosen = ours > 0
        worst = np.where(chosen, logits, np.inf).min(axis=1)
        assert (worst >= np.where(chosen, -np.inf, logits).max(axis=1) - 2 * most[:, 0]).all()
        assert same.mean() >= 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CONFIGS)
def test_short_floats_are_within_the_bound(case, dtype, tmp_path):
    block, layer = saved(case, dtype, tmp_path)
    x = inputs(case, dtype)
    with torch.no_grad():
        expected = block(x)
        _, their_weights, their_ids = block.gate(x)
    out, (weights, ids) = layer(x), layer.route(x)
    assert isinstance(out, torch.Tensor) and out.dtype == x.dtype and out.shape == x.shape
    tokens = stored(x.reshape(-1, x.shape[-1]), dtype)
    same = (np.sort(ids.numpy()) == np.sort(their_ids.numpy())).all(axis=1)
    tables = [
        dense(w.float().numpy(), i.numpy(), layer.num_experts) for w, i in ((weights, ids), (their_weights, their_ids))
    ]
    check_routing(block, tokens, *tables, same)

    ours = bounded_layer(block, tokens, weights.numpy(), ids.numpy())
    theirs = bounded_layer(block, tokens, their_weights.float().numpy(), their_ids.numpy())
    assert ratio(rows(out), ours).max() <= 1
    assert ratio(rows(expected), theirs).max() <= 1
    far = np.abs(rows(out) - rows(expected)) - np.abs(ours.value - theirs.value)
    assert (far <= ours.error)[same].all()
