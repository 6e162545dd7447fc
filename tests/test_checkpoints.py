"""Reading checkpoint directories: every spelling gives the same layer, every damage a clear error."""

import json
import re

import checkpoint_files as files
import numpy as np
import pytest
from checkpoint_files import FAMILIES, load, refused, tokens
from sides import back, device_of, on

import cumoe

# -- spellings --------------------------------------------------------------------------------------


def without_prefix(tensors):
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def shuffled(tensors):
    return dict(sorted(tensors.items(), key=lambda item: hash(item[0][::-1])))


SPELLINGS = {
    "fused": (files.fuse, {}),
    "fused and swapped": (lambda tensors: files.fuse(tensors, swapped=True), {}),
    "without a head": (without_prefix, {}),
    "fused without a head": (lambda tensors: without_prefix(files.fuse(tensors)), {}),
    "shards": (shuffled, {"shards": 5}),
    "fused shards": (files.fuse, {"shards": 3}),
    "odd header": (lambda tensors: tensors, {"pad": 1}),
    "fused, odd header": (files.fuse, {"pad": 3}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_gives_the_same_bits(xp, family, dtype, tmp_path):
    x, device = on(xp, tokens(dtype=dtype)), device_of(xp)
    plain = load(tmp_path / "plain", family, dtype=dtype, device=device)
    expected = back(plain(x))
    assert expected.shape == x.shape and expected.dtype == x.dtype
    assert np.isfinite(expected.astype("float32")).all() and expected.any()
    for spelling, (change, write) in SPELLINGS.items():
        layer = load(tmp_path / spelling, family, change, dtype=dtype, device=device, **write)
        assert back(layer(x)).tobytes() == expected.tobytes(), spelling


def test_per_expert_keys_under_the_new_mixtral_name(tmp_path):
    x = tokens()
    expected = load(tmp_path / "old", "mixtral")(x)
    new = load(tmp_path / "new", "mixtral", lambda t: {n.replace("block_sparse_moe", "mlp"): a for n, a in t.items()})
    assert new(x).tobytes() == expected.tobytes()


def test_square_experts_are_not_taken_for_swapped_ones(tmp_path):
    x = tokens()
    for size in (24, 48):  # H = 2I: gate_up fits both ways; H = I: down does
        config, _ = files.weights("qwen3_moe")
        files.CONFIGS["square"] = {**files.CONFIGS["qwen3_moe"], "moe_intermediate_size": size}
        try:
            _, tensors = files.weights("square")
        finally:
            del files.CONFIGS["square"]
        config["moe_intermediate_size"] = size
        outs = [
            cumoe.load_layer(files.write(tmp_path / f"{size} {i}", config, spelled), 1)(x).tobytes()
            for i, spelled in enumerate((tensors, files.fuse(tensors), files.fuse(tensors, swapped=True)))
        ]
        assert outs[0] == outs[1] == outs[2]


def test_one_dense_mistake_of_orientation_is_refused(tmp_path):
    def half_swapped(tensors):
        fused = files.fuse(tensors)
        name = next(name for name in fused if name.endswith("down_proj"))
        return {**fused, name: fused[name].transpose(0, 2, 1)}

    message = (
        "tensor 'model.layers.1.mlp.experts.down_proj' must have shape (E, H, I) = (4, 48, 56), got (4, 56, 48); "
        "the last two axes look swapped"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(tmp_path, "mixtral", half_swapped)


def test_shards_of_other_layers_may_be_missing(tmp_path):
    x = tokens()
    config, tensors = files.weights("qwen3_moe")
    expected = load(tmp_path / "all", "qwen3_moe")(x)
    folder = files.write(tmp_path / "part", config, tensors, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.2.mlp.gate.weight"] = "model-00003-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cumoe.load_layer(folder, 1)(x).tobytes() == expected.tobytes()


def test_the_files_may_change_after_loading(tmp_path):
    x = tokens()
    for change in (files.fuse, dict):
        layer = load(tmp_path, "deepseek_v3", change)
        expected = layer(x)
        path = tmp_path / "model.safetensors"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\xff" * size)
        assert layer(x).tobytes() == expected.tobytes()


# -- refusals ---------------------------------------------------------------------------------------


def broken(tmp_path, family="qwen3_moe", shards=1):
    config, tensors = files.weights(family)
    return files.write(tmp_path, config, tensors, shards)


def test_no_directory(tmp_path):
    path = str(tmp_path / "nowhere")
    refused(
        FileNotFoundError,
        f"checkpoint_dir must be a directory with config.json, got {path!r}",
        cumoe.load_layer,
        path,
        0,
    )


def test_no_config(tmp_path):
    message = f"{tmp_path / 'config.json'} must exist, got no such file; checkpoint_dir is not a checkpoint"
    refused(FileNotFoundError, message, cumoe.load_layer, tmp_path, 0)


def test_a_config_that_is_not_an_object(tmp_path):
    path = broken(tmp_path) / "config.json"
    path.write_text("[]")
    refused(ValueError, f"{path} must hold a JSON object, got list", cumoe.load_layer, tmp_path, 0)
    path.write_text("{")
    message = f"{path} must be JSON, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    refused(ValueError, message, cumoe.load_layer, tmp_path, 0)


def test_no_weights(tmp_path):
    (broken(tmp_path) / "model.safetensors").unlink()
    message = f"{tmp_path} must hold model.safetensors or model.safetensors.index.json, got neither"
    refused(FileNotFoundError, message, cumoe.load_layer, tmp_path, 1)


def test_missing_shard(tmp_path):
    path = broken(tmp_path, shards=3) / "model-00002-of-00003.safetensors"
    path.unlink()
    message = f"{path} must exist, as model.safetensors.index.json says, got no such file; download it again"
    refused(FileNotFoundError, message, cumoe.load_layer, tmp_path, 1)


def test_truncated_file(tmp_path):
    path = broken(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    start = f"{path} must be a complete safetensors file, got"
    path.write_bytes(content[:-1])
    message = f"{start} {len(content) - 1} of {len(content)} bytes; download it again"
    refused(ValueError, message, cumoe.load_layer, tmp_path, 1)
    for size, reason in ((100, "invalid header length"), (5, "header too small"), (0, "header too small")):
        path.write_bytes(content[:size])
        message = f"{start} {size} bytes (Error while deserializing header: {reason}); download it again"
        refused(ValueError, message, cumoe.load_layer, tmp_path, 1)


def test_files_that_are_not_safetensors(tmp_path):
    path = broken(tmp_path) / "model.safetensors"
    start = f"{path} must be a complete safetensors file, got"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(ValueError, f"{start} a Git LFS pointer; run git lfs pull", cumoe.load_layer, tmp_path, 1)
    path.write_text("<html>not found</html>")
    message = f"{start} 22 bytes (Error while deserializing header: header too large); download it again"
    refused(ValueError, message, cumoe.load_layer, tmp_path, 1)
    path.write_bytes((4).to_bytes(8, "little") + b"null" + bytes(8))
    with pytest.raises(
        ValueError, match=r"must be a complete safetensors file, got 20 bytes \(.*\); download it again$"
    ):
        cumoe.load_layer(tmp_path, 1)


def test_broken_index(tmp_path):
    path = broken(tmp_path, shards=2) / "model.safetensors.index.json"
    path.write_text("{}")
    refused(ValueError, f"{path} must hold an object 'weight_map', got NoneType", cumoe.load_layer, tmp_path, 1)
    path.write_text(json.dumps({"weight_map": {"model.layers.1.mlp.gate.weight": "../secret"}}))
    refused(ValueError, f"{path} must map tensors to file names, got '../secret'", cumoe.load_layer, tmp_path, 1)


def test_a_shard_without_its_tensor(tmp_path):
    path = broken(tmp_path, shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard_of = index["weight_map"]
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    shard_of[name] = ({*shard_of.values()} - {shard_of[name]}).pop()
    path.write_text(json.dumps(index))
    message = f"{shard_of[name]} must hold tensor {name!r} as model.safetensors.index.json says, got a shard without it"
    refused(ValueError, message, cumoe.load_layer, tmp_path, 1)


MODULE = "model.layers.1.mlp"
TENSORS = [  # family, change of the tensors, kind, message
    (
        "qwen3_moe",
        {f"{MODULE}.experts.3.up_proj.weight": None},
        ValueError,
        "{folder} must hold tensor 'model.layers.1.mlp.experts.3.up_proj.weight', got none of that name",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.experts.{e}.down_proj.weight": None for e in range(8)},
        ValueError,
        "{folder} must hold tensor 'model.layers.1.mlp.experts.0.down_proj.weight' and 7 more of this layer, "
        "got none of that name",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.gate.weight": None},
        ValueError,
        "{folder} must hold tensor 'model.layers.1.mlp.gate.weight', got none of that name",
    ),
    (
        "qwen2_moe",
        {f"{MODULE}.shared_expert_gate.weight": None},
        ValueError,
        "{folder} must hold tensor 'model.layers.1.mlp.shared_expert_gate.weight', got none of that name",
    ),
    (
        "deepseek_v3",
        {f"{MODULE}.gate.e_score_correction_bias": None},
        ValueError,
        "{folder} must hold tensor 'model.layers.1.mlp.gate.e_score_correction_bias', got none of that name",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.experts.2.down_proj.weight": np.zeros((24, 48), "float32")},
        ValueError,
        "tensor 'model.layers.1.mlp.experts.2.down_proj.weight' must have shape (H, I) = (48, 24), got (24, 48); "
        "the last two axes look swapped",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.gate.weight": np.zeros((9, 48), "float32")},
        ValueError,
        "tensor 'model.layers.1.mlp.gate.weight' must have shape (E, H) = (8, 48), got (9, 48)",
    ),
    (
        "deepseek_v3",
        {f"{MODULE}.shared_experts.up_proj.weight": np.zeros((24, 48), "float32")},
        ValueError,
        "tensor 'model.layers.1.mlp.shared_experts.up_proj.weight' must have shape (I, H) = (48, 48), got (24, 48)",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.experts.0.gate_proj.weight": np.zeros((24, 48), "int8")},
        TypeError,
        "tensor 'model.layers.1.mlp.experts.0.gate_proj.weight' must be F32, F16 or BF16, got I8",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.experts.1.gate_proj.weight": np.zeros((24, 48), "float8_e4m3fn")},
        TypeError,
        "tensor 'model.layers.1.mlp.experts.1.gate_proj.weight' must be F32, F16 or BF16, got F8_E4M3",
    ),
    (
        "qwen3_moe",
        {f"{MODULE}.experts.1.gate_proj.weight": np.zeros((24, 48), "bfloat16")},
        TypeError,
        "tensor 'model.layers.1.mlp.experts.1.gate_proj.weight' must have the dtype of the first expert = float32, "
        "got bfloat16",
    ),
]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(("family", "change", "kind", "message"), TENSORS)
def test_wrong_tensors(family, change, kind, message, shards, tmp_path):
    config, tensors = files.weights(family)
    tensors = {name: array for name, array in {**tensors, **change}.items() if array is not None}
    folder = files.write(tmp_path, config, tensors, shards)
    refused(kind, message.format(folder=folder), cumoe.load_layer, folder, 1)


def test_half_fused(tmp_path):
    def without_down(tensors):
        return {name: array for name, array in files.fuse(tensors).items() if not name.endswith("down_proj")}

    message = f"{tmp_path} must hold tensor 'model.layers.1.mlp.experts.down_proj', got none of that name"
    refused(ValueError, message, load, tmp_path, "mixtral", without_down)


def test_a_layer_that_is_not_there(tmp_path):
    config, tensors = files.weights("mixtral")
    message = "the checkpoint must hold tensors 'model.layers.2.mlp.experts.*', got none of these names"
    refused(ValueError, message, cumoe.load_layer, files.write(tmp_path, config, tensors), 2)


def test_a_dense_layer_that_the_config_does_not_know(tmp_path):
    config, tensors = files.weights("qwen3_moe")
    tensors["model.layers.2.mlp.gate_proj.weight"] = np.zeros((40, 48), "float32")
    message = "layer must be an MoE layer of this model, got 2, which has 'model.layers.2.mlp.gate_proj.weight'"
    refused(ValueError, message, cumoe.load_layer, files.write(tmp_path, config, tensors), 2)
