"""
Rows of activations as a product on quantised operands takes them: numbers of their own dtype, with or without a factor,
or int8 where a kernel multiplies integers.

A scale of a whole row meets the sum, and that of a group the sum of the group where the kernel makes such sums: numbers
are then the codes, which float16 and bfloat16 hold. Other scales of groups are multiplied in, which bfloat16 holds
exactly for mxfp4, mxfp8 and nvfp4. Codes and scales are those of `cumoe.quantize`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays
from cumoe._layer_scheme import Rows
from cumoe._quant_desc import GroupShape
from cumoe._schemes import code_rule, scale_rule

_ALIGNED = 4  # float32 of 16 bytes


class Space(NamedTuple):
    """How rows are quantised, and the memory for it."""

    rows: Rows
    numbers: Any  # (R, K) bits of the activations' dtype, or int8
    factor: Any  # (R,) float32, or (R, groups or a few more), or (0,) where numbers hold the scale
    batch: Any  # (3,) float32: extremes and scale of all rows, or (0,) where they do not share one

    def first(self, num_rows: int) -> "Space":
        """The part that fewer rows use."""
        return self._replace(numbers=self.numbers[:num_rows], factor=self.factor[:num_rows])


def space(rows: Rows, num_rows: int, size: int, bits: Any, empty: Callable[..., Any], numbers: Any = None) -> Space:
    """Memory from `empty` for rows (`num_rows`, `size`); if `numbers` are given, for them only where they are bytes."""
    # those of each row begin at a multiple of 16 bytes
    groups = (num_rows, -(-size // (_ALIGNED * rows.cols)) * _ALIGNED)
    shape = groups if rows.in_parts else (num_rows if rows.cols == -1 else 0,)
    return Space(
        rows,
        empty((num_rows, size), np.int8 if rows.as_bytes else bits) if numbers is None or rows.as_bytes else numbers,
        empty(shape, np.float32),
        empty((3 if rows.is_batch_wide else 0,), np.float32),
    )


def quantise_rows(xp: ModuleType, x: Any, dtype: str, to: Space, global_scale: Any = None) -> None:
    """
    Fill ``to.numbers`` and ``to.factor`` from bits (R, K) of `dtype`; `x` may be ``to.numbers``.

    `global_scale` is float32 (1,), or (R,) where each row has its own.
    """
    room, rows = _arrays.room(xp, "formats"), to.rows
    shape = GroupShape.PER_TENSOR if rows.per_tensor else GroupShape(1, rows.cols)
    rule, scale = scale_rule(rows.scheme, shape, False, False), rows.scale
    if rows.is_batch_wide:
        low, high, scale = to.batch.reshape(3, 1, 1, 1)
        room.extremes(x[None], dtype, *x.shape, low, high)
        room.scales(low, high, None, rule, "float32", scale)
        scale = scale.reshape(1)
    room.quantise_rows(
        x,
        dtype,
        rows.scheme,
        rule,
        code_rule(rows.scheme, shape, rows.scale is not None),
        x.shape[1] if rows.cols == -1 else rows.cols,
        scale,
        global_scale,
        to.numbers,
        to.factor,
    )
