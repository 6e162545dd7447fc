"""
Rows of activations as a product on quantised operands takes them: numbers of their own dtype, with or without a factor.

A scale of a whole row meets the sum: numbers are the codes, which float16 and bfloat16 hold. Scales of groups are
multiplied in, which bfloat16 holds exactly for mxfp4, mxfp8 and nvfp4. Codes and scales are those of `cumoe.quantize`.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays
from cumoe._layer_scheme import Rows
from cumoe._quant_desc import GroupShape
from cumoe._schemes import SCHEMES, code_rule, scale_rule

_SCALES_AS_CODES = ("mxfp4", "mxfp8", "nvfp4")


class Space(NamedTuple):
    """How rows are quantised, and the memory for it."""

    rows: Rows
    numbers: Any  # (R, K) bits of the activations' dtype
    factor: Any  # (R,) float32, or (0,) where numbers hold the scale
    codes: Any  # (R, K) or (R, K/2)
    low: Any  # float32, one a group
    high: Any
    scale: Any  # one a group
    one: Any  # (1,) float32
    limit: Any  # (1,) float32

    def first(self, num_rows: int) -> "Space":
        """The part that fewer rows use."""
        groups = len(self.scale)
        if num_rows < len(self.numbers) and not self.rows.per_tensor:
            groups = groups // len(self.numbers) * num_rows
        return self._replace(
            numbers=self.numbers[:num_rows],
            factor=self.factor[:num_rows],
            codes=self.codes[:num_rows],
            low=self.low[:groups],
            high=self.high[:groups],
            scale=self.scale[:groups],
        )


def space(rows: Rows, num_rows: int, size: int, bits: Any, empty: Callable[..., Any], numbers: Any = None) -> Space:
    """Memory from `empty` for rows (`num_rows`, `size`), whose numbers go to `numbers` if that is given."""
    rule = SCHEMES[rows.scheme]
    across = 1 if rows.cols == -1 else -(-size // rows.cols)
    groups = across * (1 if rows.per_tensor else num_rows)
    found = 0 if rows.scale is not None else groups
    return Space(
        rows,
        empty((num_rows, size), bits) if numbers is None else numbers,
        empty((num_rows if rows.cols == -1 else 0,), np.float32),
        empty((num_rows, size // 2 if rule.is_packed else size), np.int8 if rows.scheme == "int8" else np.uint8),
        empty((found,), np.float32),
        empty((found,), np.float32),
        empty((found,), np.uint8 if rows.scheme in _SCALES_AS_CODES else np.float32),
        empty((1,), np.float32),
        empty((1,), np.float32),
    )


def quantise_rows(xp: ModuleType, x: Any, dtype: str, to: Space, global_scale: Any = None) -> None:
    """
    Fill ``to.numbers`` and ``to.factor`` from bits (R, K) of `dtype`; `x` may be ``to.numbers``.

    `global_scale` is float32 (1,), or (R,) where each row has its own.
    """
    room, rows = _arrays.room(xp, "formats"), to.rows
    num_rows, size = x.shape
    shape = GroupShape.PER_TENSOR if rows.per_tensor else GroupShape(1, rows.cols)
    group = num_rows if rows.per_tensor else 1, size if rows.cols == -1 else rows.cols
    # one matrix, or one a row where each row has a global scale
    lead = (num_rows, 1) if global_scale is not None and len(global_scale) > 1 else (1, num_rows)
    to.one.fill(1)
    scale_dtype = "uint8" if to.scale.dtype == np.uint8 else "float32"
    if rows.scale is not None:
        scale = rows.scale.reshape(1, 1, 1)
    else:
        groups = (1, 1, 1) if rows.per_tensor else (*lead, len(to.scale) // num_rows)
        low, high, scale = (array.reshape(groups) for array in (to.low, to.high, to.scale))
        room.extremes(x.reshape(*lead, size), dtype, *group, low, high)
        limits = global_scale
        if limits is None:  # the fp8 rule cuts the maximum there
            limits = to.limit
            limits.fill(math.inf)
        room.scales(low, high, limits, scale_rule(rows.scheme, shape, False, False), scale_dtype, scale)
    room.encode(
        x.reshape(*lead, size),
        dtype,
        scale,
        scale_dtype,
        None,
        to.one if global_scale is None else global_scale,
        *group,
        code_rule(rows.scheme, shape, rows.scale is not None),
        to.codes.reshape(*lead, -1),
    )
    if rows.cols == -1:  # numbers are codes
        to.factor[...] = scale.reshape(-1)
        scale, scale_dtype, group = to.one.reshape(1, 1, 1), "float32", (num_rows, size)
    room.decode(
        to.codes.reshape(1, num_rows, -1),
        scale.reshape(1, -1, scale.shape[2]),
        scale_dtype,
        None,
        to.one,
        *group,
        rows.scheme,
        dtype,
        to.numbers.reshape(1, num_rows, size),
    )
