"""The experts of one layer of a checkpoint, stacked: plain ones, and codes with all that goes with them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _arrays, _check, _packing, _stored
from cumoe._arrays import Array
from cumoe._checkpoint_8bit import from_compressed_tensors_fp8, from_compressed_tensors_int8, from_deepseek_fp8
from cumoe._checkpoint_formats import StoredFormat
from cumoe._checkpoint_fp4 import from_gpt_oss_mxfp4
from cumoe._checkpoint_int4 import from_awq, from_gptq
from cumoe._checkpoint_packed import from_compressed_tensors_packed
from cumoe._checkpoint_tensors import FLOATS, Tensors
from cumoe._prepare import PreparedExperts, prepare
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import GroupShape
from cumoe._quantised_layer_config import codes_of, config_of, nvfp4_config
from cumoe._schemes import Quantized
from cumoe.config import biased_moe_quant_config

Parts = dict[str, np.ndarray]
Loaded = tuple[PreparedExperts, Any, FusedMoEQuantConfig | None]  # experts, dtype of their tokens, config


@dataclass(frozen=True)
class Site:
    """Where experts are in a checkpoint that has one set of tensors a projection, and their sizes."""

    tensors: Tensors
    names: list[list[str]]  # of each expert: gate, up and down projection
    hidden_size: int
    intermediate_size: int
    activation: str
    dtype: Any  # of the tokens; None: that of the first expert

    def is_plain(self) -> bool:
        """Whether these are floats: a quantised checkpoint may leave modules as they are."""
        return self.tensors.kind(f"{self.names[0][0]}.weight") in FLOATS

    def require(self, parts: tuple[str, ...]) -> None:
        """Raise unless all projections have these tensors."""
        self.tensors.require([f"{name}.{part}" for expert in self.names for name in expert for part in parts])


@dataclass(frozen=True)
class FusedSite:
    """Where experts are in a checkpoint that has one set of tensors a product, and their sizes."""

    tensors: Tensors
    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    dtype: Any


def plain_experts(xp: ModuleType, site: Site) -> Loaded:
    """Experts of floats, one key a projection."""
    H, I, E = site.hidden_size, site.intermediate_size, len(site.names)
    site.require(("weight",))
    read, dtype = site.tensors.read, site.dtype
    if dtype is None:
        dtype = read(f"{site.names[0][0]}.weight", "(I, H)", (I, H)).dtype
    w1, w2 = np.empty((E, 2 * I, H), dtype), np.empty((E, H, I), dtype)
    for e, (gate, up, down) in enumerate(site.names):
        w1[e, :I] = read(f"{gate}.weight", "(I, H)", (I, H), dtype=dtype)
        w1[e, I:] = read(f"{up}.weight", "(I, H)", (I, H), dtype=dtype)
        w2[e] = read(f"{down}.weight", "(H, I)", (H, I), dtype=dtype)
    return prepare(xp.asarray(w1), xp.asarray(w2), activation=site.activation), dtype, None


def fused_experts(xp: ModuleType, site: FusedSite, epilogue: dict[str, Any]) -> Loaded:
    """Experts of floats, one key a product, either way round."""
    E, H, I = site.num_experts, site.hidden_size, site.intermediate_size
    names = f"{site.name}.gate_up_proj", f"{site.name}.down_proj"
    site.tensors.require(list(names))
    straight, swapped = ((E, 2 * I, H), (E, H, I)), ((E, H, 2 * I), (E, I, H))
    w1 = site.tensors.read(names[0], "(E, 2I, H)", straight[0], swapped[0], dtype=site.dtype)
    w2 = site.tensors.read(names[1], "(E, H, I)", straight[1], swapped[1], dtype=w1.dtype)
    if (w1.shape, w2.shape) == swapped:
        w1, w2 = w1.transpose(0, 2, 1), w2.transpose(0, 2, 1)
    for name, array, letters, shape in zip(names, (w1, w2), ("(E, 2I, H)", "(E, H, I)"), straight, strict=True):
        _check.shape(f"tensor {name!r}", array, letters, shape)
    config = biased_moe_quant_config(**epilogue) if epilogue else None
    there = (xp.asarray(np.require(array, requirements="A")) for array in (w1, w2))
    return prepare(*there, activation=site.activation, quant_config=config), w1.dtype, config


def coded_experts(xp: ModuleType, site: Site, stored: StoredFormat) -> Loaded:
    """Experts of codes, one set of tensors a projection."""
    optional = tuple(part for part in stored.optional if f"{site.names[0][0]}.{part}" in site.tensors)
    site.require((*stored.tensors, *optional))
    H, I, E, read = site.hidden_size, site.intermediate_size, len(site.names), _READERS[stored.reader]
    weights: Parts = {}
    scale_dtype = None
    for e, names in enumerate(site.names):
        found: list[Parts] = []
        for name, n, k in zip(names, (I, I, H), (H, H, I), strict=True):
            found.append(read(Projection(site.tensors, name, n, k, scale_dtype), stored))
            scale_dtype = found[0]["scales"].dtype if "scales" in found[0] else None
        gate, up, down = found
        for part, first in gate.items():
            both = np.concatenate([first, up[part]]) if first.ndim else np.stack([first, up[part]])
            _put(weights, f"w13_{part}", e, E, both)
            _put(weights, f"w2_{part}", e, E, down[part])
    weights = _without_default_zeros(weights, stored)
    experts, config = _prepared(xp, stored, site.activation, weights, {})
    return experts, site.dtype, config


def gpt_oss_experts(xp: ModuleType, site: FusedSite, stored: StoredFormat, epilogue: dict[str, Any]) -> Loaded:
    """Experts in MXFP4, one set of tensors a product."""
    E, H, I = site.num_experts, site.hidden_size, site.intermediate_size
    products = ("w13", f"{site.name}.gate_up_proj", 2 * I, H), ("w2", f"{site.name}.down_proj", H, I)
    site.tensors.require([f"{name}_{part}" for _, name, _, _ in products for part in stored.tensors])
    weights: Parts = {}
    for prefix, name, rows, columns in products:
        _stored.multiple(f"tensor {f'{name}_blocks'!r}", "K", columns, 32)
        shape = E, rows, columns // 32
        blocks = site.tensors.read(f"{name}_blocks", "(E, N, K / 32, 16)", (*shape, 16), kinds=("U8",))
        scales = site.tensors.read(f"{name}_scales", "(E, N, K / 32)", shape, kinds=("U8",))
        quantized = from_gpt_oss_mxfp4(blocks, scales)
        # the config outlives the file
        weights |= {f"{prefix}_weight": quantized.values, f"{prefix}_weight_scale": quantized.scale.copy()}
    experts, config = _prepared(xp, stored, site.activation, weights, epilogue)
    return experts, site.dtype, config


def _on_side(xp: ModuleType, array: np.ndarray) -> Array:
    """An array of any dtype on a side; CuPy cannot convert what it holds as a label only."""
    return array if xp is np else xp.asarray(_arrays.bits(array)).view(array.dtype)


def _prepared(
    xp: ModuleType, stored: StoredFormat, activation: str, weights: Parts, others: dict[str, Any]
) -> tuple[PreparedExperts, FusedMoEQuantConfig]:
    there = {name: _on_side(xp, array) for name, array in weights.items()}
    if stored.reader == "nvfp4":
        config = nvfp4_config(stored.options, activation, there, others)
    else:
        config = config_of(stored.options, activation, there, others)
    w1, w2 = codes_of(stored.options, there)
    return prepare(w1, w2, quant_config=config, activation=activation), config


def _put(weights: Parts, name: str, e: int, num_experts: int, part: np.ndarray) -> None:
    if name not in weights:
        weights[name] = np.empty((num_experts, *part.shape), part.dtype)
    weights[name][e] = part


def _without_default_zeros(weights: Parts, stored: StoredFormat) -> Parts:
    """Leave out zero points that are all what none stand for: symmetric checkpoints store them too."""
    default = 0x88 if stored.bits == 4 else 0x80
    zeros = [name for name in weights if name.endswith("qzeros")]
    if all((weights[name] == default).all() for name in zeros):
        return {name: array for name, array in weights.items() if name not in zeros}
    return weights


# -- one projection ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A matrix of N rows and K columns in a checkpoint."""

    tensors: Tensors
    name: str
    n: int
    k: int
    scale_dtype: Any  # of the first expert; None: any

    def read(self, part: str, letters: str, *shapes: tuple[int, ...], kinds: tuple[str, ...], fix: str = "") -> Any:
        return self.tensors.read(f"{self.name}.{part}", letters, *shapes, kinds=kinds, fix=fix)

    def scales(self, part: str, letters: str, shape: tuple[int, ...]) -> Any:
        """Scales that stay in their dtype, which is one for all experts."""
        return self.tensors.read(f"{self.name}.{part}", letters, shape, dtype=self.scale_dtype)

    def number(self, part: str) -> Any:
        """A float32 for the matrix, ()."""
        return self.read(part, "()", (), (1,), kinds=("F32",)).reshape(()).copy()

    def divided(self, part: str, letter: str, size: int, by: int) -> int:
        """How many words, or groups, there are along an axis."""
        _stored.multiple(f"tensor {f'{self.name}.{part}'!r}", letter, size, by)
        return size // by

    def groups(self, part: str, group_size: int) -> int:
        """K / g."""
        return 1 if group_size == -1 else self.divided(part, "K", self.k, group_size)

    def check_order(self, part: str, groups: int) -> None:
        """Check the group of each column, where the checkpoint has it."""
        if f"{self.name}.{part}" in self.tensors:
            order = self.read(part, "(K,)", (self.k,), kinds=("I32", "I64"))
            _stored.check_order(np, f"tensor {f'{self.name}.{part}'!r}", order, (), self.k, self.k // groups)


def _gptq(at: Projection, stored: StoredFormat) -> Parts:
    per_word, groups = 32 // stored.bits, at.groups("scales", stored.group_size)
    shape = at.divided("qweight", "K", at.k, per_word), at.n
    qweight = at.read("qweight", f"(K / {per_word}, N)", shape, kinds=("I32",))
    scales, qzeros = at.scales("scales", "(K / g, N)", (groups, at.n)), None
    if f"{at.name}.qzeros" in at.tensors:
        shape = groups, at.divided("qzeros", "N", at.n, per_word)
        qzeros = at.read("qzeros", f"(K / g, N / {per_word})", shape, kinds=("I32",))
    at.check_order("g_idx", groups)
    return _grouped(from_gptq(qweight, scales, qzeros, bits=stored.bits, checkpoint_format=stored.checkpoint_format))


def _awq(at: Projection, stored: StoredFormat) -> Parts:
    groups = at.groups("scales", stored.group_size)
    words = at.divided("qweight", "N", at.n, 8)
    qweight = at.read("qweight", "(K, N / 8)", (at.k, words), kinds=("I32",))
    scales, qzeros = at.scales("scales", "(K / g, N)", (groups, at.n)), None
    if f"{at.name}.qzeros" in at.tensors:
        qzeros = at.read("qzeros", "(K / g, N / 8)", (groups, words), kinds=("I32",))
    at.divided("qweight", "K", at.k, 2)
    return _grouped(from_awq(qweight, scales, qzeros))


def _packed(at: Projection, stored: StoredFormat) -> Parts:
    per_word, groups = 32 // stored.bits, at.groups("weight_scale", stored.group_size)
    shape = at.n, at.divided("weight_packed", "K", at.k, per_word)
    packed = at.read("weight_packed", f"(N, K / {per_word})", shape, kinds=("I32",))
    scale, zeros = at.scales("weight_scale", "(N, K / g)", (at.n, groups)), None
    if "weight_zero_point" in stored.tensors:
        at.divided("weight_zero_point", "N", at.n, 8 // stored.bits)
        shape = -(-at.n * stored.bits // 32), groups
        zeros = at.read("weight_zero_point", f"(ceil(N / {per_word}), K / g)", shape, kinds=("I32",))
    at.check_order("weight_g_idx", groups)
    return _grouped(from_compressed_tensors_packed(packed, scale, zeros, bits=stored.bits))


def _grouped(quantized: Quantized) -> Parts:
    parts = {"qweight": quantized.values, "scales": quantized.scale}
    return parts if quantized.zero_points is None else parts | {"qzeros": quantized.zero_points}


def _bytes(at: Projection, stored: StoredFormat) -> Parts:
    """A code a byte: int8 and fp8 of compressed-tensors, and DeepSeek's blocks."""
    options, is_fp8 = stored.options, stored.options.scheme.startswith("fp8")
    weight = at.read("weight", "(N, K)", (at.n, at.k), kinds=("F8_E4M3",) if is_fp8 else ("I8",))
    part = next(part for part in stored.tensors if part.startswith("weight_scale"))
    shared, letters, shapes = _sharing(at, stored, part)
    kinds = (*FLOATS, "F8_E8M0", "U8") if part == "weight_scale_inv" else FLOATS
    scale = at.read(part, letters, *shapes, kinds=kinds).reshape(shapes[0])
    if "weight_zero_point" in stored.tensors:
        zeros = at.read("weight_zero_point", letters, *shapes, kinds=("I8",)).reshape(shapes[0])
        quantized = from_compressed_tensors_int8(weight, scale, shared, weight_zero_point=zeros)
        return {name: _by_row(array, at.n) for name, array in _grouped(quantized).items()}
    if part == "weight_scale_inv":
        quantized = from_deepseek_fp8(weight, scale, weight_block_size=shared)
    else:
        quantized = (from_compressed_tensors_fp8 if is_fp8 else from_compressed_tensors_int8)(weight, scale, shared)
    scale = quantized.scale.reshape(()) if stored.strategy == "tensor" else quantized.scale
    if options.scheme == "int8_w8a16" and stored.strategy == "channel":
        scale = scale[:, 0]
    parts = {options.codes: quantized.values, options.scale: scale}
    return parts | ({"input_scale": at.number("input_scale")} if "input_scale" in stored.tensors else {})


def _sharing(at: Projection, stored: StoredFormat, part: str) -> tuple[GroupShape, str, list[tuple[int, ...]]]:
    """What shares a scale, and the shapes of those."""
    if stored.strategy == "tensor":
        return GroupShape.PER_TENSOR, "(1,)", [(1,), (), (1, 1)]
    if stored.strategy == "channel":
        return GroupShape.PER_TOKEN, "(N, 1)", [(at.n, 1), (at.n,)]
    if stored.strategy == "group":
        return GroupShape(1, stored.group_size), "(N, K / g)", [(at.n, at.groups(part, stored.group_size))]
    rows, columns = stored.options.block_shape or (1, 1)
    letters = f"(ceil(N / {rows}), ceil(K / {columns}))"
    return GroupShape(rows, columns), letters, [(-(-at.n // rows), -(-at.k // columns))]


def _by_row(array: np.ndarray, n: int) -> np.ndarray:
    """What a matrix has one of, one a row."""
    return array if len(array) == n else np.repeat(array, n, axis=0)


def _modelopt(at: Projection, stored: StoredFormat) -> Parts:
    parts = _fp4_codes(at, "weight")
    return parts | {part: at.number(part) for part in ("weight_scale_2", "input_scale")}


def _nvfp4(at: Projection, stored: StoredFormat) -> Parts:
    parts = _fp4_codes(at, "weight_packed")
    return parts | {part: at.number(part) for part in stored.tensors if part.endswith("global_scale")}


def _fp4_codes(at: Projection, name: str) -> Parts:
    codes = at.read(name, "(N, K / 2)", (at.n, at.divided(name, "K", at.k, 2)), kinds=("U8",))
    shape = at.n, -(-at.k // 16)
    fix, blocks = "", _packing.swizzled_sizes(*shape)
    if at.tensors.shape(f"{at.name}.weight_scale") == blocks:
        fix = "these look swizzled: read them by from_modelopt_nvfp4(..., is_scale_swizzled=True)"
    scale = at.read("weight_scale", "(N, ceil(K / 16))", shape, kinds=("F8_E4M3",), fix=fix)
    return {"weight": codes, "weight_scale": scale}


_READERS: dict[str, Callable[[Projection, StoredFormat], Parts]] = {
    "awq": _awq,
    "bytes": _bytes,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "nvfp4": _nvfp4,
    "packed": _packed,
}
