"""Gated activations: act(g, u) of each element, in float32, one rounding at the store."""

import math

import numpy as np

from cumoe.rawkernels import _load

_BLOCK = 256
_BLOCKS_A_MULTIPROCESSOR = 8  # 2048 threads, as many as there is room for
_HALVES, _ALTERNATING, _ALONE = range(3)


def moe_activation(x, activation, interleaved, dtype, alpha, beta, limit, out):
    """
    Fill ``out`` (R, I) from ``x`` (R, 2I), or from ``x`` (R, I) for a name that ends in ``_no_mul``.

    `dtype` names what the bits of both mean: float32, bfloat16 or float16.
    """
    if not out.size:
        return
    layout = _layout(activation, interleaved)
    width = out.size if layout == _ALONE else out.shape[1]  # without an up, rows do not matter
    together = math.gcd(width * out.itemsize, x.data.ptr, out.data.ptr)
    piece_bytes = next(size for size in (16, 8, 4, 2) if together % size == 0)
    pieces = out.nbytes // piece_bytes
    pieces_a_row = width * out.itemsize // piece_bytes
    blocks = min(-(-pieces // _BLOCK), _load.multiprocessors(x.device.id) * _BLOCKS_A_MULTIPROCESSOR)
    _load.kernel("act.cu", "moe_activation", **_constants(activation, layout, dtype, piece_bytes))(
        blocks,
        _BLOCK,
        x,
        out,
        pieces,
        pieces_a_row,
        blocks * _BLOCK,
        blocks * _BLOCK // pieces_a_row,
        np.float32(alpha),
        np.float32(beta),
        np.float32(limit),
        overlap=True,
    )


def variants(arch):
    """Kernels for the common activations on `arch`: (file, entry point, constants)."""
    for dtype in ("bfloat16", "float16", "float32"):
        for activation, interleaved in (("silu", False), ("gelu", False), ("swigluoai", True), ("relu2_no_mul", False)):
            layout = _layout(activation, interleaved)
            yield "act.cu", "moe_activation", _constants(activation, layout, dtype, 16)
        yield "act.cu", "moe_activation", _constants("silu", _HALVES, dtype, 4)  # odd sizes
        yield "act.cu", "moe_activation", _constants("situ", _HALVES, dtype, 16)


def _layout(activation, interleaved):
    if activation.endswith("_no_mul"):
        return _ALONE
    return _ALTERNATING if interleaved else _HALVES


def _constants(activation, layout, dtype, piece_bytes):
    return {"X": dtype, "LAYOUT": layout, "BYTES": piece_bytes, "BLOCK": _BLOCK, "ACTIVATION": activation}
