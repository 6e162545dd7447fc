"""Weights of a layer before they are packed: made, and cleared where no loader writes."""

import functools
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _act, _arrays, _check
from cumoe._arrays import Array
from cumoe._backends import DTYPES
from cumoe._parameter import Parameter
from cumoe._quant_desc import dtype_name
from cumoe.config import FusedMoEConfig


class Spec(NamedTuple):
    """A weight to be made."""

    shape: tuple[int, ...]
    dtype: str
    fill: int | None = 0  # None: not initialised
    attributes: Mapping[str, Any] = MappingProxyType({})  # beside those of all weights


def check_sizes(
    moe: FusedMoEConfig, num_experts: int, hidden_size: int, intermediate_size: int, params_dtype: Any
) -> str:
    """Check the sizes of weights against the config, and return the name of their dtype."""
    for name, size, field in (
        ("num_experts", num_experts, "num_local_experts"),
        ("hidden_size", hidden_size, "hidden_dim"),
        ("intermediate_size_per_partition", intermediate_size, "intermediate_size_per_partition"),
    ):
        _check.integer(name, size, 0 if name == "num_experts" else 1)
        if getattr(moe, field) not in (None, size):
            raise ValueError(f"{name} must be {field} of the config = {getattr(moe, field)}, got {size}")
    dtype = dtype_name(params_dtype)
    if dtype not in DTYPES:
        raise TypeError(f"params_dtype must be float32, float16 or bfloat16, got {dtype}")
    return dtype


def unquantised_weights(
    moe: FusedMoEConfig, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> dict[str, Spec]:
    """Weights by name, not initialised."""
    rows = moe.w13_num_shards * intermediate_size
    return {
        "w13_weight": Spec((num_experts, rows, hidden_size), dtype, None),
        "w2_weight": Spec((num_experts, hidden_size, intermediate_size), dtype, None),
    }


def set_weights(
    layer: Any, moe: FusedMoEConfig, specs: dict[str, Spec], dtype: str, attributes: dict[str, Any]
) -> None:
    """Give a layer its weights, and with biases those, zero, on the device of the config."""
    if moe.has_bias:
        rows: dict[str, tuple[int, ...]] = {}
        for name, spec in specs.items():
            rows.setdefault(name.partition("_")[0], spec.shape[:2])  # the matrix itself comes first
        specs = specs | {f"{prefix}_bias": Spec(shape, dtype) for prefix, shape in rows.items()}
    device = str(moe.device)
    xp = _arrays.namespace(device)
    with _arrays.device_scope(device):
        for name, spec in specs.items():
            setattr(layer, name, _parameter(xp, _filled(xp, spec), {**attributes, **spec.attributes}))


def _filled(xp: ModuleType, spec: Spec) -> Array:
    dtype = np.dtype(spec.dtype)
    if spec.fill == 0:
        return _arrays.zeros(xp, spec.shape, dtype)
    return xp.empty(spec.shape, dtype) if spec.fill is None else xp.full(spec.shape, spec.fill, dtype)


def weight_of(layer: Any, name: str) -> Array:
    """The weight of that name of a layer, or an error."""
    weight = getattr(layer, name, None)
    if weight is None:
        raise ValueError(f"layer must have {name}; call create_weights or set it")
    return weight


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
    _, arrays = _arrays.enter(**{name: weight_of(layer, name) for name in names})
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
