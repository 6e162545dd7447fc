"""Weights of a layer in a quantisation scheme: the options of the scheme, and the names, shapes and dtypes in vLLM."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from cumoe import _check
from cumoe._act import is_interleaved
from cumoe._layer_weights import Spec
from cumoe.config import FusedMoEConfig

_GROUPED = ("group_size", "has_zero_points")
_EIGHT_BITS = ("per_act_token_quant", "per_out_ch_quant", "block_shape", "static_activations")

# scheme -> the options that it has
_OPTIONS: dict[str, tuple[str, ...]] = {
    "fp8_w8a8": _EIGHT_BITS,
    "fp8_w8a16": ("per_out_ch_quant", "block_shape"),
    "int8_w8a8": _EIGHT_BITS,
    "int8_w8a16": _GROUPED,
    "int4_w4a16": _GROUPED,
    "int4_w4afp8": ("per_act_token_quant", "group_size", "static_activations"),
    "mxfp4_w4a16": (),
    "mxfp4_w4a4": (),
    "mxfp4_mxfp8": (),
    "mxfp4_w4a8": ("static_activations",),
    "nvfp4_w4a4": (),
    "nvfp4_w4a16": (),
}
_EXCLUSIVE = (
    ("block_shape", "per_act_token_quant"),
    ("block_shape", "per_out_ch_quant"),
    ("block_shape", "static_activations"),
    ("static_activations", "per_act_token_quant"),
)
_LEAST_GROUP = 32


class Options(NamedTuple):
    """A scheme with its options, checked."""

    scheme: str
    per_act_token_quant: bool
    per_out_ch_quant: bool
    block_shape: list[int] | None
    group_size: int | None
    has_zero_points: bool
    static_activations: bool

    @property
    def is_grouped(self) -> bool:
        """Whether weights are unsigned codes in groups along K, as GPTQ and AWQ have them."""
        return self.scheme == "int4_w4a16" or (self.scheme == "int8_w8a16" and self.group_size is not None)

    @property
    def codes(self) -> str:
        """What the codes are called after "w13_" and "w2_"."""
        return "qweight" if self.is_grouped else "weight_packed" if self.scheme == "int4_w4afp8" else "weight"

    @property
    def scale(self) -> str:
        """What the scales are called after "w13_" and "w2_"."""
        if self.is_grouped or self.scheme == "int8_w8a16":
            return "scales" if self.is_grouped else "scale"
        return "weight_scale" if self.block_shape is None else "weight_scale_inv"

    @property
    def others(self) -> tuple[str, ...]:
        """What else there is, but for biases."""
        if self.scheme.startswith("nvfp4"):
            return ("weight_scale_2", "input_scale") if self.scheme == "nvfp4_w4a4" else ("weight_scale_2",)
        return ("qzeros",) * self.has_zero_points + ("input_scale",) * self.static_activations

    @property
    def names(self) -> tuple[str, ...]:
        """All weights, but for biases."""
        parts = (self.codes, self.scale, *self.others)
        return tuple(f"{prefix}_{part}" for prefix in ("w13", "w2") for part in parts)


def options_of(
    scheme: str,
    per_act_token_quant: bool,
    per_out_ch_quant: bool,
    block_shape: Sequence[int] | None,
    group_size: int | None,
    has_zero_points: bool,
    static_activations: bool,
) -> Options:
    """Check the options of a scheme: each by itself, against the scheme, and against each other."""
    _check.choice("scheme", scheme, tuple(_OPTIONS))
    options = Options(
        scheme,
        per_act_token_quant,
        per_out_ch_quant,
        _block(block_shape),
        group_size,
        has_zero_points,
        static_activations,
    )
    given = {
        name: value for name, value in options._asdict().items() if name != "scheme" and value not in (None, False)
    }
    for name, value in given.items():
        if name not in ("block_shape", "group_size"):
            _check.choice(name, value, (False, True))
        if name not in _OPTIONS[scheme]:
            raise ValueError(f"{name} must be {_absent(name)} for {scheme!r}, got {value!r}")
    for name, other in _EXCLUSIVE:
        if name in given and other in given:
            raise ValueError(f"{name} must be {_absent(name)} with {other} = {given[other]!r}, got {given[name]!r}")
    if group_size is not None:
        if _check.integer("group_size", group_size, -1) != -1 and group_size < _LEAST_GROUP:
            raise ValueError(f"group_size must be -1, for one group a row, or >= {_LEAST_GROUP}, got {group_size}")
    elif scheme.startswith("int4"):
        raise ValueError(f"group_size must be given for {scheme!r}, got None; -1 is one group a row")
    elif has_zero_points:
        raise ValueError(f"has_zero_points must be False for {scheme!r} without group_size, got True")
    return options


def weights_of(
    options: Options, moe: FusedMoEConfig, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> dict[str, Spec]:
    """
    Weights by name, but for biases.

    Codes are zero, and so are scales where a code of zero is a number; what a loader leaves out counts nothing.
    """
    specs: dict[str, Spec] = {}
    shards = moe.w13_num_shards
    group, _ = group_of(options, hidden_size, intermediate_size)
    for prefix, rows, columns, rows_name, columns_name in (
        ("w13", shards * intermediate_size, hidden_size, "intermediate_size_per_partition", "hidden_size"),
        ("w2", hidden_size, intermediate_size, "hidden_size", "intermediate_size_per_partition"),
    ):
        shape, parts = (num_experts, rows, columns), 1
        if prefix == "w13" and not is_interleaved(moe.activation):
            parts = shards
        per_shard = (num_experts, shards) if prefix == "w13" else (num_experts,)
        made = _parts(options, shape, parts, per_shard, group, dtype, (rows_name, columns_name))
        specs |= {f"{prefix}_{part}": spec for part, spec in made.items()}
    return specs


def group_of(options: Options, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """Columns of a group, halved until both sizes are multiples of it, as vLLM does; and by how much it shrank."""
    group, times = options.group_size, 1
    if group is None or group == -1:
        return -1, 1
    while hidden_size % group or intermediate_size % group:
        if group % 2 or group < 2 * _LEAST_GROUP:
            raise ValueError(
                f"group_size must be such that hidden_size = {hidden_size} and intermediate_size_per_partition = "
                f"{intermediate_size} are multiples of it, or of its half >= {_LEAST_GROUP} and so on, "
                f"got {options.group_size}"
            )
        group, times = group // 2, 2 * times
    return group, times


def _parts(
    options: Options,
    shape: tuple[int, int, int],
    parts: int,
    per_shard: tuple[int, ...],
    group: int,
    dtype: str,
    names: tuple[str, str],
) -> dict[str, Spec]:
    """Codes of `shape`, whose rows are `parts` matrices, and what goes with them, by the last part of the name."""
    scheme, (experts, rows, columns) = options.scheme, shape
    codes_a_byte = 1 if options.scheme.startswith(("fp8", "int8")) else 2
    _divides("two codes share a byte", names[1], columns, codes_a_byte)
    packed = (experts, rows, columns // codes_a_byte)
    tensor, channel = {"quant_method": "tensor"}, {"quant_method": "channel"}
    made: dict[str, Spec] = {}
    if options.is_grouped or scheme == "int4_w4afp8":
        groups = 1 if group == -1 else columns // group
        attributes = {"quant_method": "group", "is_transposed": False} if options.is_grouped else {}
        if options.is_grouped:
            made[options.codes] = Spec(packed, "uint8", 0, attributes)
        else:
            _divides("eight codes share four bytes", names[1], columns, 8)
            made[options.codes] = Spec((experts, rows, columns // 8), "int32")
        made[options.scale] = Spec((experts, rows, groups), dtype, 0, {"quant_method": "group", **attributes})
        if options.has_zero_points:
            _divides("two zero points share a byte", names[0], rows, codes_a_byte)
            made["qzeros"] = Spec((experts, rows // codes_a_byte, groups), "uint8", 0, attributes)
    elif scheme.startswith("mxfp4"):
        made[options.codes] = Spec(packed, "uint8")
        made[options.scale] = Spec((experts, rows, -(-columns // 32)), "uint8", 0, {"quant_method": "group"})
    elif scheme.startswith("nvfp4"):
        made[options.codes] = Spec(packed, "uint8")
        block = {"quant_method": "block"}
        made[options.scale] = Spec((experts, rows, -(-columns // 16)), "float8_e4m3fn", 0, block)
        made["weight_scale_2"] = Spec(per_shard, "float32", 1, tensor)
        if "input_scale" in options.others:
            made["input_scale"] = Spec(per_shard, "float32", 1, tensor)
    else:
        made[options.codes] = Spec(packed, "float8_e4m3fn" if scheme.startswith("fp8") else "int8")
        if options.block_shape is not None:
            down, across = options.block_shape
            blocks = (experts, parts * -(-(rows // parts) // down), -(-columns // across))
            made[options.scale] = Spec(blocks, "float32", 1, {"quant_method": "block"})
        elif scheme == "int8_w8a16":
            made[options.scale] = Spec((experts, rows), "float32", 0, channel)
        elif options.per_out_ch_quant:
            made[options.scale] = Spec((experts, rows, 1), "float32", 1, channel)
        else:
            made[options.scale] = Spec(per_shard, "float32", 1, tensor)
    if options.static_activations:
        made["input_scale"] = Spec((experts,), "float32", 1, tensor)
    return made


def _block(block_shape: Sequence[int] | None) -> list[int] | None:
    if block_shape is None:
        return None
    try:
        sizes = [operator.index(size) for size in block_shape]
    except TypeError:
        raise TypeError(f"block_shape must be two ints [rows, columns], got {block_shape!r}") from None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"block_shape must be [rows, columns], each >= 1, got {sizes}")
    return sizes


def _divides(why: str, name: str, size: int, factor: int) -> None:
    if size % factor:
        raise ValueError(f"{name} must be a multiple of {factor}, because {why}, got {size}")


def _absent(name: str) -> Any:
    return None if name in ("block_shape", "group_size") else False
