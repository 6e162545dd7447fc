"""Launcher of grouped_gemm_wgmma.cu: which tile serves which sizes, shared memory, tensor maps."""

import math
from typing import NamedTuple

from cumoe.rawkernels import _load, _tensor_maps

_BLOCK_K = 64
_SHARED_BYTES = 227 << 10  # of one CTA
_SM_BYTES = 228 << 10  # of all CTAs of a multiprocessor, each of which takes one KiB more than it asks for
_MANY_TILES = 1500  # from here on, CTAs that stay cost less than one CTA a tile


class Tile(NamedTuple):
    """Constants of one compiled kernel."""

    tokens: int  # rows of a tile of the schedule
    swapped: bool  # weights on the 64-row side of the instruction, tokens on the other
    m_blocks: int  # 64-row steps of a warpgroup
    columns: int  # the other side
    groups: int = 2  # warpgroups that multiply
    ctas: int = 1  # of a multiprocessor
    pingpong: bool = False

    @property
    def weights(self):
        """Weight rows of a tile."""
        return 64 * self.m_blocks * self.groups if self.swapped and not self.pingpong else (
            64 * self.m_blocks if self.swapped else self.columns
        )

    def constants(self, dtype, activation, gathered, biased=False, scaled=False, limited=False):
        """Macros of the kernel."""
        gated = bool(activation) and not activation.endswith("_no_mul")
        small = self.ctas > 1
        producer, consumer = (0, 0) if small else (56, 224) if gathered else (40, 232)
        return {
            "X": dtype,
            "WGMMA_TYPE": '"bf16"' if dtype == "bfloat16" else '"f16"',
            "ACTIVATED": int(bool(activation)),
            "ACTIVATION": activation or "identity",
            "GATED": int(gated),
            "BIASED": int(biased),
            "SCALED": int(scaled),
            "LIMITED": int(limited),
            "SWAPPED": int(self.swapped),
            "GATHERED": int(gathered),
            "PINGPONG": int(self.pingpong),
            "M_BLOCKS": self.m_blocks,
            "COLUMNS": self.columns,
            "GROUPS": self.groups,
            "MIN_CTAS": self.ctas,
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }

    def staging_bytes(self, gated):
        """Shared memory through which results leave; twin of STAGING in the kernel."""
        if not self.swapped:
            return self.groups * 2 * 8192
        tokens = self.columns if self.columns < 64 else 32 if self.columns % 64 else 64
        return self.groups * tokens * (32 if gated else 64) * self.m_blocks * 2

    def stage_bytes(self):
        """One buffer of the ring."""
        rows = 64 * self.m_blocks * (1 if self.pingpong else self.groups)
        return (rows + self.columns) * 2 * _BLOCK_K


def mean_rows(num_pairs, num_experts):
    """Rows of an expert that has any, under uniform routing."""
    hit = num_experts * -math.expm1(-num_pairs / num_experts)
    return num_pairs / hit if num_pairs else 0.0


def choose(num_pairs, num_experts):
    """Tiles of the first and the second product."""
    mean = mean_rows(num_pairs, num_experts)
    most = mean + 3 * math.sqrt(mean)
    if most <= 8 or num_pairs <= 8:
        tile = Tile(8, True, 1, 8, groups=1, ctas=3)
        return tile, tile
    if most <= 16:
        tile = Tile(16, True, 1, 16, ctas=2)
        return tile, tile
    if most <= 34:
        tile = Tile(32, True, 1, 32, ctas=2)
        return tile, tile
    if mean <= 100:
        tile = Tile(96, True, 2, 96)
        return tile, tile
    return Tile(128, True, 2, 128), Tile(128, True, 2, 128, pingpong=True)


def refusal(x, weights, input_scale, out):
    """Why these arrays need another kernel, or None."""
    if input_scale.size:
        return "the weight of a choice goes on the input"
    if x.shape[1] % 8 or out.shape[1] % 8:
        return f"H and I must be multiples of 8, got {x.shape[1]} and {out.shape[1]}"
    addresses = x.data.ptr | weights.data.ptr | out.data.ptr | weights.strides[0] | weights.strides[1]
    if addresses % 16 or weights.strides[2] != weights.itemsize:
        return "rows must begin at multiples of 16 bytes"
    return None


def launch(
    tile, x, permuted_idx, top_k, weights, bias, output_scale, activation, interleaved, alpha, beta, limit, dtype,
    schedule, out,
):
    """Run the product with `tile`; the arguments are those of `grouped_gemm`."""
    import cupy as cp

    gated = bool(activation) and not activation.endswith("_no_mul")
    gathered = top_k > 0
    (num_experts, n, k), (rows, outputs) = weights.shape, out.shape
    constants = tile.constants(
        dtype, activation, gathered, bias.size > 0, output_scale.size > 0, bool(activation) and limit != math.inf
    )
    kernel = _load.kernel("grouped_gemm_wgmma.cu", "grouped_gemm", **constants)

    blocks = -(-n // tile.weights)
    units = (min(rows, num_experts) + rows // tile.tokens) * blocks
    processors = _load.multiprocessors(x.device.id)
    grid = units if tile.ctas > 1 and units <= _MANY_TILES else min(units, processors * tile.ctas)
    k_blocks = -(-k // _BLOCK_K)
    fixed = 1024 + tile.staging_bytes(gated) + 16 + tile.groups * tile.columns * 4
    ctas = 1 if grid <= processors else tile.ctas
    room = min(_SHARED_BYTES, _SM_BYTES // ctas - 1024) - fixed
    stages = room // (tile.stage_bytes() + 16)
    if grid == units:  # no further tile fills the ring
        stages = max(2, min(stages, k_blocks))
    shared = fixed + stages * (tile.stage_bytes() + 16)
    item = weights.itemsize
    map_w = _tensor_maps.weights_map(
        weights.data.ptr, (num_experts, n, k), weights.strides[:2], gated, interleaved, tile.weights
    )
    map_x = _tensor_maps.rows_map(x.data.ptr, *x.shape, tile.tokens)
    map_out = _tensor_maps.rows_map(out.data.ptr, rows, outputs, 64)
    # the second product of a layer: its schedule was made before the kernel that runs before this one
    ahead = not gathered and permuted_idx.size > 0
    kernel(
        grid, 128 + 128 * tile.groups,
        map_x, map_w, map_out, schedule, permuted_idx if permuted_idx.size else None, x,
        bias if bias.size else None, output_scale if output_scale.size else None, out,
        blocks, k, outputs, int(interleaved), top_k, stages, int(ahead), cp.float32(alpha), cp.float32(beta),
        cp.float32(limit),
        shared=shared, overlap=True,
    )
