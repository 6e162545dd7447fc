"""
Panels of weights that are codes of a small format: their rows become numbers (`formats`), which are packed (`pack`).

The numbers of one panel lie in a scratch of the thread that works on it, which stays in its cache.
"""

import functools

import numpy as np

from cumoe.cpu import formats, pack
from cumoe.cpu._jit import jit

_NO_WEIGHTS = {size: np.empty((0, 0, 0), dtype) for size, dtype in ((4, "float32"), (2, "uint16"))}


def rows_of(weights, weight_format, multiplies_codes, itemsize):
    """Weights or codes as the loops take them, or empty ones beside panels of weights of `itemsize` bytes."""
    if weights.ndim == 5:
        return _NO_WEIGHTS[itemsize]
    if weight_format is None:
        return weights
    return weights.view(np.int8 if weight_format.rule == "int8" and not multiplies_codes else np.uint8)


def arguments(weight_format):
    """What the loop takes of a format; without one, nothing of the same kind."""
    f = weight_format
    if f is None:
        return np.empty((0, 0, 0), np.float32), formats.or_none(None), np.empty(0, np.float32), 0, 0
    return f.scale, formats.or_none(f.zero_points), f.global_scale, f.group_rows, f.group_cols


def names(weight_format):
    """What the loop is compiled for, () without a format."""
    if weight_format is None:
        return ()
    return weight_format.rule, weight_format.scale_dtype, weight_format.zero_points is not None


@functools.cache
def pack_decoded(kernel, dtype, rule, scale_dtype, has_zero_points):
    """The compiled packer of one panel of codes for `kernel`, as numbers of `dtype`."""
    row = formats.decode_row(rule, scale_dtype, has_zero_points, dtype)
    return jit(inner=True, row=row, pack_panel=pack.pack_panel(kernel))(_pack_decoded)


# ---- the template; jit(...) gives the names below their values ----

row = pack_panel = None


def _pack_decoded(problem, expert, panel, decoded, target):
    """Panel `panel` by way of `decoded`, (1, columns, K): its gate rows, then its up rows, or its plain rows."""
    p = problem
    outputs = min(p.side, p.out.shape[1] - panel * p.side)
    for column in range(decoded.shape[1]):
        first, i = p.first_gate if column < p.side else p.first_up, column % p.side
        if i < outputs:
            n = first + (panel * p.side + i) * p.distance
            target_row = decoded[0, column]
            row(p.weights, p.scale, p.zero_points, p.global_scale, expert, n, p.group_rows, p.group_cols, target_row)
    pack_panel(decoded, 0, 0, 0, -1 if p.first_up < 0 else p.side, 1, outputs, target)
