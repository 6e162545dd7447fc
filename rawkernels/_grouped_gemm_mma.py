"""Launcher of grouped_gemm_mma.cu and grouped_gemm_fma.cu: which tile serves which sizes, how operands are copied."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from cumoe.rawkernels import _coded_weights, _load
from cumoe.rawkernels._grouped_gemm_wgmma import mean_rows

_FILES = {"mma": "grouped_gemm_mma.cu", "tf32": "grouped_gemm_mma.cu", "fma": "grouped_gemm_fma.cu"}
_HEIGHTS = (16, 32, 64, 128)  # rows of a tile
_MOST_PARTED = 64  # of float32 whose sums of parts stand beside those of all, and beside where their factors lie
_PITCH = 128  # bytes of K in a stage, of each row; twin of TILE_PITCH
_MOST_STAGES = 6
_LEAST_CODED_STAGES = 3  # one is multiplied, one decoded, one on its way
_LARGEST_GRID = 2**31 - 1
# shared memory of a multiprocessor in KiB, by compute capability; each CTA takes one KiB beside what it asks for
_SHARED_KIB = {80: 164, 86: 100, 87: 164, 88: 100, 89: 100, 120: 100, 121: 100}
_SHARED_KIB_ELSE = 228


class Tile(NamedTuple):
    """Shape of one compiled kernel."""

    rows: int
    columns: int  # rows of the weights
    warps_m: int
    warps_n: int
    stages: int
    ctas: int  # of a multiprocessor
    bits: int = 0  # of a code; 0: weights are numbers

    @property
    def threads(self):
        """Threads of a CTA."""
        return 32 * self.warps_m * self.warps_n

    def shared_bytes(self, gated, itemsize):
        """Shared memory of a CTA: the stages, and in the end the results."""
        outputs = self.columns // 2 if gated else self.columns
        stages = self.stages * _stage_bytes(self.rows, self.columns, self.bits, itemsize)
        return max(stages + _numbers_bytes(self.columns, self.bits), self.rows * (outputs + 8) * itemsize)


def block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, kernel):
    """Rows of a tile of the schedule for both products of a call."""
    mean = mean_rows(num_pairs, num_experts)
    # two standard deviations more, so that one tile does for most
    return next((height for height in _HEIGHTS if mean + 2 * math.sqrt(mean) <= height), _HEIGHTS[-1])


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
    Run the product with `kernel` "mma", "fma" or "tf32"; the other arguments are those of `grouped_gemm`.

    `block_rows` may be any height: tiles of the schedule are cut into parts. With `ahead`, the schedule is older
    than the kernel that runs before this one.
    """
    rows, outputs = out.shape
    (num_experts, columns, row_bytes), k = weights.shape, x.shape[-1]
    if rows == 0:
        return
    gated = bool(activation) and not activation.endswith("_no_mul")
    device = x.device.id
    item = x.itemsize
    parted = _coded_weights.parted(weight_format, k)
    height = min(_height(block_rows), _most_rows(parted, item))
    parts = -(-block_rows // height)
    most_tiles = (min(rows, num_experts) + rows // block_rows) * parts
    scaled, factored = input_scale.size > 0, (not parted and row_factor.size) + column_factor.size > 0
    rule, group_cols = _coded_weights.of_format(weight_format, k)
    bits = _coded_weights.BITS[rule] if rule else 0
    where = _load.capability(device), _load.multiprocessors(device)
    tile = choose(kernel, height, columns, most_tiles, *where, scaled, bits, parted)
    beside, (*groups, part) = _coded_weights.arguments(weight_format, columns, k)
    constants = _constants(
        tile,
        dtype,
        activation,
        gated,
        scaled,
        factored,
        _copy_bytes(item * k, x.data.ptr, *_steps(x)),
        _copy_bytes(weights.itemsize * row_bytes, weights.data.ptr, *_steps(weights)),
        _coded_weights.constants(rule, group_cols, parted),
    )
    column_blocks = -(-columns // tile.columns)
    grid = most_tiles * column_blocks
    if grid > _LARGEST_GRID:
        raise NotImplementedError(f"no kernel for {grid} tiles in one product; at most {_LARGEST_GRID}")
    _load.kernel(_FILES[kernel], "grouped_gemm", **constants)(
        grid,
        tile.threads,
        schedule,
        x,
        _given(permuted_idx),
        _given(input_scale),
        weights,
        *beside,
        _given(bias),
        _given(output_scale),
        _given(row_factor),
        _given(column_factor),
        out,
        *groups,
        x.strides[0],
        weights.strides[0],
        weights.strides[1],
        top_k,
        int(interleaved),
        k,
        outputs,
        column_factor.shape[-1],
        part,
        row_factor.shape[-1],
        most_tiles,
        parts,
        column_blocks,
        int(out.data.ptr % 16 == 0 and outputs * item % 16 == 0),
        int(ahead),
        np.float32(alpha),
        np.float32(beta),
        np.float32(limit),
        shared=tile.shared_bytes(gated, item),
        overlap=True,
    )


def explain(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel, gated):
    """Lines that say which tiles a call uses and why."""
    import cupy as cp

    height = block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, kernel)
    height = min(height, _most_rows(parted, 4 if dtype == "float32" else 2))
    most_tiles = min(num_pairs, num_experts) + num_pairs // height
    device = _load.capability(), _load.multiprocessors(cp.cuda.runtime.getDevice())
    lines = [f"tiles of {height} rows: {num_pairs} rows of {num_experts} experts make at most {most_tiles}"]
    for which, columns in (("first", (1 + gated) * intermediate_size), ("second", hidden_size)):
        tile = choose(kernel, height, columns, most_tiles, *device, bits=code_bits, parted=parted)
        lines.append(
            f"{which} product: {tile.columns} rows of weights a tile, {tile.warps_m} x {tile.warps_n} warps,"
            f" {tile.stages} stages, {tile.ctas} blocks a multiprocessor"
        )
    return tuple(lines)


def variants(arch):
    """Kernels that the default dtypes and the common activations use on `arch`: (file, entry point, constants)."""
    capability = int("".join(filter(str.isdigit, arch)))

    def variant(
        kernel, dtype, height, most_tiles, activation, scaled, copy_bytes, factored=False, rule="", group=16, parted=0
    ):
        bits = _coded_weights.BITS.get(rule, 0)
        tile = choose(kernel, height, 4096, most_tiles, capability, 132, scaled, bits, parted)
        of_codes = _coded_weights.constants(rule, group, parted)
        copies = max(copy_bytes, 4 if dtype == "float32" else 2), copy_bytes
        constants = _constants(tile, dtype, activation, bool(activation), scaled, factored, *copies, of_codes)
        return _FILES[kernel], "grouped_gemm", constants

    for kernel, dtype in (("mma", "bfloat16"), ("mma", "float16"), ("fma", "float32"), ("tf32", "float32")):
        for activation in ("silu", ""):
            for height in _HEIGHTS:
                for most_tiles in (1, 10**6):
                    yield variant(kernel, dtype, height, most_tiles, activation, False, 16)
            # the weight of a choice on the input; sizes and addresses that fit nothing
            yield variant(kernel, dtype, 128, 10**6, activation, True, 8)
            yield variant(kernel, dtype, 16, 1, activation, True, 4 if dtype == "float32" else 2)
            for height, rule in itertools.product(_HEIGHTS if kernel != "tf32" else (16, 128), ("fp8", "int4")):
                yield variant(kernel, dtype, height, 10**6, activation, False, 16, True, rule)
        for rule in _coded_weights.BITS:
            yield variant(kernel, dtype, 128, 10**6, "silu", False, 16, True, rule)
            yield variant(kernel, dtype, 128, 1, "silu", False, 1, True, rule, 2)
        for height, rule in itertools.product((16, 128 if kernel == "mma" else _MOST_PARTED), ("fp8", "")):
            yield variant(kernel, dtype, height, 10**6, "silu", False, 16, rule=rule, parted=2)


def choose(kernel, height, columns, most_tiles, capability, multiprocessors, scaled=False, bits=0, parted=0):
    """Tile of a product with `columns` rows of weights, for `most_tiles` tiles of that height; `bits` of a code."""
    shared_kib = _SHARED_KIB.get(capability, _SHARED_KIB_ELSE)
    if parted and (bits or kernel != "mma"):
        return _fitted(
            height, 64, (2, 4) if height == 128 else (1, 4), 1, shared_kib, bits, 2 if kernel == "mma" else 4
        )
    if bits or parted:
        return _coded(kernel, height, most_tiles * -(-columns // 128) < multiprocessors, shared_kib, bits)
    # scales of rows beside the largest parts of a tile that a warp can hold would be too many registers
    large = height == 128 and not scaled
    if large and kernel == "mma" and shared_kib >= 164 and most_tiles * (columns // 256) >= multiprocessors:
        return _fitted(height, 256, (2, 4), 1, shared_kib)
    narrow = height < 128 and most_tiles * -(-columns // 128) < multiprocessors
    width = 64 if narrow else 128
    few_warps = (2, 2) if height == 128 or (height == 64 and kernel != "fma") else (1, 4)
    two = _fitted(height, width, few_warps, 2, shared_kib)
    if two.stages >= 3 and (large or height < 128):
        return two
    return _fitted(height, width, (2, 4) if height == 128 else few_warps, 1, shared_kib)


def _coded(kernel, height, narrow, shared_kib, bits):
    """Tile for codes or parts: threads that decode, or have two of each sum, have registers for 64 sums beside."""
    warps = (2, 4) if height == 128 else (1, 4)
    itemsize = 2 if kernel == "mma" else 4
    for width, ctas in ((64, 2), (64, 1)) if narrow and height < 128 else ((128, 2), (128, 1), (64, 1)):
        tile = _fitted(height, width, warps, ctas, shared_kib, bits, itemsize)
        if tile.stages >= _LEAST_CODED_STAGES and (ctas == 1 or height < 128):
            return tile
    raise NotImplementedError(f"no tile of {height} rows for codes of {bits} bits in {shared_kib} KiB of shared memory")


def _fitted(rows, columns, warps, ctas, shared_kib, bits=0, itemsize=2):
    """The tile with as many stages as fit."""
    free = ((shared_kib // ctas - 1) << 10) - _numbers_bytes(columns, bits)
    stages = free // _stage_bytes(rows, columns, bits, itemsize)
    return Tile(rows, columns, *warps, min(_MOST_STAGES, stages), ctas, bits)


def _stage_bytes(rows, columns, bits=0, itemsize=2):
    return rows * _PITCH + columns * (_PITCH // itemsize * bits // 8 if bits else _PITCH)


def _numbers_bytes(columns, bits):
    """Two buffers for what codes stand for."""
    return 2 * columns * _PITCH if bits else 0


def _most_rows(parted, itemsize):
    return _MOST_PARTED if parted and itemsize == 4 else _HEIGHTS[-1]


def _height(block_rows):
    return next((height for height in _HEIGHTS if height >= block_rows), _HEIGHTS[-1])


def _constants(tile, dtype, activation, gated, scaled, factored, copy_x, copy_w, of_codes):
    """Macros of a kernel; `of_codes` are those of coded_weights.cuh."""
    return of_codes | {
        "X": dtype,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "STAGES": tile.stages,
        "MIN_CTAS": tile.ctas,
        "COPY_X": copy_x,
        "COPY_W": copy_w,
        "GATED": int(gated),
        "SCALED": int(scaled),
        "FACTORED": int(factored),
        "ACTIVATION": activation or "identity_no_mul",
    }


def _steps(array):
    """Distances in bytes between rows, where there is more than one."""
    return (stride for stride, size in zip(array.strides[:-1], array.shape[:-1], strict=True) if size > 1)


def _copy_bytes(row_bytes, *addresses):
    """Largest copy that divides every address and a row."""
    return math.gcd(16, row_bytes, *addresses)


def _given(array):
    """A null pointer for an empty array."""
    return array if array.size else None
