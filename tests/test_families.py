"""What config.json may say, and what it is told when it says something else."""

import re

import checkpoint_files as files
import pytest
from checkpoint_files import refused

import cumoe


@pytest.mark.parametrize(
    ("layer", "options", "kind", "message"),
    [
        (3, {}, ValueError, "layer must be in 0..2, got 3"),
        (-1, {}, ValueError, "layer must be in 0..2, got -1"),
        (1.0, {}, TypeError, "layer must be an int, got float"),
        (1, {"device": "tpu"}, ValueError, "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (
            1,
            {"scheme": "fp8"},
            NotImplementedError,
            "no loader for scheme 'fp8'; available: None, the checkpoint's own dtype",
        ),
        (
            0,
            {},
            ValueError,
            "layer must be an MoE layer of this deepseek_v3 model, got 0, a dense layer: first_k_dense_replace = 1",
        ),
    ],
)
def test_wrong_arguments(layer, options, kind, message, tmp_path):
    config, tensors = files.weights("deepseek_v3")
    refused(kind, message, cumoe.load_layer, files.write(tmp_path, config, tensors), layer, **options)


SUPPORTED = "available: deepseek_v3, gpt_oss, mixtral, qwen2_moe, qwen3_moe"
PAGE = "got none; take it from the model's page"
CONFIGS = [
    ("mixtral", {"model_type": "llama"}, f"no loader for model_type 'llama' in config.json; {SUPPORTED}"),
    ("mixtral", {"model_type": None}, f"config.json must have the field 'model_type', {PAGE}"),
    ("mixtral", {"hidden_size": None}, f"config.json must have the field 'hidden_size', {PAGE}"),
    (
        "mixtral",
        {"num_local_experts": None},
        f"config.json must have the field 'num_local_experts' (or 'num_experts'), {PAGE}",
    ),
    ("mixtral", {"num_hidden_layers": "3"}, "num_hidden_layers in config.json must be an int, got str"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok in config.json must be in 1..4, got 5"),
    (
        "mixtral",
        {"hidden_act": "relu6"},
        "no loader for hidden_act = 'relu6' in config.json; available: silu, swish, gelu, gelu_new, gelu_pytorch_tanh",
    ),
    ("mixtral", {"hidden_act": ["silu"]}, "hidden_act in config.json must be a string, got ['silu']"),
    ("mixtral", {"model_type": {}}, "model_type in config.json must be a string, got {}"),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "no loader for quantization_config.quant_method = 'bitsandbytes' in config.json; "
        "available: 'awq', 'compressed-tensors', 'fp8', 'gptq', 'modelopt', 'mxfp4'",
    ),
    ("qwen3_moe", {"norm_topk_prob": None}, f"config.json must have the field 'norm_topk_prob', {PAGE}"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob in config.json must be true or false, got 1"),
    ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size in config.json must be >= 1, got 0"),
    (
        "qwen3_moe",
        {"mlp_only_layers": [0, 1]},
        "layer must be an MoE layer of this qwen3_moe model, got 1, a dense layer: mlp_only_layers = [0, 1]",
    ),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers in config.json must be a list, got 1"),
    (
        "qwen2_moe",
        {"decoder_sparse_step": 3},
        "layer must be an MoE layer of this qwen2_moe model, got 1, a dense layer: decoder_sparse_step = 3",
    ),
    (
        "deepseek_v3",
        {"moe_layer_freq": 2},
        "layer must be an MoE layer of this deepseek_v3 model, got 1, a dense layer: moe_layer_freq = 2",
    ),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": None},
        f"config.json must have the field 'shared_expert_intermediate_size', {PAGE}",
    ),
    (
        "deepseek_v3",
        {"first_k_dense_replace": None},
        f"config.json must have the field 'first_k_dense_replace', {PAGE}",
    ),
    ("deepseek_v3", {"routed_scaling_factor": "2"}, "routed_scaling_factor in config.json must be a number, got '2'"),
    ("deepseek_v3", {"routed_scaling_factor": True}, "routed_scaling_factor in config.json must be a number, got True"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group in config.json must be in 1..4, got 5"),
    ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok in config.json must be in 1..4, got 5"),
    (
        "deepseek_v3",
        {"n_group": 3},
        "n_group in config.json must split n_routed_experts = 8 into equal groups of at least 2, got 3",
    ),
    (
        "deepseek_v3",
        {"n_group": 8},
        "n_group in config.json must split n_routed_experts = 8 into equal groups of at least 2, got 8",
    ),
    (
        "deepseek_v3",
        {"topk_method": "greedy"},
        "no loader for topk_method = 'greedy' in config.json; available: 'noaux_tc'",
    ),
    (
        "deepseek_v3",
        {"scoring_func": "softmax"},
        "no loader for scoring_func = 'softmax' in config.json; available: 'sigmoid'",
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), CONFIGS)
def test_wrong_configs(family, change, message, tmp_path):
    config, tensors = files.weights(family)
    kind = NotImplementedError if message.startswith("no loader") else ValueError
    if re.search(r"must be (an int|a|true)\b", message):
        kind = TypeError
    refused(kind, message, cumoe.load_layer, files.write(tmp_path, {**config, **change}, tensors), 1)


@pytest.mark.parametrize(
    "name", [name for name in files.CONFIGS["deepseek_v3"] if name not in ("intermediate_size", "n_shared_experts")]
)
def test_no_field_is_guessed(name, tmp_path):
    config, tensors = files.weights("deepseek_v3")
    del config[name]
    with pytest.raises(ValueError, match=f"^config.json must have the field '{name}'"):
        cumoe.load_layer(files.write(tmp_path, config, tensors), 1)
