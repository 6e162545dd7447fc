"""
Quantised weights for public grids, drawn from small pools.

Codes and scales are windows into the pools, a window for each expert, so that nothing is quantised and no two experts
are equal. Some experts of a layer are *known*: the law has their numbers.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from sides import bits, on

import cumoe
from cumoe.reference import formats, quantised

KNOWN = 8
MOST = 288  # experts of a layer
STEP = 4099  # between the windows of two experts
PERIOD = 1_000_003  # a prime: no row of a matrix begins as another one
POOL = 1 << 22  # of scales and zero points
TENSOR, ROW, BLOCK = (-1, -1), (1, -1), (128, 128)

# root mean square of the numbers that codes stand for
SIZE = {"fp8": 448 / 5, "int8": 73.9, "uint8": 73.9, "int4": 4.6, "mxfp4": 2.93, "nvfp4": 2.93}
CODES = {"fp8": "float8_e4m3fn", "int8": "int8"}
PACKED = ("int4", "mxfp4", "nvfp4")


class Kind(NamedTuple):
    """A scheme: how weights and activations are quantised, and the config that says so."""

    rule: str  # of the codes of the weights
    group: tuple  # (rows, columns) that share a scale, -1 for all
    build: object  # (w1, w2, **more) -> config; the weights have `scale`, `zeros`, `alpha`
    rows: tuple | None = None  # scheme and columns of a group of activations
    per_tensor: str = ""  # "static", or "dynamic" for the second product
    zeros: bool = False
    scale_dtype: str = "float32"
    alphas: str = ""  # "expert", "channel"


class Drawn(NamedTuple):
    """The parts of a quantised weight on a side."""

    codes: object
    scale: object
    zeros: object
    alpha: object


@functools.cache
def period(what):
    """`PERIOD` codes or numbers."""
    rng = np.random.default_rng(len(what))
    if what == "bytes":
        return rng.integers(0, 256, PERIOD, np.uint8)
    if what == "uniform":
        return rng.random(PERIOD, np.float32)
    numbers = rng.standard_normal(PERIOD, np.float32)
    if what == "normal":
        return numbers
    assert what == "fp8"  # as of numbers of which the largest are five times the usual ones
    return np.clip(numbers * np.float32(448 / 5), -448, 448).astype("float8_e4m3fn").view(np.uint8)


@functools.lru_cache(maxsize=4)
def long_pool(what, size):
    """The numbers again and again."""
    return np.resize(period(what), size)


@functools.lru_cache(maxsize=2)
def scale_pool(rule, size, dtype):
    """Scales of codes, about `size`; of nvfp4, which has another scale besides, about 6."""
    uniform = long_pool("uniform", POOL)
    if rule == "mxfp4":
        return (127 + np.round(np.log2(size)) + np.floor(3 * uniform) - 1).astype(np.uint8)
    if rule == "nvfp4":  # codes of 1 to 15
        return (0x38 + np.floor(32 * uniform)).astype(np.uint8)
    return ((uniform + np.float32(0.5)) * np.float32(size)).astype(dtype)


class Matrix:
    """One weight (E, n, k) of a layer, whose numbers have the root mean square `size`."""

    def __init__(self, kind, n, k, size, which):
        self.kind, self.n, self.k, self.first = kind, n, k, which * 50_021
        packed, (rows, cols) = kind.rule in PACKED, kind.group
        self.rows, self.cols = (n if rows == -1 else rows), (k if cols == -1 else cols)
        groups = -(-n // self.rows), -(-k // self.cols)
        count = n * k // 2 if packed else n * k
        length = 1 << (count + self.first + (KNOWN + MOST) * STEP).bit_length()
        codes = long_pool("fp8" if kind.rule == "fp8" else "bytes", length)
        self.parts = {"codes": (codes, (n, k // 2 if packed else k))}
        size = float(size / SIZE[kind.rule] / (2**0.5 if kind.zeros else 1))
        scale = scale_pool(kind.rule, 1.0 if kind.alphas == "channel" else size, kind.scale_dtype)
        self.parts["scale"] = (scale, groups)
        if kind.zeros:
            packed_rows = n // 2 if kind.rule == "int4" else n
            self.parts["zeros"] = (long_pool("bytes", POOL), (packed_rows, groups[1]))
        if kind.alphas:
            by = np.float32(size / 6 if kind.rule == "nvfp4" else size)  # block scales of nvfp4 are about 6
            alpha = (long_pool("uniform", POOL) + np.float32(0.5)) * by
            self.parts["alpha"] = (alpha, (n,) if kind.alphas == "channel" else ())

    def window(self, part, expert, pool=None):
        """Part of an expert, on the host or of a copy of the pool."""
        own, shape = self.parts[part]
        start, count = self.first + expert * STEP, int(np.prod(shape))
        assert start + count <= len(own)
        return (own if pool is None else pool)[start : start + count].reshape(shape)

    def put(self, xp, slots, num_experts):
        """`num_experts` experts on a side, known ones at `slots`; the host leaves zeros where the others are."""
        found = dict.fromkeys(Drawn._fields)
        known = {int(slot): i for i, slot in enumerate(slots)}
        for part, (pool, shape) in self.parts.items():
            if xp is np:
                array = np.zeros((num_experts, *shape), pool.dtype)
                for slot, i in known.items():
                    array[slot] = self.window(part, i)
            else:
                there = on(xp, bits(pool))
                array = xp.empty((num_experts, *shape), there.dtype)
                for e in range(num_experts):
                    array[e] = self.window(part, known.get(e, KNOWN + e), there)
                array = array.view(pool.dtype)
            found[part] = array
        found["codes"] = found["codes"].view(CODES.get(self.kind.rule, "uint8"))
        return Drawn(**found)

    def weights(self, i, first, last):
        """Rows first..last-1 of a known expert in the words of the law."""
        parts = {part: self.window(part, i)[None] for part in self.parts}
        codes, scale, zeros = parts["codes"][:, first:last], parts["scale"], parts.get("zeros")
        codes = formats.unpack(codes, -1) if self.kind.rule in PACKED else codes
        codes = codes.view(np.int8) if self.kind.rule == "int8" else codes
        if zeros is not None:
            zeros = (formats.unpack(zeros, 1) if self.kind.rule == "int4" else zeros)[:, first:last]
        factor, rows = np.empty((0, 0)), self.rows
        if scale.shape[2] == 1 and self.kind.rule not in ("mxfp4", "nvfp4"):
            # scales that do not change along K meet the sum
            factor = np.repeat(scale[:, :, 0].astype(np.float64), rows, axis=1)[:, first:last]
            scale, rows = np.empty((0, 0, 0)) if zeros is None else np.ones(zeros.shape), 1
        else:
            scale = scale[:, first // rows : -(-last // rows)]
        if "alpha" in parts:
            alpha = parts["alpha"]
            alpha = alpha[:, first:last] if self.kind.alphas == "channel" else alpha[:, None]
            factor = factor.astype(np.float32) * alpha if factor.size else alpha
        return quantised.Weights(self.kind.rule, codes, scale, zeros, rows, self.cols, factor)


def of_scales(builder, **fixed):
    """A builder that takes the scales of both weights."""
    return lambda w1, w2, **more: builder(w1.scale, w2.scale, **fixed, **more)


def of_groups(builder, **fixed):
    """A builder that takes scales and zero points."""
    return lambda w1, w2, **more: builder(w1.scale, w2.scale, w1_zp=w1.zeros, w2_zp=w2.zeros, **fixed, **more)


def of_alphas(builder, **fixed):
    """A builder that takes scales and factors."""
    return lambda w1, w2, **more: builder(
        w1_scale=w1.scale, w2_scale=w2.scale, g1_alphas=w1.alpha, g2_alphas=w2.alpha, **fixed, **more
    )


def flat(builder, **fixed):
    """A builder that takes scales of rows without their last axis."""
    return lambda w1, w2, **more: builder(w1.scale[..., 0], w2.scale[..., 0], **fixed, **more)


fp8, int8 = cumoe.fp8_w8a8_moe_quant_config, cumoe.int8_w8a8_moe_quant_config
int8_block = functools.partial(cumoe.FusedMoEQuantConfig.make, "int8")
TOKEN, CHANNEL = {"per_act_token_quant": True}, {"per_out_ch_quant": True}
GROUPS = {"scale_dtype": "bfloat16"}


def grouped(bits, group, zeros):
    """Weights of 4 or 8 bits in groups."""
    rule, builder = (
        ("int4", cumoe.int4_w4a16_moe_quant_config) if bits == 4 else ("uint8", cumoe.int8_w8a16_moe_quant_config)
    )
    return Kind(rule, (1, group), of_groups(builder, block_shape=[0, group]), zeros=zeros, **GROUPS)


def in_groups(bits, group, zeros):
    """Name of such a kind."""
    return f"{bits} bits, {group}{', zero points' * zeros}"


def int8_make(w1, w2, **more):
    """Build a config that has no builder of its own."""
    return int8_block(w1_scale=w1.scale, w2_scale=w2.scale, block_shape=[128, 128], **more)


KINDS = {
    **{in_groups(*parts): grouped(*parts) for parts in itertools.product((4, 8), (32, 64, 128), (False, True))},
    "4 bits, channel": Kind("int4", ROW, of_groups(cumoe.gptq_marlin_moe_quant_config, weight_bits=4, group_size=-1)),
    "fp8 block": Kind("fp8", BLOCK, of_scales(fp8, block_shape=[128, 128]), ("fp8", 128)),
    "int8 block": Kind("int8", BLOCK, int8_make, ("int8", 128)),
    "fp8 token, channel": Kind("fp8", ROW, of_scales(fp8, **TOKEN, **CHANNEL), ("fp8", -1)),
    "fp8 token, channel in 2-D": Kind("fp8", ROW, flat(fp8, **TOKEN), ("fp8", -1)),
    "fp8 token, tensor": Kind("fp8", TENSOR, of_scales(fp8, **TOKEN), ("fp8", -1)),
    "fp8 static, channel": Kind("fp8", ROW, of_scales(fp8, **CHANNEL), ("fp8", -1), "static"),
    "fp8 static, tensor": Kind("fp8", TENSOR, of_scales(fp8), ("fp8", -1), "static"),
    "fp8 dynamic, channel": Kind("fp8", ROW, of_scales(fp8, **CHANNEL), ("fp8", -1), "dynamic"),
    "fp8 dynamic, tensor": Kind("fp8", TENSOR, of_scales(fp8), ("fp8", -1), "dynamic"),
    "int8 token, channel": Kind("int8", ROW, of_scales(int8, **TOKEN), ("int8", -1)),
    "fp8 w8a16 channel": Kind("fp8", ROW, flat(cumoe.fp8_w8a16_moe_quant_config)),
    "fp8 w8a16 block": Kind("fp8", BLOCK, of_scales(cumoe.fp8_w8a16_moe_quant_config, block_shape=[128, 128])),
    "int8 w8a16 channel": Kind("int8", ROW, flat(cumoe.int8_w8a16_moe_quant_config)),
    "nvfp4": Kind("nvfp4", (1, 16), of_alphas(cumoe.nvfp4_moe_quant_config), ("nvfp4", 16), alphas="expert"),
    "nvfp4 w4a16": Kind("nvfp4", (1, 16), of_alphas(cumoe.nvfp4_w4a16_moe_quant_config), alphas="expert"),
    "mxfp4": Kind("mxfp4", (1, 32), of_scales(cumoe.mxfp4_w4a16_moe_quant_config)),
    "mxfp4 mxfp8": Kind("mxfp4", (1, 32), of_scales(cumoe.mxfp4_mxfp8_moe_quant_config), ("mxfp8", 32)),
    "int4 w4a8": Kind(
        "int4",
        (1, 128),
        of_alphas(cumoe.int4_w4afp8_moe_quant_config, **TOKEN),
        ("fp8", -1),
        scale_dtype="float8_e4m3fn",
        alphas="channel",
    ),
}
