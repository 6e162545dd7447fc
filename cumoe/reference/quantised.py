"""
Quantised operands of the layer: what the codes of a weight are worth, and how rows of activations are quantised.

A number of an operand is ``code * scale``, ``(code - zero point) * scale`` for unsigned integers. Where scales change
along K, a computation may round it to the dtype of the activations, which costs nothing if that holds it exactly (as
bfloat16 does for mxfp4, mxfp8 and nvfp4), or scale the sum of each group and round nothing, which is inside the bound.
A scale of a whole row or column of the product meets the sum instead:

    h[r, n] = sum over k of x[r, k] * w[n, k], times row factor[r] * column factor[n]

Activations are quantised from numbers that are known up to an error. Rounding is monotone, so the codes of the ends
of the interval bound every code between them; most intervals are far narrower than a step and have one code only.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cumoe.reference import formats
from cumoe.reference.rounding import SUM_UNIT, Bounded, largest, smallest_error, unit

Array = Any


@dataclass(frozen=True)
class Weights:
    """A quantised weight (E, N, K); arrays on the host, codes and zero points one a byte."""

    scheme: str
    codes: Array  # (E, N, K)
    scale: Array  # (E, Nb, Kb), floats or codes as the scheme has them; or (0, 0, 0): numbers are codes
    zero_points: Array  # of the shape of `scale`, or None
    rows: int  # of a group
    cols: int
    factor: Array  # (E, N), (E, 1) or (0, 0)

    def __len__(self) -> int:
        """E."""
        return len(self.codes)

    def operand(self, e: int, dtype: np.dtype) -> tuple[Bounded, Array]:
        """Numbers (N, K) of an expert and the factors (N,) of its columns."""
        return operand(self.numbers(e), dtype), self.factors(e)

    def factors(self, e: int) -> Array:
        """The factors (N,) of the columns of an expert."""
        n = self.codes.shape[1]
        if not self.factor.size:
            return np.ones(n)
        return np.broadcast_to(np.asarray(self.factor[e]).astype(np.float64), (n,))

    def numbers(self, e: int) -> Array:
        """``code * scale`` of an expert, float64, which holds it."""
        codes = self.codes[e]
        if self.scheme in formats.LARGEST_CODE:
            value = codes.astype(np.float64)
            if self.zero_points is None:
                value -= (formats.LARGEST_CODE[self.scheme] + 1) // 2
            else:
                value -= formats.spread(self.zero_points[e], codes.shape, self.rows, self.cols)
        elif self.scheme == "int8":
            value = codes.astype(np.float64)
        else:
            value = (formats.E4M3 if self.scheme in ("fp8", "mxfp8") else formats.E2M1)[codes]
        if not self.scale.size:
            return value
        scale = stored_scale(self.scale[e], self.scheme)
        return value * formats.spread(scale, codes.shape, self.rows, self.cols)


class Rows(NamedTuple):
    """How rows of activations (..., K) are quantised."""

    scheme: str  # "fp8", "int8", "mxfp4", "mxfp8", "nvfp4"
    cols: int  # of a group of a row, -1 for all
    per_tensor: bool = False
    scale: Array = None  # static, () or (1,)
    global_scale: Array = None  # nvfp4: (), (1,) or (E,)
    batch: Array = None  # all tokens, where only some of those whose scale it is are computed

    @property
    def is_batch_wide(self) -> bool:
        """Whether the scale depends on all rows."""
        return self.per_tensor and self.scale is None

    @property
    def has_factor(self) -> bool:
        """Whether the scale serves a whole row: it meets the sum, and numbers are codes."""
        return self.cols == -1


def stored_scale(scale: Array, scheme: str) -> Array:
    """Scales as numbers, float64."""
    if scheme.startswith("mxfp"):
        return formats.E8M0[np.asarray(scale).view(np.uint8)]
    if scheme == "nvfp4":
        return formats.E4M3[np.asarray(scale).view(np.uint8)]
    return np.asarray(scale).astype(np.float64)


def operand(value: Array, dtype: np.dtype) -> Bounded:
    """A number that is rounded to float32 and to `dtype` before it is multiplied, unless `dtype` holds it."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = value.astype(np.float32).astype(dtype).astype(np.float64) == value
        error = (unit(dtype) + 2 * SUM_UNIT) * np.abs(value) + smallest_error(dtype)
        error = np.where(np.abs(value) * (1 + unit(dtype)) > largest(dtype), np.inf, error)
    return Bounded(value, np.where(exact, 0.0, error))


def amax(x: Bounded, axis: Any = None) -> tuple[Array, Array]:
    """Least and greatest float32 that the largest magnitude along `axis` may be."""
    low, high = ends(x)
    most = np.maximum(np.abs(low), np.abs(high))
    least = np.where((low < 0) & (high > 0), np.float32(0), np.minimum(np.abs(low), np.abs(high)))
    return least.max(axis=axis, initial=0), most.max(axis=axis, initial=0)


def ends(x: Bounded) -> tuple[Array, Array]:
    """The interval of each number, float32, rounded outwards."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = (x.value - x.error).astype(np.float32), (x.value + x.error).astype(np.float32)
        low = np.where(low > x.value - x.error, np.nextafter(low, np.float32(-np.inf)), low)
        high = np.where(high < x.value + x.error, np.nextafter(high, np.float32(np.inf)), high)
    return low, high


def batch_scale(x: Bounded, rows: Rows) -> tuple[Array, Array, Array]:
    """One scale for all rows: of the values, the least and the greatest that it may be."""
    exact = amax(Bounded(x.value, np.zeros_like(x.value)))[1]
    return tuple(_scale(np.float32(size), rows, 0) for size in (exact, *amax(x)))


def quantise(x: Bounded, rows: Rows, dtype: np.dtype, expert: int = 0, scale: Any = None) -> tuple[Bounded, Bounded]:
    """
    Numbers of `x` (R, K), and the factors (R, 1) of its rows.

    `scale` is what `batch_scale` gives, if the scale is that of more rows.
    """
    groups = (len(x.value), formats.num_groups(x.value.shape[1], rows.cols))
    if rows.scale is not None:
        scale = (np.float32(np.asarray(rows.scale).reshape(())),) * 3
    if scale is not None:
        scales = tuple(np.full(groups, one) for one in scale)
    else:
        parts = [_grouped(part, rows.cols) for part in x]
        exact = amax(Bounded(parts[0], np.zeros_like(parts[0])), -1)[1]
        scales = tuple(_scale(size, rows, expert) for size in (exact, *amax(Bounded(*parts), -1)))
    spread = [formats.spread(one, x.value.shape, 1, rows.cols) for one in scales]
    low, high = ends(x)
    code = _codes(x.value.astype(np.float32), spread[0], rows, expert)
    corners = [_codes(one, s, rows, expert) for one in (low, high) for s in spread[1:]]
    least, most = np.minimum.reduce([code, *corners]), np.maximum.reduce([code, *corners])
    worth = [stored_scale(one, rows.scheme) for one in scales]
    if rows.has_factor:
        numbers = Bounded(code, np.maximum(most - code, code - least))
        factor = Bounded(worth[0], np.maximum(worth[2] - worth[0], worth[0] - worth[1]))
    else:
        s, s_low, s_high = (formats.spread(one, x.value.shape, 1, rows.cols) for one in worth)
        value = code * s
        products = [c * one for c in (least, most) for one in (s_low, s_high)]
        off = np.maximum(np.maximum.reduce(products) - value, value - np.minimum.reduce(products))
        own = operand(value, dtype)
        # another code, or another scale, may not be what `dtype` holds
        rounding = unit(dtype) + 2 * SUM_UNIT
        numbers = Bounded(value, own.error + np.where(off > 0, off + rounding * (np.abs(value) + off), 0.0))
        factor = Bounded(np.ones((len(code), 1)), np.zeros((len(code), 1)))
    known = np.isfinite(x.value) & np.isfinite(x.error)
    return Bounded(numbers.value, np.where(known.all(axis=1, keepdims=True), numbers.error, np.inf)), factor


def _grouped(x: Array, cols: int) -> Array:
    """(R, K) as (R, groups, cols), zeros behind the end."""
    cols = x.shape[1] if cols == -1 else cols
    across = formats.num_groups(x.shape[1], cols) if cols else 1
    padded = np.zeros((len(x), across * cols))
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), across, cols)


def _scale(size: Array, rows: Rows, expert: int) -> Array:
    """Scale, as it is stored, of groups whose largest magnitude is `size`, float32."""
    zero = np.zeros_like(size)
    if rows.scheme == "fp8":
        return formats.fp8_scale(zero, size, rows.cols == -1, np.inf, False)
    if rows.scheme == "int8":
        return formats.int8_scale(zero, size)
    if rows.scheme == "mxfp4":
        return formats.mxfp4_scale(zero, size)
    if rows.scheme == "mxfp8":
        return formats.mxfp8_scale(zero, size)
    return formats.nvfp4_scale(zero, size, _global(rows, expert))


def _codes(x: Array, scale: Array, rows: Rows, expert: int) -> Array:
    """What the codes of `x` are worth without their scale, float64."""
    if rows.scheme == "fp8":
        return formats.E4M3[formats.encode_fp8(x, scale, rows.scale is not None)]
    if rows.scheme == "int8":
        dynamic = "truncate" if rows.cols != -1 else "even" if rows.per_tensor else "away"
        return formats.encode_int8(x, scale, "even" if rows.scale is not None else dynamic).astype(np.float64)
    if rows.scheme == "nvfp4":
        return formats.E2M1[formats.encode_nvfp4(x, scale, _global(rows, expert))]
    table = formats.E2M1 if rows.scheme == "mxfp4" else formats.E4M3
    return table[formats.encode_mx(x, scale, rows.scheme)]


def _global(rows: Rows, expert: int) -> Array:
    """The global scale of an expert's rows, without axes."""
    given = np.asarray(rows.global_scale, np.float32).reshape(-1)
    return given[expert if given.size > 1 else 0].reshape(())
