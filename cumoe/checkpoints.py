"""
A Hugging Face checkpoint directory in, one runnable `MoELayer` out.

Shards are memory-mapped and only the tensors of the one layer are read, so that a layer of a model
larger than the memory loads.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _arrays
from cumoe._checkpoint_experts import FusedSite, Site, coded_experts, fused_experts, gpt_oss_experts, plain_experts
from cumoe._checkpoint_formats import quantisation_of, stored_format
from cumoe._checkpoint_tensors import Tensors, read_json
from cumoe._families import Fields, LayerSpec, layer_spec
from cumoe._prepare import PreparedExperts
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe.layer import MoELayer, SharedExpert

_DTYPES = ("float32", "float16", "bfloat16")


def load_layer(
    checkpoint_dir: str | os.PathLike[str], layer: int, *, device: str = "cpu", scheme: str | None = None
) -> MoELayer:
    """
    Load one MoE layer, with its router and shared expert, from a Hugging Face checkpoint directory.

    Parameters
    ----------
    checkpoint_dir : path
        Directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        Model types: deepseek_v3, gpt_oss, mixtral, qwen2_moe, qwen3_moe; one key an expert or fused 3-D keys.
        Quantised experts are those of the notes, one set of keys a projection.
    layer : int
        Number of the decoder layer, from 0.
    device : {"cpu", "cuda", "cuda:0", ...}
        Where the weights go; "cuda" is the current device.
    scheme : None
        None keeps the checkpoint's own dtype, or its own codes.

    Returns
    -------
    layer : MoELayer
        ``layer(hidden_states)`` runs it. It owns copies of the weights: the files may go away. Its `quant_config`
        says what the codes of quantised experts mean.

    Raises
    ------
    FileNotFoundError
        No such directory, config.json or shard.
    TypeError
        A field of config.json or a tensor has the wrong type.
    ValueError
        A dense layer, a layer number out of range, a missing field or tensor, a wrong shape, a broken file.
    NotImplementedError
        A model type, activation or quantisation without a loader.
    RuntimeError
        No CUDA device.

    Notes
    -----
    Only shards that hold tensors of this layer need to exist. While it loads, the layer's weights are in
    memory twice: as in the checkpoint and as `cumoe.prepare` lays them out.

    Nothing is rounded: codes, scales and zero points are those of the file. By ``quant_method``:

    ================== ==================================================================================
    gptq               4 and 8 bits, w4a16 and w8a16; no groups in the order of activations
    awq                4 bits, w4a16, of the version GEMM
    compressed-tensors pack-quantized of 4 and 8 bits; int-quantized, w8a16 and w8a8, and float-quantized,
                       w8a16 and w8a8, static and dynamic, in blocks too; nvfp4-pack-quantized, w4a4 and
                       w4a16; zero points where integers have them and activations are not quantised
    modelopt           NVFP4, w4a4; also of hf_quant_config.json
    fp8                ``weight_block_size`` as DeepSeek has it, w8a8 with dynamic activations
    mxfp4              gpt_oss, w4a16
    ================== ==================================================================================

    Tokens have the ``torch_dtype`` of config.json then. Experts, or the shared expert, that such a checkpoint keeps as
    floats are taken as they are. Two scales of a gate and an up projection stay two. A static scale of
    activations is the largest of all experts; that of nvfp4 is each expert's own, the larger of gate and up.
    Activations in blocks have float32 scales, also where ``scale_fmt`` says ue8m0.

    Examples
    --------
    >>> layer = cumoe.load_layer("Qwen3-30B-A3B", 0)  # doctest: +SKIP
    >>> out = layer(hidden_states)  # doctest: +SKIP
    """
    xp = _arrays.namespace(device)
    if scheme is not None:
        raise NotImplementedError(f"no loader for scheme {scheme!r}; available: None, the checkpoint's own dtype")
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint_dir must be a directory with config.json, got {str(directory)!r}")
    config = read_json(directory / "config.json")
    spec = layer_spec(config, layer)
    producer = directory / "hf_quant_config.json"
    quantisation = quantisation_of(config, read_json(producer) if producer.exists() else None)
    tensors = Tensors(directory)
    module = _find_module(tensors, spec)

    H, E = spec.hidden_size, spec.num_experts
    router_weight = tensors.read(f"{module}.{spec.router}.weight", "(E, H)", (E, H))
    router_bias = logit_bias = None
    if spec.router_bias:
        router_bias = tensors.read(f"{module}.{spec.router_bias}", "(E,)", (E,)).astype(np.float32)
    if spec.logit_bias:
        logit_bias = tensors.read(f"{module}.{spec.logit_bias}", "(E,)", (E,)).copy()
    router_weight = router_weight.astype(np.float32 if spec.float32_router else router_weight.dtype)
    dtype = None  # that of the experts
    if quantisation is not None:
        dtype = np.dtype(Fields(config).choice("torch_dtype", "dtype", among=_DTYPES))
    with _arrays.device_scope(device):
        experts, dtype, quant_config = _routed_experts(xp, tensors, spec, f"{module}.experts", quantisation, dtype)
        shared = None
        if spec.shared_intermediate_size:
            shared = _shared_expert(xp, tensors, spec, module, quantisation, dtype)
        return MoELayer(
            name=f"{spec.model_type} layer {spec.layer} of {directory.name or directory}",
            hidden_size=H,
            intermediate_size=spec.intermediate_size,
            num_experts=E,
            dtype=dtype.name,
            routing=spec.routing,
            router_weight=xp.asarray(router_weight),
            router_bias=None if router_bias is None else xp.asarray(router_bias),
            experts=experts,
            shared=shared,
            logit_bias=None if logit_bias is None else xp.asarray(logit_bias),
            quant_config=quant_config,
        )


def _find_module(tensors: Tensors, spec: LayerSpec) -> str:
    """Name of the MoE module: models saved with their language-model head put "model." in front."""
    layers = [f"{prefix}layers.{spec.layer}" for prefix in ("model.", "")]
    modules = [f"{layer}.{block}" for layer in layers for block in spec.blocks]
    for module in modules:
        if tensors.under(f"{module}.experts."):
            return module
    dense = [name for layer in layers if (name := f"{layer}.mlp.gate_proj.weight") in tensors]
    if dense:
        raise ValueError(f"layer must be an MoE layer of this model, got {spec.layer}, which has {dense[0]!r}")
    raise ValueError(f"the checkpoint must hold tensors '{modules[0]}.experts.*', got none of these names")


def _routed_experts(
    xp: ModuleType, tensors: Tensors, spec: LayerSpec, experts: str, quantisation: Fields | None, dtype: Any
) -> tuple[PreparedExperts, Any, FusedMoEQuantConfig | None]:
    """The experts, the dtype of their tokens, and what their codes and biases are."""
    H, I, E = spec.hidden_size, spec.intermediate_size, spec.num_experts
    fused = FusedSite(tensors, experts, E, H, I, spec.activation, dtype)
    epilogue = _epilogue(xp, fused, spec) if spec.has_biases else {}
    if any(f"{experts}.{name}" in tensors for name in ("gate_up_proj", "down_proj")):
        return fused_experts(xp, fused, epilogue)
    is_mxfp4 = quantisation is not None and quantisation.get("quant_method") == "mxfp4"
    if is_mxfp4 and not spec.has_biases:
        raise NotImplementedError(f"no loader for mxfp4 of model_type {spec.model_type!r}; available: gpt_oss")
    if spec.has_biases and not is_mxfp4:
        raise NotImplementedError("no loader for one key an expert of gpt_oss; available: fused keys, mxfp4")
    if quantisation is not None and is_mxfp4:
        return gpt_oss_experts(xp, fused, stored_format(quantisation, experts), epilogue)
    names = [[f"{experts}.{e}.{projection}" for projection in spec.projections] for e in range(E)]
    site = Site(tensors, names, H, I, spec.activation, dtype)
    if quantisation is None or site.is_plain():
        return plain_experts(xp, site)
    return coded_experts(xp, site, stored_format(quantisation, names[0][0]))


def _epilogue(xp: ModuleType, site: FusedSite, spec: LayerSpec) -> dict[str, Any]:
    """Biases and what the activation takes, as builders of configs take them."""
    E, H, I = site.num_experts, site.hidden_size, site.intermediate_size
    found: dict[str, Any] = {"gemm1_clamp_limit": spec.limit}
    for name, part, letters, shape in (
        ("w1_bias", "gate_up_proj_bias", "(E, 2I)", (E, 2 * I)),
        ("w2_bias", "down_proj_bias", "(E, H)", (E, H)),
    ):
        found[name] = xp.asarray(site.tensors.read(f"{site.name}.{part}", letters, shape).copy())
    return found


def _shared_expert(
    xp: ModuleType, tensors: Tensors, spec: LayerSpec, module: str, quantisation: Fields | None, dtype: Any
) -> SharedExpert:
    H, I = spec.hidden_size, spec.shared_intermediate_size
    names = [f"{module}.{spec.shared_expert}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    site = Site(tensors, [names], H, I, spec.activation, dtype)
    if quantisation is None or site.is_plain():
        experts = plain_experts(xp, site)[0]
    else:
        experts = coded_experts(xp, site, stored_format(quantisation, names[0]))[0]
    gate_weight = None
    if spec.shared_gate:
        gate_weight = xp.asarray(tensors.read(f"{module}.{spec.shared_gate}.weight", "(1, H)", (1, H)).copy())
    return SharedExpert(experts, I, gate_weight)
