"""Weights of a layer before they are packed: made, and cleared where no loader writes."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _act, _arrays, _check
from cumoe._arrays import Array
from cumoe._backends import DTYPES
from cumoe._parameter import Parameter
from cumoe._quant_desc import dtype_name
from cumoe.config import FusedMoEConfig


def empty_weights(
    moe: FusedMoEConfig,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    params_dtype: Any,
    attributes: dict[str, Any],
) -> dict[str, Array]:
    """Give the weights by name, not initialised, and the biases, zero; sizes must be those of the config."""
    for name, size, field in (
        ("num_experts", num_experts, "num_local_experts"),
        ("hidden_size", hidden_size, "hidden_dim"),
        ("intermediate_size_per_partition", intermediate_size, "intermediate_size_per_partition"),
    ):
        _check.integer(name, size, 0 if name == "num_experts" else 1)
        if getattr(moe, field) not in (None, size):
            raise ValueError(f"{name} must be {field} of the config = {getattr(moe, field)}, got {size}")
    if dtype_name(params_dtype) not in DTYPES:
        raise TypeError(f"params_dtype must be float32, float16 or bfloat16, got {dtype_name(params_dtype)}")
    dtype, device = np.dtype(dtype_name(params_dtype)), str(moe.device)
    xp, rows = _arrays.namespace(device), moe.w13_num_shards * intermediate_size
    with _arrays.device_scope(device):
        weights = {"w13_weight": xp.empty((num_experts, rows, hidden_size), dtype)}
        if moe.has_bias:
            weights["w13_bias"] = _arrays.zeros(xp, (num_experts, rows), dtype)
        weights["w2_weight"] = xp.empty((num_experts, hidden_size, intermediate_size), dtype)
        if moe.has_bias:
            weights["w2_bias"] = _arrays.zeros(xp, (num_experts, hidden_size), dtype)
    return {name: _parameter(xp, weight, attributes) for name, weight in weights.items()}


def _parameter(xp: ModuleType, weight: Array, attributes: dict[str, Any]) -> Array:
    if xp is np:
        return Parameter(weight, **attributes)
    parameter = weight.view(weight.dtype, _device_parameter(xp))
    parameter.__dict__.update(attributes)
    return parameter


@functools.cache
def _device_parameter(cupy: Any) -> Any:
    class DeviceParameter(cupy.ndarray):
        """A CuPy array that carries attributes, such as the loader of a weight; so do its views."""

        def __array_finalize__(self, source: Any) -> None:
            if isinstance(source, DeviceParameter):
                self.__dict__.update(source.__dict__)

    return DeviceParameter


def zero_padding(moe: FusedMoEConfig, layer: Any) -> None:
    """Clear what lies beyond the unpadded sizes of the config."""
    names = ("w13_weight", "w2_weight", *(("w13_bias", "w2_bias") if moe.has_bias else ()))
    for name in names:
        if getattr(layer, name, None) is None:
            raise ValueError(f"layer must have {name}; call create_weights or set it")
    _, arrays = _arrays.enter(**{name: getattr(layer, name) for name in names})
    w13, w2 = arrays[:2]
    width = moe.intermediate_size_per_partition_unpadded or w2.shape[2]
    hidden = moe.hidden_dim_unpadded
    if (hidden, width) == (w2.shape[1], w2.shape[2]):
        return
    for name, array in zip(names, arrays, strict=True):
        _check.writeable(name, array)
    w13, w2, *biases = (array.view(f"u{array.itemsize}") for array in arrays)  # 0.0 has no bit set
    w13[:, :, hidden:] = 0
    w2[:, hidden:] = 0
    w2[:, :, width:] = 0
    # rows of w13 that belong together: gates and ups, or all of them where they alternate
    parts = 1 if _act.is_interleaved(moe.activation) else moe.w13_num_shards
    kept = moe.w13_num_shards // parts * width
    for rows in (w13, *biases[:1]):
        rows.reshape(len(rows), parts, rows.shape[1] // parts, *rows.shape[2:])[:, :, kept:] = 0
    for bias in biases[1:]:
        bias[:, hidden:] = 0
