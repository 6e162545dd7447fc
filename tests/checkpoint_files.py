"""Tiny checkpoints of the four families, written by hand so that tests can break them."""

import json
import math

import ml_dtypes  # noqa: F401  bfloat16 and the small floats are NumPy dtype names from here on
import numpy as np
import pytest

import cumoe

NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
}

COMMON = {"hidden_size": 48, "num_hidden_layers": 3, "hidden_act": "silu"}
CONFIGS = {
    "mixtral": {**COMMON, "intermediate_size": 56, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **COMMON,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 72,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3_moe": {
        **COMMON,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **COMMON,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
    },
}
FAMILIES = list(CONFIGS)


def weights(family, layer=1, dtype="float32", seed=0):
    """Config and per-expert tensors of one MoE layer, as the families' original checkpoints spell them."""
    rng = np.random.default_rng(seed)
    config = {"model_type": family, **CONFIGS[family]}
    H = config["hidden_size"]
    I = config["intermediate_size"] if family == "mixtral" else config["moe_intermediate_size"]
    E = next(config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config)
    module = f"model.layers.{layer}." + ("block_sparse_moe" if family == "mixtral" else "mlp")
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def draw(*shape):
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(dtype)

    tensors = {f"{module}.gate.weight": draw(E, H)}
    for e in range(E):
        tensors[f"{module}.experts.{e}.{gate}.weight"] = draw(I, H)
        tensors[f"{module}.experts.{e}.{up}.weight"] = draw(I, H)
        tensors[f"{module}.experts.{e}.{down}.weight"] = draw(H, I)
    if family == "qwen2_moe":
        tensors |= mlp(f"{module}.shared_expert", draw, H, config["shared_expert_intermediate_size"])
        tensors[f"{module}.shared_expert_gate.weight"] = draw(1, H)
    if family == "deepseek_v3":
        tensors |= mlp(f"{module}.shared_experts", draw, H, I * config["n_shared_experts"])
        tensors[f"{module}.gate.e_score_correction_bias"] = rng.standard_normal(E).astype(np.float32) / 4
    return config, tensors


def mlp(name, draw, H, I):
    return {
        f"{name}.gate_proj.weight": draw(I, H),
        f"{name}.up_proj.weight": draw(I, H),
        f"{name}.down_proj.weight": draw(H, I),
    }


def fuse(tensors, swapped=False):
    """The same tensors as newer transformers versions save them: one 3-D parameter for all experts."""
    module = next(name for name in tensors if name.endswith(".gate.weight")).removesuffix(".gate.weight")
    new = f"{module.removesuffix('block_sparse_moe').removesuffix('mlp')}mlp"
    own = {name.removeprefix(module): array for name, array in tensors.items()}
    E = len(own[".gate.weight"])
    gate, up, down = ("w1", "w3", "w2") if ".experts.0.w1.weight" in own else ("gate_proj", "up_proj", "down_proj")

    def stack(*names):
        return np.stack([np.concatenate([own.pop(f".experts.{e}.{name}.weight") for name in names]) for e in range(E)])

    gate_up, down = stack(gate, up), stack(down)
    if swapped:
        gate_up, down = gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    own |= {".experts.gate_up_proj": gate_up, ".experts.down_proj": down}
    return {f"{new}{name}": array for name, array in own.items()}


def pack(tensors, pad=0):
    """The bytes of a safetensors file; `pad` spaces more in the header than needed."""
    entries, chunks, start = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        entries[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [start, start + len(data)],
        }
        start += len(data)
        chunks.append(data)
    header = json.dumps(entries).encode() + b" " * pad
    return len(header).to_bytes(8, "little") + header + b"".join(chunks)


def write(folder, config, tensors, shards=1, pad=0):
    """Write a checkpoint directory with one file, or an index and several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(pack(tensors, pad))
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    shard_of = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    for name in names:
        held = {tensor: array for tensor, array in tensors.items() if shard_of[tensor] == name}
        (folder / name).write_bytes(pack(held, pad))
    return folder


def tokens(T=7, H=48, dtype="float32", seed=1):
    """Random hidden states."""
    return np.random.default_rng(seed).standard_normal((T, H)).astype(dtype)


def load(folder, family, change=lambda tensors: tensors, dtype="float32", device="cpu", **options):
    """Write the family's checkpoint, its tensors respelt by `change`, and load its layer."""
    config, tensors = weights(family, dtype=dtype)
    return cumoe.load_layer(write(folder, config, change(tensors), **options), 1, device=device)


def refused(kind, message, call, *args, **kwargs):
    """Expect an exception of that kind with exactly that message."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert str(caught.value) == message
