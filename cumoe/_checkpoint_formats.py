"""
What a quantised checkpoint says of its weights: format, scheme, and which tensors each projection has.

A quantisation method is one function ``(fields, name) -> StoredFormat``; `_METHODS` lists them by quant_method. Nothing
here opens a shard or touches an array. Fields that change the numbers have no default.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from cumoe._families import Fields
from cumoe._quantised_weights import Options, options_of

_INT_BITS = (4, 8)


@dataclass(frozen=True)
class StoredFormat:
    """
    How the projections of a module are stored, and how the layer computes with them.

    Parameters
    ----------
    reader : str
        Which function of `_checkpoint_experts` reads a projection.
    options : Options
        The scheme, as `QuantizedFusedMoEMethod` has it.
    tensors : tuple of str
        Last parts of the names of tensors that each projection has.
    optional : tuple of str
        Of those that all have or none.
    bits : int
        Of an integer code.
    group_size : int
        Columns that share a scale, -1 for all.
    strategy : str
        What shares a scale: "tensor", "channel", "group" or "block".
    checkpoint_format : str
        Of GPTQ.
    """

    reader: str
    options: Options
    tensors: tuple[str, ...]
    optional: tuple[str, ...] = ()
    bits: int = 8
    group_size: int = -1
    strategy: str = "group"
    checkpoint_format: str = ""


def quantisation_of(config: dict[str, Any], producer: dict[str, Any] | None) -> Fields | None:
    """
    The fields on quantisation in config.json; None if there are none.

    `producer` is hf_quant_config.json, where ModelOpt writes them too, and older versions only.
    """
    if config.get("quantization_config") is not None:
        found = Fields(config).inside("quantization_config")
    elif producer is not None:
        inner = Fields(producer, file="hf_quant_config.json").inside("quantization").values
        found = Fields({"quant_method": "modelopt", **inner}, "quantization.", "hf_quant_config.json")
    else:
        return None
    found.choice("quant_method", among=tuple(_METHODS))
    return found


def stored_format(fields: Fields, name: str) -> StoredFormat:
    """How the projections of the module `name` are stored."""
    return _METHODS[fields.get("quant_method")](fields, name)


def _options(scheme: str, **given: Any) -> Options:
    absent: dict[str, Any] = dict.fromkeys(Options._fields[1:], False)
    return options_of(scheme, **{**absent, "block_shape": None, "group_size": None, **given})


def _integers(reader: str, tensors: tuple[str, ...], optional: tuple[str, ...], bits: int, group: int) -> StoredFormat:
    scheme = {4: "int4_w4a16", 8: "int8_w8a16"}[bits]
    return StoredFormat(reader, _options(scheme, group_size=group), tensors, optional, bits, group)


def _gptq(fields: Fields, name: str) -> StoredFormat:
    bits, group = fields.choice("bits", among=_INT_BITS), fields.integer("group_size", low=-1)
    found = _integers("gptq", ("qweight", "scales"), ("qzeros", "g_idx"), bits, group)
    written = fields.choice("checkpoint_format", among=("gptq", "gptq_v2"), default="gptq")
    return replace(found, checkpoint_format=written)


def _awq(fields: Fields, name: str) -> StoredFormat:
    fields.choice("version", among=("gemm", "GEMM"), default="gemm")
    bits, group = fields.choice("bits", "w_bit", among=(4,)), fields.integer("group_size", "q_group_size", low=-1)
    return _integers("awq", ("qweight", "scales"), ("qzeros",), bits, group)


def _deepseek(fields: Fields, name: str) -> StoredFormat:
    block = fields.optional("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        raise NotImplementedError(
            f"no loader for quantization_config.weight_block_size = {block!r} in config.json; available: two ints"
        )
    fields.choice("fmt", among=("e4m3",), default="e4m3")
    fields.choice("activation_scheme", among=("dynamic",))
    options = _options("fp8_w8a8", block_shape=block)
    return StoredFormat("bytes", options, ("weight", "weight_scale_inv"), strategy="block")


def _modelopt(fields: Fields, name: str) -> StoredFormat:
    fields.choice("quant_algo", among=("NVFP4",))
    tensors = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    return StoredFormat("modelopt", _options("nvfp4_w4a4"), tensors)


def _gpt_oss(fields: Fields, name: str) -> StoredFormat:
    return StoredFormat("gpt_oss", _options("mxfp4_w4a16"), ("blocks", "scales"))


def _compressed_tensors(fields: Fields, name: str) -> StoredFormat:
    group = _group_of(fields, name)
    weights = group.inside("weights")
    inputs = group.inside("input_activations") if group.optional("input_activations") is not None else None
    written = (group if group.optional("format") is not None else fields).choice("format", among=tuple(_COMPRESSED))
    return _COMPRESSED[written](weights, inputs)


def _group_of(fields: Fields, name: str) -> Fields:
    """The group of the config whose targets the module `name` is one of."""
    groups = fields.inside("config_groups")
    for one in groups.values:
        group = groups.inside(one)
        for target in group.items("targets"):
            is_pattern = isinstance(target, str) and target.startswith("re:")
            if target in ("Linear", name) or (is_pattern and re.match(target[3:], name)):
                return group
    raise NotImplementedError(
        f"no loader for quantization_config.config_groups in config.json without a target for {name!r}; "
        "available: 'Linear', a name, 're:' and a pattern"
    )


def _packed(weights: Fields, inputs: Fields | None) -> StoredFormat:
    bits = weights.choice("num_bits", among=_INT_BITS)
    weights.choice("type", among=("int",))
    _not_quantised(inputs)
    strategy = weights.choice("strategy", among=("group", "channel"))
    group = weights.integer("group_size") if strategy == "group" else -1
    zeros = () if weights.flag("symmetric") else ("weight_zero_point",)
    return _integers("packed", ("weight_packed", "weight_scale", *zeros), ("weight_g_idx",), bits, group)


def _int8(weights: Fields, inputs: Fields | None) -> StoredFormat:
    weights.choice("num_bits", among=(8,))
    weights.choice("type", among=("int",))
    if inputs is None:
        strategy = weights.choice("strategy", among=("tensor", "channel", "group"))
        group = weights.integer("group_size") if strategy == "group" else -1
        tensors: tuple[str, ...] = ("weight", "weight_scale")
        options = _options("int8_w8a16")
        if not weights.flag("symmetric"):
            options, tensors = _options("int8_w8a16", group_size=-1), (*tensors, "weight_zero_point")
        return StoredFormat("bytes", options, tensors, group_size=group, strategy=strategy)
    weights.choice("symmetric", among=(True,))
    return _with_activations("int8_w8a8", weights, inputs, ("tensor", "channel"))


def _fp8(weights: Fields, inputs: Fields | None) -> StoredFormat:
    weights.choice("num_bits", among=(8,))
    weights.choice("type", among=("float",))
    return _with_activations("fp8_w8a8" if inputs else "fp8_w8a16", weights, inputs, ("tensor", "channel", "block"))


def _with_activations(scheme: str, weights: Fields, inputs: Fields | None, among: tuple[str, ...]) -> StoredFormat:
    """Weights of a byte, with or without activations of a byte."""
    strategy, tensors = weights.choice("strategy", among=among), ["weight", "weight_scale"]
    given: dict[str, Any] = {"per_out_ch_quant": strategy == "channel"}
    if strategy == "block":
        given["block_shape"] = weights.items("block_structure")
    if inputs is not None:
        inputs.choice("num_bits", among=(8,))
        inputs.choice("type", among=("int" if scheme == "int8_w8a8" else "float",))
        inputs.choice("symmetric", among=(True,))
        if strategy == "block":
            inputs.choice("strategy", among=("group",))
            inputs.choice("group_size", among=tuple(given["block_shape"][1:]))
            inputs.choice("dynamic", among=(True,))
        else:
            given["per_act_token_quant"] = inputs.choice("strategy", among=("token", "tensor")) == "token"
            static = not inputs.choice("dynamic", among=(True,) if given["per_act_token_quant"] else (True, False))
            given["static_activations"] = static
            tensors += ["input_scale"] * static
    return StoredFormat("bytes", _options(scheme, **given), tuple(tensors), strategy=strategy)


def _nvfp4(weights: Fields, inputs: Fields | None) -> StoredFormat:
    weights.choice("num_bits", among=(4,))
    weights.choice("type", among=("float",))
    weights.choice("group_size", among=(16,))
    tensors: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_global_scale")
    if inputs is None:
        return StoredFormat("nvfp4", _options("nvfp4_w4a16"), tensors)
    inputs.choice("num_bits", among=(4,))
    inputs.choice("type", among=("float",))
    return StoredFormat("nvfp4", _options("nvfp4_w4a4"), (*tensors, "input_global_scale"))


def _not_quantised(inputs: Fields | None) -> None:
    if inputs is not None:
        inputs.choice("num_bits", among=(16,))


_COMPRESSED = {
    "float-quantized": _fp8,
    "int-quantized": _int8,
    "nvfp4-pack-quantized": _nvfp4,
    "pack-quantized": _packed,
}
_METHODS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _deepseek,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _gpt_oss,
}
