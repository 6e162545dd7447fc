"""From the loaded weights of a scheme to the config that says what they mean."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._act import is_interleaved
from cumoe._arrays import Array
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quantised_weights import Options
from cumoe._shard_scales import w4a8_scales
from cumoe.config import (
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    int4_w4a16_moe_quant_config,
    int4_w4afp8_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
    mxfp4_mxfp8_moe_quant_config,
    mxfp4_w4a4_moe_quant_config,
    mxfp4_w4a8_moe_quant_config,
    mxfp4_w4a16_moe_quant_config,
    nvfp4_moe_quant_config,
    nvfp4_w4a16_moe_quant_config,
)

_NAMES = ((1, "w13"), (2, "w2"))
_MXFP4: dict[str, Callable[..., FusedMoEQuantConfig]] = {
    "mxfp4_w4a16": mxfp4_w4a16_moe_quant_config,
    "mxfp4_w4a4": mxfp4_w4a4_moe_quant_config,
    "mxfp4_mxfp8": mxfp4_mxfp8_moe_quant_config,
    "mxfp4_w4a8": mxfp4_w4a8_moe_quant_config,
}


def codes_of(options: Options, weights: dict[str, Array]) -> tuple[Array, Array]:
    """Codes of both weights as `prepare` takes them."""
    w13, w2 = (weights[f"{prefix}_{options.codes}"] for prefix in ("w13", "w2"))
    return (_as_bytes(w13), _as_bytes(w2)) if options.scheme == "int4_w4afp8" else (w13, w2)


def config_of(
    options: Options, activation: str, weights: dict[str, Array], others: dict[str, Any]
) -> FusedMoEQuantConfig:
    """
    The config of loaded weights; `others` are its biases and the parameters of the activation.

    It holds the scales as they are, where they are already what the builder of the scheme takes.
    """
    scheme = options.scheme
    scales = weights[f"w13_{options.scale}"], weights[f"w2_{options.scale}"]
    if scheme.startswith("nvfp4"):
        return _nvfp4(options, activation, weights, scales, others)
    if options.static_activations:
        inputs = {f"a{i}_scale": _largest(weights[f"{name}_input_scale"]) for i, name in _NAMES}
        others = others | inputs
    if scheme in _MXFP4:
        return _MXFP4[scheme](*scales, **others)
    if options.is_grouped:
        build: Callable[..., FusedMoEQuantConfig]
        build = int4_w4a16_moe_quant_config if scheme == "int4_w4a16" else int8_w8a16_moe_quant_config
        zeros = weights.get("w13_qzeros"), weights.get("w2_qzeros")
        return build(*scales, *zeros, _group(options, weights), **others)
    if scheme == "int4_w4afp8":
        (scale1, alphas1), (scale2, alphas2) = (w4a8_scales(scale) for scale in scales)
        per_token = options.per_act_token_quant
        return int4_w4afp8_moe_quant_config(scale1, scale2, alphas1, alphas2, per_token, True, **others)
    return _eight_bits(options, activation, weights, scales, others)


def _group(options: Options, weights: dict[str, Array]) -> list[int] | None:
    """Rows and columns of a group as the builders of integer weights take them; None for one group a row."""
    codes_a_byte = 2 if options.scheme == "int4_w4a16" else 1
    for _, name in _NAMES:
        codes, scale = weights[f"{name}_{options.codes}"], weights[f"{name}_{options.scale}"]
        _check.ndim(f"{name}_{options.scale}", scale, "(E, N, K / group)", 3)
        if scale.shape[2] > 1:
            return [0, codes.shape[2] * codes_a_byte // scale.shape[2]]
    return None


def _eight_bits(
    options: Options,
    activation: str,
    weights: dict[str, Array],
    scales: tuple[Array, Array],
    others: dict[str, Any],
) -> FusedMoEQuantConfig:
    scheme, block_shape = options.scheme, options.block_shape
    if scheme == "int8_w8a16":
        return int8_w8a16_moe_quant_config(*scales, **others)
    if block_shape is None and not options.per_out_ch_quant and is_interleaved(activation):
        scales = _of_rows(activation, scales[0], weights["w13_weight"].shape[1]), scales[1]
    if scheme == "fp8_w8a16":
        return fp8_w8a16_moe_quant_config(*scales, block_shape, **others)
    per_token = options.per_act_token_quant
    if scheme == "fp8_w8a8":
        return fp8_w8a8_moe_quant_config(
            *scales,
            per_act_token_quant=per_token,
            per_out_ch_quant=options.per_out_ch_quant,
            block_shape=block_shape,
            **others,
        )
    if block_shape is not None:
        scale1, scale2 = scales
        return FusedMoEQuantConfig.make("int8", block_shape=block_shape, w1_scale=scale1, w2_scale=scale2, **others)
    return int8_w8a8_moe_quant_config(*scales, per_act_token_quant=per_token, **others)


def _nvfp4(
    options: Options,
    activation: str,
    weights: dict[str, Array],
    scales: tuple[Array, Array],
    others: dict[str, Any],
) -> FusedMoEQuantConfig:
    """
    Gate and up rows keep a scale each, as alphas of their rows.

    vLLM takes that of the gate for both, which is wrong for the up rows where the two differ.
    """
    names = [f"{prefix}_{part}" for part in options.others for prefix in ("w13", "w2")]
    side, arrays = _arrays.enter(**{name: weights[name] for name in names})
    experts, rows = weights["w13_weight"].shape[:2]
    shards = 1 if arrays[0].ndim < 2 else arrays[0].shape[1]
    for name, array in zip(names, arrays, strict=True):
        is_first = name.startswith("w13")
        letters, shape = ("(E, shards)", (experts, shards)) if is_first else ("(E,)", (experts,))
        _check.dtype(name, array, ("float32",))
        _check.shape(name, array, letters, shape)
    scale1, scale2, *inputs = arrays
    if options.scheme == "nvfp4_w4a16":
        return _nvfp4_of(activation, side, rows, (scale1, scale2), None, scales, others)
    input1, input2 = inputs[0].max(axis=1), inputs[1]  # both shards see the same tokens
    one, alphas = np.float32(1), (scale1 * input1[:, None], scale2 * input2)
    return _nvfp4_of(activation, side, rows, alphas, (one / input1, one / input2), scales, others)


def nvfp4_config(
    options: Options, activation: str, weights: dict[str, Array], others: dict[str, Any]
) -> FusedMoEQuantConfig:
    """The config of weights as compressed-tensors has them, whose global scales are what numbers are divided by."""
    names = ["w13_weight_global_scale", "w2_weight_global_scale"]
    if options.scheme == "nvfp4_w4a4":
        names += ["w13_input_global_scale", "w2_input_global_scale"]
    side, (scale1, scale2, *inputs) = _arrays.enter(**{name: weights[name] for name in names})
    one, rows, gscales = np.float32(1), weights["w13_weight"].shape[1], None
    if inputs:
        gscales = inputs[0].min(axis=1), inputs[1]  # both shards see the same tokens
        scale1, scale2 = scale1 * gscales[0][:, None], scale2 * gscales[1]
    scales = weights["w13_weight_scale"], weights["w2_weight_scale"]
    return _nvfp4_of(activation, side, rows, (one / scale1, one / scale2), gscales, scales, others)


def _nvfp4_of(
    activation: str,
    side: _arrays.Side,
    rows: int,
    alphas: tuple[Array, Array],
    gscales: tuple[Array, Array] | None,
    scales: tuple[Array, Array],
    others: dict[str, Any],
) -> FusedMoEQuantConfig:
    """The config of alphas (E, shards) and (E,), with global scales of the activations if those are quantised."""
    of_rows = _of_rows(activation, side.leave(alphas[0]), rows), side.leave(alphas[1])
    if gscales is None:
        return nvfp4_w4a16_moe_quant_config(*of_rows, *scales, **others)
    first, second = (side.leave(one) for one in gscales)
    return nvfp4_moe_quant_config(*of_rows, first, second, *scales, **others)


def _of_rows(activation: str, scale: Array, num_rows: int) -> Array:
    """Scales of shards (E, 2) as scales of the rows (E, 2I); of one shard (E, 1) as they are."""
    side, (scale,) = _arrays.enter(scale=scale)
    if scale.ndim == 2 and scale.shape[1] == 2:
        each, xp = num_rows // 2, side.xp
        scale = xp.tile(scale, (1, each)) if is_interleaved(activation) else xp.repeat(scale, each, axis=1)
    return side.leave(scale)


def _largest(scale: Array) -> Array:
    """The largest scale, (1,)."""
    side, (scale,) = _arrays.enter(input_scale=scale)
    return side.leave(scale.max().reshape(1) if scale.size else side.xp.ones(1, np.float32))


def _as_bytes(packed: Array) -> Array:
    """Eight codes an int32 as two a byte: the same memory."""
    side, (words,) = _arrays.enter(weight_packed=packed)
    _check.dtype("weight_packed", words, ("int32", "uint8"))
    return side.leave(words.view(np.uint8))
