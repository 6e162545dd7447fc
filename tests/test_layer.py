"""What a loaded layer computes, against the published formula of its family in float64."""

import checkpoint_files as files
import numpy as np
import pytest
from checkpoint_files import FAMILIES, load, refused, tokens
from sides import back, device_of, gpu, on

import cumoe


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_empty_inputs_and_strides(xp, family, tmp_path):
    layer, x = load(tmp_path, family, device=device_of(xp)), on(xp, tokens(12))
    expected = layer(x)
    assert layer(x.reshape(3, 4, 48)).tobytes() == expected.tobytes()
    assert layer(x.reshape(3, 4, 48)).shape == (3, 4, 48)
    assert layer(x[:0]).shape == (0, 48) and layer(xp.zeros((0, 5, 48), "float32")).shape == (0, 5, 48)
    assert layer(xp.asfortranarray(x)).tobytes() == expected.tobytes()
    assert layer(x[::-3]).tobytes() == expected[::-3].tobytes()
    if xp is np:
        x.flags.writeable = False
        assert layer(x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_tokens_change_no_bit(xp, family, dtype, tmp_path):
    layer, x = load(tmp_path, family, dtype=dtype, device=device_of(xp)), tokens(33, dtype=dtype)
    whole = back(layer(on(xp, x)))
    order = np.random.default_rng(3).permutation(33)
    assert back(layer(on(xp, x[order]))).tobytes() == whole[order].tobytes()
    for cut in (1, 2, 17):
        parts = layer(on(xp, x[:cut])), layer(on(xp, x[cut:]))
        assert b"".join(back(part).tobytes() for part in parts) == whole.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_in_torch_out(family, tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "bfloat16"):
        layer, x = load(tmp_path / dtype, family, dtype=dtype), tokens(6, dtype=dtype)
        expected = layer(x)
        out = layer(torch.from_numpy(x.astype("float32")).to(getattr(torch, dtype)).reshape(2, 3, 48))
        assert isinstance(out, torch.Tensor) and out.dtype == getattr(torch, dtype) and out.shape == (2, 3, 48)
        assert np.array_equal(out.float().numpy().reshape(6, 48), expected.astype("float32"))
        weights, ids = layer.route(torch.from_numpy(x.astype("float32")).to(getattr(torch, dtype)))
        assert isinstance(weights, torch.Tensor) and isinstance(ids, torch.Tensor)
        assert np.array_equal(weights.numpy(), layer.route(x)[0]) and np.array_equal(ids.numpy(), layer.route(x)[1])


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def expected_weights(family, config, logits, bias):
    """Dense (T, E) router weights of a family, float64."""
    k = config["num_experts_per_tok"]
    E = logits.shape[1]
    scores = 1 / (1 + np.exp(-logits)) if family == "deepseek_v3" else softmax(logits)
    choice = scores.copy()
    if family == "deepseek_v3":
        choice += bias
        groups = choice.reshape(len(logits), config["n_group"], -1)
        best_two = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        kept = np.argsort(-best_two, axis=-1)[:, : config["topk_group"]]
        mask = np.ones(groups.shape, bool)
        np.put_along_axis(mask, kept[..., None], False, axis=1)
        choice[mask.reshape(len(logits), E)] = -np.inf
    ids = np.argsort(-choice, axis=-1)[:, :k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if family == "mixtral" or config["norm_topk_prob"]:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = weights * config.get("routed_scaling_factor", 1.0)
    dense = np.zeros((len(logits), E))
    np.put_along_axis(dense, ids, weights, axis=-1)
    return dense


def expected_layer(family, config, tensors, x):
    """Dense weights (T, E) and output (T, H) of the family's published formula, float64."""
    module = next(name for name in tensors if name.endswith(".gate.weight")).removesuffix(".gate.weight")
    own = {name.removeprefix(f"{module}."): array.astype("float64") for name, array in tensors.items()}
    x = x.astype("float64")

    def expert(name, gate="gate_proj", up="up_proj", down="down_proj"):
        g, u = x @ own[f"{name}.{gate}.weight"].T, x @ own[f"{name}.{up}.weight"].T
        return (g / (1 + np.exp(-g)) * u) @ own[f"{name}.{down}.weight"].T

    dense = expected_weights(family, config, x @ own["gate.weight"].T, own.get("gate.e_score_correction_bias"))
    names = ("w1", "w3", "w2") if family == "mixtral" else ()
    out = sum(dense[:, e, None] * expert(f"experts.{e}", *names) for e in range(dense.shape[1]))
    if family == "qwen2_moe":
        out += expert("shared_expert") / (1 + np.exp(-x @ own["shared_expert_gate.weight"].T))
    if family == "deepseek_v3":
        out += expert("shared_experts")
    return dense, out


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formula_of_the_family(xp, family, normed, tmp_path):
    config, tensors = files.weights(family)
    config["norm_topk_prob"] = normed
    layer, x = cumoe.load_layer(files.write(tmp_path, config, tensors), 1, device=device_of(xp)), tokens(40)
    dense, expected = expected_layer(family, config, tensors, x)
    topk_weights, topk_ids = (back(array) for array in layer.route(on(xp, x)))
    assert topk_weights.shape == topk_ids.shape == (40, config["num_experts_per_tok"])
    routed = np.zeros_like(dense)
    np.put_along_axis(routed, topk_ids.astype("int64"), topk_weights.astype("float64"), axis=-1)
    assert np.abs(routed - dense).max() <= 1e-5 * dense.max()
    error = np.abs(back(layer(on(xp, x))) - expected).max(axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= 1e-5


def test_a_layer_on_a_gpu_says_where_its_tokens_must_be(tmp_path):
    gpu()
    layer = load(tmp_path, "mixtral", device="cuda")
    refused(TypeError, "hidden_states must be where the layer is = cuda:0, got cpu; copy them there", layer, tokens())


def test_activation_of_the_config_is_used(tmp_path):
    config, tensors = files.weights("mixtral")
    x = tokens()
    outs = [
        cumoe.load_layer(files.write(tmp_path, {**config, "hidden_act": act}, tensors), 1)(x).tobytes()
        for act in ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "swish")
    ]
    assert len(set(outs[:3])) == 3 and outs[3] == outs[2] and outs[4] == outs[0]


def test_deepseek_without_shared_experts(tmp_path):
    config, tensors = files.weights("deepseek_v3")
    for nothing in (0, None):
        config["n_shared_experts"] = nothing
        kept = {name: array for name, array in tensors.items() if "shared" not in name}
        layer, x = cumoe.load_layer(files.write(tmp_path, config, kept), 1), tokens()
        assert layer.shared is None
        module = "model.layers.1.mlp.shared_experts"
        zeros = {name: np.zeros_like(array) if name.startswith(module) else array for name, array in tensors.items()}
        _, expected = expected_layer("deepseek_v3", config, zeros, x)
        assert np.abs(layer(x) - expected).max() <= 1e-5 * np.linalg.norm(expected, axis=-1).max()


def test_explain_names_the_facts(tmp_path):
    layer = load(tmp_path / "tiny", "deepseek_v3")
    assert layer.explain() == (
        "deepseek_v3 layer 1 of tiny\n"
        "  experts  8 of (H, I) = (48, 24), float32\n"
        "  router   sigmoid, top 3 of 8 from the best 2 of 4 groups, biased choice, weights sum to 1, times 2.5, "
        "logits float32\n"
        "  shared   I = 48, no gate"
    )
    assert repr(layer) == f"<MoELayer {layer.explain()}>"
    assert "sigmoid gate" in load(tmp_path, "qwen2_moe").explain()


def test_wrong_inputs_of_a_layer(tmp_path):
    layer = load(tmp_path, "mixtral")
    refused(
        ValueError,
        "hidden_states must have shape (T, H) or (B, S, H) with H = 48, got (7, 49)",
        layer,
        tokens(7, 49),
    )
    refused(ValueError, "hidden_states must have shape (T, H) or (B, S, H) with H = 48, got (48,)", layer, tokens(1)[0])
    refused(
        TypeError,
        "hidden_states must have the dtype of the layer = float32, got bfloat16; convert it",
        layer,
        tokens(dtype="bfloat16"),
    )
    refused(
        TypeError,
        "hidden_states must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
        layer.route,
        [[1.0] * 48],
    )
