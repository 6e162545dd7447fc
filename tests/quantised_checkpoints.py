"""Checkpoints of quantised MoE layers, written by the `to_*` functions, and the same layers as arguments."""

import copy
from typing import NamedTuple

import checkpoint_files as files
import numpy as np

import cumoe

H, I, E, LAYER = 64, 40, 3, 1
SHARED = "shared_experts"


class Kind(NamedTuple):
    """A way of storing: what config.json says, how a projection is quantised and written, and its config."""

    name: str
    quantization: dict
    quantize: object  # (weight) -> Quantized
    write: object  # (quantized, place) -> tensors by the last part of their names
    config: object  # ([[gate, up, down] of each expert], their places) -> quant_config
    sizes: tuple = (H, I)

    def __str__(self):
        return self.name


def checkpoint(kind, seed=0):
    """Config, tensors, and what is quantised: [[gate, up, down] of each expert, then of the shared one]."""
    hidden_size, size = kind.sizes
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype("bfloat16")

    config = {"model_type": "deepseek_v3", **files.CONFIGS["deepseek_v3"], "torch_dtype": "bfloat16"}
    config |= {"hidden_size": hidden_size, "moe_intermediate_size": size, "n_routed_experts": 2 * E, "n_group": E}
    config |= {"n_shared_experts": 1, "quantization_config": copy.deepcopy(kind.quantization)}
    module = f"model.layers.{LAYER}.mlp"
    tensors = {f"{module}.gate.weight": draw(2 * E, hidden_size)}
    tensors[f"{module}.gate.e_score_correction_bias"] = rng.standard_normal(2 * E).astype("float32")
    quantised = []
    for place, name in enumerate([f"experts.{e}" for e in range(2 * E)] + [SHARED]):
        scale = np.exp2(rng.integers(-1, 2, 3))  # so that gate and up differ, and experts
        weights = draw(size, hidden_size), draw(size, hidden_size), draw(hidden_size, size)
        weights = [(w.astype("float32") * s).astype("bfloat16") for w, s in zip(weights, scale, strict=True)]
        quantised.append([kind.quantize(w) for w in weights])
        for projection, one in zip(("gate_proj", "up_proj", "down_proj"), quantised[-1], strict=True):
            written = kind.write(one, place)
            tensors |= {f"{module}.{name}.{projection}.{part}": np.asarray(array) for part, array in written.items()}
    return config, tensors, quantised


def stacked(experts, part="values"):
    """A part of both weights, (E, 2I, ...) and (E, H, ...)."""
    parts = [[getattr(one, part) for one in expert] for expert in experts]
    return (
        np.stack([np.concatenate([gate, up]) for gate, up, _ in parts]),
        np.stack([down for _, _, down in parts]),
    )


def by_row(experts, part):
    """What each matrix has one of, one a row."""
    rows = [[one._replace(**{part: np.repeat(getattr(one, part), len(one.values), 0)}) for one in e] for e in experts]
    return stacked(rows, part)


def shards(experts, part, number=lambda a: a):
    """A number for each matrix: (E, 2) and (E,)."""
    each = np.array([[number(getattr(one, part).reshape(())) for one in expert] for expert in experts], np.float32)
    return each[:, :2], each[:, 2]


def rows(pair, size=I):
    """Numbers of shards as numbers of rows."""
    return np.repeat(pair[0], size, axis=1), pair[1]


# -- formats ----------------------------------------------------------------------------------------


def named(*names):
    """A writer's results by name; those that are None are not there."""

    def by_name(arrays):
        return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}

    return by_name


def compressed(form, weights, inputs=None):
    """The quantization_config of compressed-tensors."""
    symmetric = {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": {**symmetric, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def wna16(experts, group):
    zeros = None, None
    if experts[0][0].zero_points is not None:
        zeros = stacked(experts, "zero_points")
    build = cumoe.int4_w4a16_moe_quant_config if experts[0][0].scheme == "int4" else cumoe.int8_w8a16_moe_quant_config
    return build(*stacked(experts, "scale"), *zeros, group and [0, group])


def integers(name, scheme, group, zeros, quantization, write, dtype="bfloat16", sizes=(H, 96)):
    return Kind(
        name,
        quantization,
        lambda w: cumoe.quantize(w.astype(dtype), scheme, (1, group) if group else (1, -1), zero_points=zeros),
        lambda q, place: write(q),
        lambda experts, places: wna16(experts, group),
        sizes,
    )


def gptq_of(bits, form="gptq"):
    parts = named("qweight", "scales", "qzeros")

    def write(q):
        k = q.scale.shape[-1] * 32
        return parts(cumoe.to_gptq(q, checkpoint_format=form)) | {"g_idx": (np.arange(k) // 32).astype("int32")}

    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "checkpoint_format": form}
    return config, write


def per_matrix(experts, build, **more):
    """One scale a matrix."""
    return build(*shards(experts, "scale"), **more)


def static(places):
    """The largest input scale of all experts, as `bytes_of` writes them."""
    return {f"a{i}_scale": np.array([0.01 * (max(places) + 1)], np.float32) for i in (1, 2)}


def bytes_of(write, is_static=False):
    parts = named("weight", "weight_scale")

    def written(q, place):
        inputs = {"input_scale": np.float32([0.01 * (place + 1)])} if is_static else {}
        return parts(write(q)[:2]) | inputs

    return written


def to_fp8(q):
    return cumoe.to_compressed_tensors_fp8(q, scale_dtype="float32")


BLOCK = (16, 32)
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}
TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True}
ONE = {"strategy": "tensor", "dynamic": False, "symmetric": True}
GROUP = {"strategy": "group", "group_size": 32, "dynamic": True, "symmetric": True}
FOUR = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def eight(name, scheme, group, quantization, write, config):
    def quantize(w):
        zeros = {"zero_points": True} if scheme == "uint8" else {}
        return cumoe.quantize(w.astype("float32"), scheme, group, **zeros)

    return Kind(name, quantization, quantize, write, config)


def input_scale(place):
    """Of modelopt; its reciprocal is exact, and no two places share it."""
    return np.float32(2.0 ** -(6 + place))


def modelopt(experts, places):
    alphas = shards(experts, "global_scale", lambda g: np.float32(1) / g)
    inputs = np.float32([input_scale(place) for place in places])
    alphas = rows((alphas[0] * inputs[:, None], alphas[1] * inputs))
    gscales = [1 / inputs] * 2
    return cumoe.nvfp4_moe_quant_config(*alphas, *gscales, *stacked(experts, "scale"))


def write_modelopt(q, place):
    weight, scale, scale_2 = cumoe.to_modelopt_nvfp4(q, allow_rounding=True)
    return {"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": input_scale(place)}


def write_nvfp4(q, place):
    parts = named("weight_packed", "weight_scale", "weight_global_scale")(cumoe.to_compressed_tensors_nvfp4(q))
    return parts | {"input_global_scale": np.float32([100 + place])}


def compressed_nvfp4(experts, places):
    gscales = np.float32([100 + place for place in places])
    first, second = shards(experts, "global_scale")
    alphas = rows((1 / (first * gscales[:, None]), 1 / (second * gscales)))
    return cumoe.nvfp4_moe_quant_config(*alphas, gscales, gscales, *stacked(experts, "scale"))


def compressed_nvfp4_w4a16(experts, places):
    alphas = rows(shards(experts, "global_scale", lambda g: np.float32(1) / g))
    return cumoe.nvfp4_w4a16_moe_quant_config(*alphas, *stacked(experts, "scale"))


PACKED = named("weight_packed", "weight_scale", "weight_zero_point")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
KINDS = (
    integers("gptq", "int4", 32, True, *gptq_of(4)),
    integers("gptq v2, 8 bits", "uint8", 32, True, *gptq_of(8, "gptq_v2")),
    integers("awq", "int4", 32, True, AWQ, lambda q: named("qweight", "scales", "qzeros")(cumoe.to_awq(q))),
    integers(
        "packed",
        "int4",
        32,
        False,
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        lambda q: PACKED(cumoe.to_compressed_tensors_packed(q)),
    ),
    integers(
        "packed, zero points",
        "int4",
        32,
        True,
        compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        lambda q: PACKED(cumoe.to_compressed_tensors_packed(q)),
    ),
    eight(
        "int8 channel, token",
        "int8",
        (1, -1),
        compressed("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKEN}),
        bytes_of(cumoe.to_compressed_tensors_int8),
        lambda experts, places: cumoe.int8_w8a8_moe_quant_config(*stacked(experts, "scale"), per_act_token_quant=True),
    ),
    eight(
        "int8 w8a16",
        "int8",
        (1, -1),
        compressed("int-quantized", {**INT8, "strategy": "channel"}),
        bytes_of(cumoe.to_compressed_tensors_int8),
        lambda experts, places: cumoe.int8_w8a16_moe_quant_config(*(s[..., 0] for s in stacked(experts, "scale"))),
    ),
    integers(
        "int8, zero points",
        "uint8",
        None,
        True,
        compressed("int-quantized", {**INT8, "strategy": "channel", "symmetric": False}),
        lambda q: named("weight", "weight_scale", "weight_zero_point")(cumoe.to_compressed_tensors_int8(q)),
        "float32",
    ),
    integers(
        "int8, zero points of groups",
        "uint8",
        32,
        True,
        compressed("int-quantized", {**INT8, "strategy": "group", "group_size": 32, "symmetric": False}),
        lambda q: named("weight", "weight_scale", "weight_zero_point")(cumoe.to_compressed_tensors_int8(q)),
        "float32",
    ),
    eight(
        "int8, zero point of the matrix",
        "uint8",
        (-1, -1),
        compressed("int-quantized", {**INT8, "strategy": "tensor", "symmetric": False}),
        lambda q, place: named("weight", "weight_scale", "weight_zero_point")(cumoe.to_compressed_tensors_int8(q)),
        lambda experts, places: cumoe.int8_w8a16_moe_quant_config(
            *by_row(experts, "scale"), *by_row(experts, "zero_points")
        ),
    ),
    eight(
        "fp8 static",
        "fp8",
        (-1, -1),
        compressed("float-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, **ONE}),
        bytes_of(to_fp8, True),
        lambda experts, places: per_matrix(experts, cumoe.fp8_w8a8_moe_quant_config, **static(places)),
    ),
    eight(
        "fp8 channel, token",
        "fp8",
        (1, -1),
        compressed("float-quantized", {**FLOAT8, "strategy": "channel"}, {**FLOAT8, **TOKEN}),
        bytes_of(to_fp8),
        lambda experts, places: cumoe.fp8_w8a8_moe_quant_config(
            *stacked(experts, "scale"), per_act_token_quant=True, per_out_ch_quant=True
        ),
    ),
    eight(
        "fp8 w8a16 tensor",
        "fp8",
        (-1, -1),
        compressed("float-quantized", {**FLOAT8, "strategy": "tensor"}),
        bytes_of(to_fp8),
        lambda experts, places: per_matrix(experts, cumoe.fp8_w8a16_moe_quant_config),
    ),
    eight(
        "fp8 block",
        "fp8",
        BLOCK,
        compressed(
            "float-quantized", {**FLOAT8, "strategy": "block", "block_structure": list(BLOCK)}, {**FLOAT8, **GROUP}
        ),
        bytes_of(to_fp8),
        lambda experts, places: cumoe.fp8_w8a8_moe_quant_config(*stacked(experts, "scale"), block_shape=list(BLOCK)),
    ),
    eight(
        "deepseek",
        "fp8",
        BLOCK,
        DEEPSEEK,
        lambda q, place: named("weight", "weight_scale_inv")(cumoe.to_deepseek_fp8(q)),
        lambda experts, places: cumoe.fp8_w8a8_moe_quant_config(*stacked(experts, "scale"), block_shape=list(BLOCK)),
    ),
    eight("modelopt", "nvfp4", None, MODELOPT, write_modelopt, modelopt),
    eight(
        "compressed nvfp4",
        "nvfp4",
        None,
        compressed("nvfp4-pack-quantized", FOUR, {**FOUR, "dynamic": "local"}),
        write_nvfp4,
        compressed_nvfp4,
    ),
    eight(
        "compressed nvfp4 w4a16",
        "nvfp4",
        None,
        compressed("nvfp4-pack-quantized", FOUR),
        write_nvfp4,
        compressed_nvfp4_w4a16,
    ),
)


def kind_of(name):
    return next(kind for kind in KINDS if kind.name == name)
