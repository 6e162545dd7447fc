"""
Tensor maps: how the bulk copy engine of sm_90 sees an array. A map names a box; a copy brings one box, with the
128-byte swizzle, and zeros for what lies outside the array.
"""

import ctypes
import functools

import numpy as np

from cumoe.rawkernels import _coded_weights

BLOCK_K = 64  # elements of two bytes: the 128 bytes of the swizzle; twin of the one in grouped_gemm_wgmma.cu


def weights_map(address, shape, strides, gated, interleaved, rows, rule=""):
    """
    Map of weights (E, N, K) of two bytes, or codes of `rule`, whose box is (`rows` weight rows, 64 of K).

    The axes are K, 8 rows, gate or up, blocks of 8 outputs, expert: a box of gated weights has 8 gate rows, then
    the 8 up rows of the same outputs, and so on, wherever the rows lie (gate and up in halves or alternating).
    `strides` are bytes, of the expert and of the row.
    """
    num_experts, n, k = shape
    expert, row = strides
    if num_experts == 1:
        expert = n * row  # nobody takes it, and what the array has there may be no stride of a map
    if not gated:
        sides, blocks = 1, n // 8
        steps = row, row, 8 * row
    elif interleaved:
        sides, blocks = 2, n // 16
        steps = 2 * row, row, 16 * row
    else:
        sides, blocks = 2, n // 16
        steps = row, n // 2 * row, 8 * row
    width = BLOCK_K * _coded_weights.BITS[rule] // 8 if rule else BLOCK_K  # elements: bytes of codes, or numbers
    box = width, 8, sides, rows // (8 * sides), 1
    return _encode(address, (k, 8, sides, blocks, num_experts), (*steps, expert), box, 1 if rule else 2)


def rows_map(address, num_rows, width, box_rows):
    """Map of contiguous rows (num_rows, width) of two bytes whose box is (`box_rows`, 64)."""
    return _encode(address, (width, num_rows), (2 * width,), (BLOCK_K, box_rows), 2)


@functools.lru_cache(maxsize=4096)
def _encode(address, sizes, strides, box, itemsize):
    """Map of numbers of two bytes in the order of the swizzle, or of bytes as they come."""
    from cuda.bindings import driver

    kinds, swizzle = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    result, encoded = driver.cuTensorMapEncodeTiled(
        kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16 if itemsize == 2 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B if itemsize == 2 else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(result) != 0:
        raise RuntimeError(f"no tensor map of sizes {sizes}, strides {strides}, box {box}: {result.name}")
    return np.frombuffer(ctypes.string_at(encoded.getPtr(), 128), "V128").copy()
