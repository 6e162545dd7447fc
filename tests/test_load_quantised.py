"""Quantised checkpoints: a loaded layer has the codes and scales that were written, and the bits they give."""

import dataclasses
import json

import checkpoint_files as files
import numpy as np
import pytest
from checkpoint_files import refused
from quantised_checkpoints import KINDS, LAYER, checkpoint, kind_of, stacked
from sides import back, bits, device_of, on

import cumoe

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
MODULE = f"model.layers.{LAYER}.mlp"


def tokens(kind, T=7):
    return files.tokens(T, kind.sizes[0], "bfloat16")


def same_config(found, wanted):
    """Every field and the bits of every array."""
    for name in ("_a1", "_a2", "_w1", "_w2"):
        for field in dataclasses.fields(wanted._w1):
            one, other = getattr(getattr(found, name), field.name), getattr(getattr(wanted, name), field.name)
            if hasattr(other, "shape") and hasattr(other, "dtype"):
                one, other = bits(back(one)), bits(np.asarray(other))
                assert (one.dtype, one.shape) == (other.dtype, other.shape), (name, field.name)
                assert one.tobytes() == other.tobytes(), (name, field.name)
            else:
                assert one == other, (name, field.name)


def config_on(xp, config):
    """A config of NumPy arrays on a side."""
    parts = ("scale", "alpha_or_gscale", "zp", "bias")
    descs = {}
    for name in ("_a1", "_a2", "_w1", "_w2"):
        desc = getattr(config, name)
        descs[name] = dataclasses.replace(desc, **{part: on(xp, getattr(desc, part)) for part in parts})
    return dataclasses.replace(config, **descs)


def run(xp, experts, config, x, weights, ids, **named):
    """Codes and a config of NumPy arrays on a side."""
    named["quant_config"] = config_on(xp, config)
    return cumoe.fused_experts(x, *(on(xp, w) for w in experts), weights, ids, **named)


@each_kind
def test_the_layer_is_what_was_written(xp, kind, tmp_path):
    config, tensors, quantised = checkpoint(kind)
    layer = cumoe.load_layer(files.write(tmp_path, config, tensors, shards=2), LAYER, device=device_of(xp))
    *experts, shared = quantised
    places = range(len(quantised))
    wanted = kind.config(experts, places[:-1])
    same_config(layer.quant_config, wanted)
    codes = stacked(experts)
    prepared = cumoe.prepare(*(on(xp, code) for code in codes), quant_config=config_on(xp, wanted))
    for name in ("w1", "w2"):
        found, packed = (getattr(one.experts, name) for one in (layer.experts, prepared))
        assert bits(back(found)).tobytes() == bits(back(packed)).tobytes()
    assert layer.dtype == "bfloat16"

    x = on(xp, tokens(kind))
    weights, ids = layer.route(x)
    one, zero = xp.ones((len(x), 1), np.float32), xp.zeros((len(x), 1), np.int32)
    parts = [
        run(xp, codes, wanted, x, weights, ids),
        run(xp, stacked([shared]), kind.config([shared], places[-1:]), x, one, zero),
    ]
    out = cumoe.moe_sum(xp.stack(parts, axis=1))
    assert back(layer(x)).tobytes() == back(out).tobytes()
    assert np.isfinite(back(out).astype(np.float32)).all() and back(out).any()


# -- what a checkpoint may leave as it is, and where else it may say things ---------------------------


def plain(tensors, place, dtype="bfloat16"):
    """The same checkpoint with the experts of a place as floats."""
    kept = {name: array for name, array in tensors.items() if f".{place}." not in name}
    sizes = {"gate_proj": (40, 64), "up_proj": (40, 64), "down_proj": (64, 40)}
    names = [f"{place}.{e}" for e in range(6)] if place == "experts" else [place]
    weights = {f"{MODULE}.{name}.{one}.weight": np.ones(shape, dtype) for name in names for one, shape in sizes.items()}
    return kept | weights


def test_modules_that_are_floats_are_taken_as_they_are(tmp_path):
    kind = kind_of("deepseek")
    config, tensors, _ = checkpoint(kind)
    layer = cumoe.load_layer(files.write(tmp_path / "shared", config, plain(tensors, "shared_experts")), LAYER)
    assert layer.quant_config.use_fp8_w8a8 and layer.shared.experts.experts.scheme is None
    layer = cumoe.load_layer(files.write(tmp_path / "routed", config, plain(tensors, "experts")), LAYER)
    assert layer.quant_config is None and layer.shared.experts.experts.scheme is not None
    assert layer(tokens(kind)).shape == (7, 64)
    folder = files.write(tmp_path / "dtype", config, plain(tensors, "shared_experts", "float32"))
    name = f"{MODULE}.shared_experts.gate_proj.weight"
    message = f"tensor {name!r} must have the dtype of the first expert = bfloat16, got float32"
    refused(TypeError, message, cumoe.load_layer, folder, LAYER)


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path):
    config, tensors, _ = checkpoint(kind_of("modelopt"))
    expected = cumoe.load_layer(files.write(tmp_path / "new", config, tensors), LAYER)(tokens(kind_of("modelopt")))
    del config["quantization_config"]
    folder = files.write(tmp_path / "old", config, tensors)
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    path = folder / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    assert cumoe.load_layer(folder, LAYER)(tokens(kind_of("modelopt"))).tobytes() == expected.tobytes()
    path.write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    message = "no loader for quantization.quant_algo = 'FP8' in hf_quant_config.json; available: 'NVFP4'"
    refused(NotImplementedError, message, cumoe.load_layer, folder, LAYER)


def test_symmetric_checkpoints_may_store_zero_points(tmp_path):
    """Those that none stand for are left out; the numbers are the same."""
    kind = kind_of("gptq")
    config, tensors, _ = checkpoint(kind)
    sevens = np.uint32(0x77777777).astype(np.int32)
    stored = {name: np.full_like(a, sevens) if name.endswith("qzeros") else a for name, a in tensors.items()}
    layer = cumoe.load_layer(files.write(tmp_path / "stored", config, stored), LAYER)
    assert layer.quant_config.w1_zp is None and layer.quant_config.w2_zp is None
    none = {name: array for name, array in tensors.items() if not name.endswith(("qzeros", "g_idx"))}
    other = cumoe.load_layer(files.write(tmp_path / "none", config, none), LAYER)
    assert layer(tokens(kind)).tobytes() == other(tokens(kind)).tobytes()


def test_targets_of_groups(tmp_path):
    kind = kind_of("int8 w8a16")
    config, tensors, _ = checkpoint(kind)
    groups = config["quantization_config"]["config_groups"]
    experts = groups.pop("group_0") | {"targets": [r"re:.*\.experts\..*", f"{MODULE}.shared_experts.gate_proj"]}
    other = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4}}
    config["quantization_config"]["config_groups"] = {"group_0": other, "group_1": experts}
    layer = cumoe.load_layer(files.write(tmp_path, config, tensors), LAYER)
    assert layer.quant_config.use_int8_w8a16
    del config["quantization_config"]["config_groups"]["group_1"]
    message = (
        "no loader for quantization_config.config_groups in config.json without a target for "
        f"'{MODULE}.experts.0.gate_proj'; available: 'Linear', a name, 're:' and a pattern"
    )
    refused(NotImplementedError, message, cumoe.load_layer, files.write(tmp_path, config, tensors), LAYER)


def test_exponents_alone_as_scales(tmp_path):
    kind = kind_of("deepseek")
    kind = kind._replace(quantize=lambda w: cumoe.quantize(w, "fp8", (16, 32), use_ue8m0=True))
    config, tensors, _ = checkpoint(kind)
    expected = cumoe.load_layer(files.write(tmp_path / "wide", config, tensors), LAYER)(tokens(kind))
    for dtype in ("float8_e8m0fnu", "bfloat16"):
        narrow = {n: a.astype(dtype) if n.endswith("scale_inv") else a for n, a in tensors.items()}
        layer = cumoe.load_layer(files.write(tmp_path / dtype, config, narrow), LAYER)
        assert layer.quant_config.w1_scale.dtype == np.float32
        assert layer(tokens(kind)).tobytes() == expected.tobytes()


def test_a_file_of_the_safetensors_library_and_its_end(tmp_path):
    """The layer owns what it uses, its config too."""
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    kind = kind_of("awq")
    config, tensors, _ = checkpoint(kind)
    folder = files.write(tmp_path, config, {})
    path = folder / "model.safetensors"
    numpy.save_file(tensors, path)
    layer, x = cumoe.load_layer(folder, LAYER), tokens(kind)
    expected, scale = layer(x), layer.quant_config.w1_scale.copy()
    assert scale.dtype == layer.dtype == "bfloat16"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    assert layer(x).tobytes() == expected.tobytes()
    assert layer.quant_config.w1_scale.tobytes() == scale.tobytes()


def test_explain_names_the_numbers(tmp_path):
    config, tensors, _ = checkpoint(kind_of("gptq"))
    layer = cumoe.load_layer(files.write(tmp_path, config, tensors), LAYER)
    assert "6 of (H, I) = (64, 96), int4 weights, bfloat16 activations" in layer.explain()
    config, tensors, _ = checkpoint(kind_of("modelopt"))
    layer = cumoe.load_layer(files.write(tmp_path, config, tensors), LAYER)
    assert "nvfp4 weights, nvfp4 activations" in layer.explain()


# -- gpt-oss ----------------------------------------------------------------------------------------


def gpt_oss(seed=0):
    """Config, tensors, and the operands."""
    rng, sizes = np.random.default_rng(seed), (3, 64, 32)
    experts, hidden_size, size = sizes
    config = {"model_type": "gpt_oss", "hidden_size": hidden_size, "intermediate_size": size, "num_hidden_layers": 2}
    config |= {"num_local_experts": experts, "num_experts_per_tok": 2, "hidden_act": "silu", "swiglu_limit": 7.0}
    config |= {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}

    def draw(*shape):
        return rng.standard_normal(shape, np.float32).astype("bfloat16")

    tensors = {f"{MODULE}.router.weight": draw(experts, hidden_size), f"{MODULE}.router.bias": draw(experts)}
    operands = []
    for name, shape in (
        ("gate_up_proj", (experts, 2 * size, hidden_size)),
        ("down_proj", (experts, hidden_size, size)),
    ):
        operands.append(cumoe.quantize(draw(*shape), "mxfp4"))
        blocks, scales = cumoe.to_gpt_oss_mxfp4(operands[-1])
        parts = {"blocks": blocks, "scales": scales, "bias": draw(*shape[:2])}
        tensors |= {f"{MODULE}.experts.{name}_{part}": array for part, array in parts.items()}
    return config, tensors, operands


def test_gpt_oss(xp, tmp_path):
    config, tensors, (q1, q2) = gpt_oss()
    layer = cumoe.load_layer(files.write(tmp_path, config, tensors, shards=2), LAYER, device=device_of(xp))
    biases = (tensors[f"{MODULE}.experts.{name}_bias"] for name in ("gate_up_proj", "down_proj"))
    scales = (q.scale.view(np.uint8) for q in (q1, q2))
    wanted = cumoe.mxfp4_w4a16_moe_quant_config(
        *scales, **dict(zip(("w1_bias", "w2_bias"), biases, strict=True)), gemm1_clamp_limit=7.0
    )
    same_config(layer.quant_config, wanted)
    assert layer.quant_config.gemm1_clamp_limit == 7
    x = files.tokens(9, 64, "bfloat16")
    weights, ids = (back(array) for array in layer.route(on(xp, x)))
    wide = x.astype(np.float64) @ tensors[f"{MODULE}.router.weight"].astype(np.float64).T
    logits = (wide + tensors[f"{MODULE}.router.bias"].astype(np.float64)).astype("bfloat16").astype(np.float64)
    chosen = np.take_along_axis(logits, ids.astype(np.int64), 1)
    assert (np.sort(chosen, 1) == np.sort(logits, 1)[:, 1:]).all()
    odds = np.exp(chosen - chosen.max(1, keepdims=True))
    np.testing.assert_allclose(weights, odds / odds.sum(1, keepdims=True), rtol=2**-7)
    expected = run(xp, (q1.values, q2.values), wanted, on(xp, x), on(xp, weights), on(xp, ids), activation="swigluoai")
    assert back(layer(on(xp, x))).tobytes() == back(expected).tobytes()


def test_only_gpt_oss_is_in_mxfp4_and_has_biases(tmp_path):
    config, tensors, _ = checkpoint(kind_of("deepseek"))
    config["quantization_config"] = {"quant_method": "mxfp4"}
    folder = files.write(tmp_path, config, tensors)
    message = "no loader for mxfp4 of model_type 'deepseek_v3'; available: gpt_oss"
    refused(NotImplementedError, message, cumoe.load_layer, folder, LAYER)
    config, tensors, _ = gpt_oss()
    del config["quantization_config"]
    message = "no loader for one key an expert of gpt_oss; available: fused keys, mxfp4"
    refused(NotImplementedError, message, cumoe.load_layer, files.write(tmp_path, config, tensors), LAYER)


# -- refusals ---------------------------------------------------------------------------------------

FIRST = f"{MODULE}.experts.0.gate_proj"


TENSORS = [  # kind, tensor, what it becomes, error, message after the name of the tensor
    ("gptq", "qweight", (8, 95), ValueError, "must have shape (K / 8, N) = (8, 96), got (8, 95)"),
    ("gptq", "scales", (3, 96), ValueError, "must have shape (K / g, N) = (2, 96), got (3, 96)"),
    ("gptq", "qzeros", (2, 13), ValueError, "must have shape (K / g, N / 8) = (2, 12), got (2, 13)"),
    ("gptq", "qweight", "float32", TypeError, "must be I32, got F32"),
    ("gptq", "scales", "int32", TypeError, "must be F32, F16 or BF16, got I32"),
    ("awq", "qweight", (64, 13), ValueError, "must have shape (K, N / 8) = (64, 12), got (64, 13)"),
    ("packed", "weight_packed", (96, 7), ValueError, "must have shape (N, K / 8) = (96, 8), got (96, 7)"),
    ("packed", "weight_scale", (96, 3), ValueError, "must have shape (N, K / g) = (96, 2), got (96, 3)"),
    ("int8 w8a16", "weight_scale", (41, 1), ValueError, "must have shape (N, 1) = (40, 1), got (41, 1)"),
    ("int8 w8a16", "weight", "uint8", TypeError, "must be I8, got U8"),
    ("fp8 static", "input_scale", (2,), ValueError, "must have shape () = (), got (2,)"),
    (
        "deepseek",
        "weight_scale_inv",
        (2, 2),
        ValueError,
        "must have shape (ceil(N / 16), ceil(K / 32)) = (3, 2), got (2, 2)",
    ),
    (
        "modelopt",
        "weight_scale",
        (128, 4),
        ValueError,
        "must have shape (N, ceil(K / 16)) = (40, 4), got (128, 4); "
        "these look swizzled: read them by from_modelopt_nvfp4(..., is_scale_swizzled=True)",
    ),
    ("modelopt", "weight", (40, 31), ValueError, "must have shape (N, K / 2) = (40, 32), got (40, 31)"),
    ("modelopt", "weight_scale", "uint8", TypeError, "must be F8_E4M3, got U8"),
]


@pytest.mark.parametrize(("name", "part", "change", "kind", "message"), TENSORS)
def test_wrong_tensors_are_named(name, part, change, kind, message, tmp_path):
    config, tensors, _ = checkpoint(kind_of(name))
    old = tensors[f"{FIRST}.{part}"]
    new = np.zeros(change, old.dtype) if isinstance(change, tuple) else np.zeros(old.shape, change)
    folder = files.write(tmp_path, config, tensors | {f"{FIRST}.{part}": new})
    refused(kind, f"tensor '{FIRST}.{part}' {message}", cumoe.load_layer, folder, LAYER)


def test_a_missing_tensor_of_another_expert(tmp_path):
    config, tensors, _ = checkpoint(kind_of("awq"))
    name = f"{MODULE}.experts.4.up_proj.qzeros"
    del tensors[name]
    folder = files.write(tmp_path, config, tensors)
    refused(ValueError, f"{folder} must hold tensor {name!r}, got none of that name", cumoe.load_layer, folder, LAYER)


def test_scales_of_two_dtypes(tmp_path):
    config, tensors, _ = checkpoint(kind_of("awq"))
    name = f"{MODULE}.experts.4.up_proj.scales"
    folder = files.write(tmp_path, config, tensors | {name: tensors[name].astype("float16")})
    message = f"tensor {name!r} must have the dtype of the first expert = bfloat16, got float16"
    refused(TypeError, message, cumoe.load_layer, folder, LAYER)


def test_groups_in_the_order_of_activations(tmp_path):
    config, tensors, _ = checkpoint(kind_of("gptq"))
    name = f"{MODULE}.experts.2.down_proj.g_idx"
    folder = files.write(tmp_path, config, tensors | {name: tensors[name][::-1]})
    message = (
        f"tensor {name!r} must give k // 32 for column k: groups in the order of activations (act-order, desc_act) "
        "are not supported"
    )
    refused(NotImplementedError, message, cumoe.load_layer, folder, LAYER)


WHERE = "quantization_config"
WEIGHTS = f"{WHERE}.config_groups.group_0.weights"
CONFIGS = [  # kind, path in the quantization_config, value, error, message
    ("gptq", ("bits",), 3, f"no loader for {WHERE}.bits = 3 in config.json; available: 4, 8"),
    ("awq", ("version",), "gemv", f"no loader for {WHERE}.version = 'gemv' in config.json; available: 'gemm', 'GEMM'"),
    (
        "deepseek",
        ("weight_block_size",),
        None,
        f"no loader for {WHERE}.weight_block_size = None in config.json; available: two ints",
    ),
    (
        "deepseek",
        ("activation_scheme",),
        "static",
        f"no loader for {WHERE}.activation_scheme = 'static' in config.json; available: 'dynamic'",
    ),
    (
        "packed",
        ("format",),
        "marlin-24",
        f"no loader for {WHERE}.format = 'marlin-24' in config.json; "
        "available: 'float-quantized', 'int-quantized', 'nvfp4-pack-quantized', 'pack-quantized'",
    ),
    (
        "packed",
        ("config_groups", "group_0", "weights", "num_bits"),
        2,
        f"no loader for {WEIGHTS}.num_bits = 2 in config.json; available: 4, 8",
    ),
    (
        "packed",
        ("config_groups", "group_0", "input_activations"),
        {"num_bits": 8},
        f"no loader for {WHERE}.config_groups.group_0.input_activations.num_bits = 8 in config.json; available: 16",
    ),
    (
        "int8 channel, token",
        ("config_groups", "group_0", "weights", "symmetric"),
        False,
        f"no loader for {WEIGHTS}.symmetric = False in config.json; available: True",
    ),
    (
        "gptq",
        ("group_size",),
        None,
        f"config.json must have the field '{WHERE}.group_size', got none; take it from the model's page",
    ),
    ("packed", ("config_groups",), [], f"{WHERE}.config_groups in config.json must be an object, got []"),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), CONFIGS)
def test_wrong_configs(name, path, value, message, tmp_path):
    config, tensors, _ = checkpoint(kind_of(name))
    config = json.loads(json.dumps(config))
    *way, last = path
    at = config[WHERE]
    for key in way:
        at = at[key]
    at[last] = value
    kind = TypeError if "an object" in message else ValueError if "must have" in message else NotImplementedError
    refused(kind, message, cumoe.load_layer, files.write(tmp_path, config, tensors), LAYER)


def test_the_dtype_of_the_tokens_is_not_guessed(tmp_path):
    config, tensors, _ = checkpoint(kind_of("deepseek"))
    del config["torch_dtype"]
    message = "config.json must have the field 'torch_dtype' (or 'dtype'), got none; take it from the model's page"
    refused(ValueError, message, cumoe.load_layer, files.write(tmp_path, config, tensors), LAYER)
