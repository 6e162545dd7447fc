"""Launcher of grouped_gemm_wgmma.cu: which tile serves which sizes, shared memory, tensor maps."""

import math
from typing import NamedTuple

import numpy as np

from cumoe.rawkernels import _coded_weights, _load, _tensor_maps

BLOCK_K = _tensor_maps.BLOCK_K
_CTA_BYTES = 227 << 10  # shared memory of one CTA
_PROCESSOR_BYTES = 228 << 10  # of all CTAs of a multiprocessor, each of which takes one KiB more than it asks for
_MANY_UNITS = 1500  # from here on, CTAs that stay cost less than one CTA a unit
_FEW_ROWS = 32  # of a tile, up to which several CTAs share a multiprocessor
_SMALL_MATRIX = 1 << 22  # weights of an expert's second product: up to here the deeper ring of a smaller tile pays
_MOST_GATHERED = 2**32 * 8  # elements of the rows that are gathered, counted by eights in 32 bits
_KEPT_BYTES = 20 << 20  # of the rows that are gathered, which L2 keeps although weights stream by
_MOST_CODED = 160  # rows of a tile: sums that leave registers for a warpgroup that decodes
_CODED_REGISTERS = {2: (40, 96, 56), 3: (32, 88, 48)}  # by CTAs of a multiprocessor: producers, decoders, consumers
# of sums in parts, likewise: where scales stay with the codes, those who decode need more of them
_PARTED_REGISTERS = {1: ((48, 96, 184), (32, 96, 64), (32, 88, 48)), 2: ((48, 80, 192), (32, 80, 72), (32, 88, 48))}
_CODED_STAGES = 3  # of numbers; codes have the memory that is left
_MOST_TOGETHER = 16  # tiles of one expert that go through a block of weights while it is in L2


class Tile(NamedTuple):
    """Constants of one compiled kernel: weights on the 64-row side of the instruction, tokens on the other."""

    tokens: int  # rows of a tile of the schedule
    m_blocks: int  # 64 weight rows each, of a warpgroup
    groups: int  # warpgroups that multiply
    ctas: int  # of a multiprocessor

    @property
    def weights(self):
        """Weight rows of a tile."""
        return 64 * self.m_blocks * self.groups

    @property
    def stage_bytes(self):
        """One buffer of the ring, with its two barriers."""
        return (self.weights + self.tokens) * 2 * BLOCK_K + 16

    def code_bytes(self, rule):
        """One buffer of codes, with its two barriers."""
        return self.weights * BLOCK_K * _coded_weights.BITS[rule] // 8 + 16 if rule else 0

    def fixed_bytes(self, gated, gathered, scaled, factored, parted):
        """Shared memory beside the rings: results on their way out, what is announced of two units."""
        staged = 16 if self.tokens % 16 == 0 else 8  # tokens of a warp at a time
        staging = 4 * self.groups * staged * (8 if gated else 16) * self.m_blocks * 2
        factors = 2 * self.groups * -(-self.tokens // 16) * 64 if parted else 0
        return staging + 96 + 2 * self.tokens * 4 * (gathered + scaled + (factored or bool(parted))) + factors


# Few rows of an expert: many small CTAs keep memory busy. More: large tiles, which read each operand less often; the
# width that just covers the rows wins (benchmarks/NOTES.md).
_TILES = {
    tile.tokens: tile
    for tile in (
        Tile(8, 1, 1, 3),
        Tile(16, 1, 2, 2),
        Tile(32, 1, 2, 2),
        *(Tile(tokens, 2, 2, 1) for tokens in (96, 112, 144, 160, 176, 192)),
    )
}
_HEIGHTS = {  # by whether weights are codes, and whether sums of parts stand beside those of all parts
    (False, False): tuple(_TILES),
    (True, False): tuple(rows for rows in _TILES if rows <= _MOST_CODED),
    (False, True): (8, 16, 32, 96, 144, 160),
    (True, True): (8, 16, 32, 96, 144),
}


def _tile(rows, parted):
    """The tile of that many rows; of sums in parts, which need as many registers again, one M block."""
    return _TILES[rows]._replace(m_blocks=1) if parted else _TILES[rows]


def mean_rows(num_pairs, num_experts):
    """Rows of an expert that has any, if they fall evenly."""
    return num_pairs / (num_experts * -math.expm1(-num_pairs / num_experts)) if num_pairs else 0.0


def heights(coded, parted):
    """Rows that a tile may have: of weights which are codes, of sums that are scaled part by part."""
    return _HEIGHTS[bool(coded), bool(parted)]


def block_rows(num_pairs, num_experts, hidden_size, intermediate_size, coded, parted):
    """Rows of a tile: the least that covers nearly every expert, or nearly every half; else one of the largest."""
    tiles = heights(coded, parted)
    mean = mean_rows(num_pairs, num_experts)
    most = mean + 2.5 * math.sqrt(mean) if mean > 1 else 1
    if most <= _FEW_ROWS:
        return next((rows for rows in tiles if rows >= most), _FEW_ROWS)
    most = mean + 2 * math.sqrt(mean)
    for parts in (1, 2):
        for rows in tiles:
            if _FEW_ROWS < rows and most <= rows * parts:
                return rows
    return tiles[-2 if hidden_size * intermediate_size <= _SMALL_MATRIX and not coded and not parted else -1]


def launch(
    x,
    permuted_idx,
    top_k,
    input_scale,
    weights,
    weight_format,
    bias,
    output_scale,
    row_factor,
    column_factor,
    activation,
    interleaved,
    alpha,
    beta,
    limit,
    dtype,
    kernel,
    schedule,
    block_rows,
    ahead,
    out,
):
    """
    Run the product; the arguments are those of `grouped_gemm`, with an empty `input_scale` and `kernel` "wgmma".

    With `ahead`, the schedule is older than the kernel that runs before this one: weights are loaded meanwhile.
    """
    (num_experts, n, _), (rows, outputs), k = weights.shape, out.shape, x.shape[1]
    if rows == 0:
        return
    parted = _coded_weights.parted(weight_format, k)
    tile = _tile(block_rows, parted)
    gathered, scaled, limited = top_k > 0, output_scale.size > 0, bool(activation) and limit != math.inf
    factored = (not parted and row_factor.size) + column_factor.size > 0
    if gathered and x.size > _MOST_GATHERED:
        raise NotImplementedError(f"no kernel for tokens of {x.size} elements; wgmma: at most {_MOST_GATHERED}")
    rule, group_cols = _coded_weights.of_format(weight_format, k)
    of_codes = _coded_weights.constants(rule, group_cols, parted)
    beside, (*groups, part) = _coded_weights.arguments(weight_format, n, k)
    of_codes["PART_BLOCKS"] = 1 if parted and part % (2 * BLOCK_K) else 2
    constants = _constants(tile, dtype, activation, gathered, bias.size > 0, scaled, limited, factored, of_codes)
    gated = bool(constants["GATED"])
    fixed_bytes = tile.fixed_bytes(gated, gathered, scaled, factored, parted)

    blocks = -(-n // tile.weights)
    full = min(rows, num_experts)  # experts that may have a tile, and the tiles beyond the first of each
    units = (full + (rows - full) // tile.tokens) * blocks
    processors = _load.multiprocessors(x.device.id)
    grid = units if tile.ctas > 1 and units <= _MANY_UNITS else min(units, processors * tile.ctas)
    ctas = min(tile.ctas, -(-grid // processors))
    ring_bytes = min(_CTA_BYTES, _PROCESSOR_BYTES // ctas - 1024) - fixed_bytes
    most_stages = max(2, -(-k // BLOCK_K)) if grid == units else ring_bytes  # no further unit will fill the ring
    stages, code_stages = min(ring_bytes // tile.stage_bytes, most_stages), 0
    code_bytes = tile.code_bytes(rule)
    if rule:
        stages = min(stages, _CODED_STAGES)
        code_stages = min((ring_bytes - stages * tile.stage_bytes) // code_bytes, most_stages)
    together = min(_MOST_TOGETHER, max(1, math.ceil(mean_rows(rows, num_experts) / tile.tokens)))
    _load.kernel("grouped_gemm_wgmma.cu", "grouped_gemm", **constants)(
        grid,
        128 * (1 + bool(rule) + tile.groups),
        _tensor_maps.rows_map(x.data.ptr, *x.shape, tile.tokens),
        _tensor_maps.weights_map(
            weights.data.ptr, weights.shape, weights.strides[:2], gated, interleaved, tile.weights, rule
        ),
        schedule,
        permuted_idx if permuted_idx.size else None,
        x,
        *beside,
        bias if bias.size else None,
        output_scale if scaled else None,
        row_factor if row_factor.size else None,
        column_factor if column_factor.size else None,
        out,
        *groups,
        blocks,
        k,
        outputs,
        int(interleaved),
        column_factor.shape[-1],
        part,
        row_factor.shape[-1],
        top_k,
        stages,
        code_stages,
        together,
        int(ahead),
        np.float32(min(1.0, _KEPT_BYTES / (2 * x.size))),
        np.float32(alpha),
        np.float32(beta),
        np.float32(limit),
        shared=fixed_bytes + stages * tile.stage_bytes + code_stages * code_bytes,
        overlap=True,
    )


def _constants(
    tile, dtype, activation, gathered, biased=False, scaled=False, limited=False, factored=False, of_codes=None
):
    """Macros of the kernel; `of_codes` are those of coded_weights.cuh."""
    of_codes = {"PART_BLOCKS": 2} | (of_codes or _coded_weights.constants("", 0))
    if of_codes["CODED"] and of_codes["PARTED"]:
        registers = _PARTED_REGISTERS[of_codes["PARTED"]][tile.ctas - 1]
    elif of_codes["CODED"]:
        registers = _CODED_REGISTERS.get(tile.ctas) or ((48, 80, 192) if gathered else (32, 96, 192))
    elif tile.ctas > 1:  # these have registers enough without moving them
        registers = 0, 0, 0
    else:
        registers = (56, 0, 224) if gathered else (40, 0, 232)
    return of_codes | {
        "X": dtype,
        "WGMMA_TYPE": '"bf16"' if dtype == "bfloat16" else '"f16"',
        "ACTIVATED": int(bool(activation)),
        "ACTIVATION": activation or "identity",
        "GATED": int(bool(activation) and not activation.endswith("_no_mul")),
        "BIASED": int(biased),
        "SCALED": int(scaled),
        "LIMITED": int(limited),
        "FACTORED": int(factored),
        "GATHERED": int(gathered),
        "M_BLOCKS": tile.m_blocks,
        "COLUMNS": tile.tokens,
        "GROUPS": tile.groups,
        "MIN_CTAS": tile.ctas,
        "PRODUCER_REGISTERS": registers[0],
        "DECODER_REGISTERS": registers[1],
        "CONSUMER_REGISTERS": registers[2],
    }


def explain(num_pairs, num_experts, hidden_size, intermediate_size, coded, parted):
    """Lines that say which tile a call uses and why."""
    tile = _tile(block_rows(num_pairs, num_experts, hidden_size, intermediate_size, coded, parted), parted)
    mean = mean_rows(num_pairs, num_experts)
    where = (
        f"{tile.ctas} blocks a multiprocessor"
        if tile.ctas > 1
        else "one block a multiprocessor, which takes one after the other"
    )
    return (
        f"tiles of {tile.tokens} rows cover {mean:.1f} rows of an expert in {max(1, math.ceil(mean / tile.tokens))}",
        f"both products: {tile.weights} rows of weights a tile, {tile.groups} warpgroups multiply, {where}",
    )


def variants(arch):
    """Kernels that the default dtypes and the common activations use on `arch`: (file, entry point, constants)."""
    if arch != "sm_90a":
        return
    for dtype in ("bfloat16", "float16"):
        for rows in heights(False, False):
            tile = _TILES[rows]
            yield "grouped_gemm_wgmma.cu", "grouped_gemm", _constants(tile, dtype, "silu", True)
            yield "grouped_gemm_wgmma.cu", "grouped_gemm", _constants(tile, dtype, "", False, scaled=True)
            for rule in _coded_weights.BITS if rows in heights(True, False) else ():
                of_codes = _coded_weights.constants(rule, 32)
                first = _constants(tile, dtype, "silu", True, factored=True, of_codes=of_codes)
                second = _constants(tile, dtype, "", False, scaled=True, factored=True, of_codes=of_codes)
                for constants in (first, second, *([first | {"BIASED": 1}] if rule == "mxfp4" else [])):
                    yield "grouped_gemm_wgmma.cu", "grouped_gemm", constants
    for rule in ("", "fp8", "int8"):
        for rows in heights(rule, True):
            of_codes = _coded_weights.constants(rule, 128, parted=2)
            first = _constants(_tile(rows, True), "bfloat16", "silu", True, of_codes=of_codes)
            second = _constants(_tile(rows, True), "bfloat16", "", False, scaled=True, of_codes=of_codes)
            for constants in (first, second):
                yield "grouped_gemm_wgmma.cu", "grouped_gemm", constants
