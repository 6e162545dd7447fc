"""Schemes of quantised operands: which there are, how each is stored, and the shapes that its parts have."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cumoe import _check
from cumoe._arrays import Array
from cumoe._quant_desc import FLOAT8_E4M3FN, INT8, FusedMoEQuantDesc, GroupShape

DTYPES = ("float32", "float16", "bfloat16")


class Scheme(NamedTuple):
    """How a scheme is stored: codes, and the dtypes that its scales may have, the first by default."""

    codes: np.dtype[Any]
    is_packed: bool
    scales: tuple[str, ...]
    group_shape: GroupShape
    groups: tuple[int, ...] = ()  # the columns of a group that there are; () for any
    largest_code: int = 0  # of schemes with a zero point: half of one more stands for zero by default


_E8M0 = ("float8_e8m0fnu", "uint8")
_UINT8 = np.dtype(np.uint8)

SCHEMES = {
    "fp8": Scheme(FLOAT8_E4M3FN, False, ("float32",), GroupShape.PER_TENSOR),
    "int8": Scheme(INT8, False, ("float32",), GroupShape.PER_TOKEN),
    "int4": Scheme(_UINT8, True, DTYPES, GroupShape(1, 128), (32, 64, 128), largest_code=15),
    "uint8": Scheme(_UINT8, False, DTYPES, GroupShape(1, 128), largest_code=255),
    "mxfp4": Scheme(_UINT8, True, _E8M0, GroupShape(1, 32), (32,)),
    "mxfp8": Scheme(FLOAT8_E4M3FN, False, _E8M0, GroupShape(1, 32), (32,)),
    "nvfp4": Scheme(_UINT8, True, ("float8_e4m3fn",), GroupShape(1, 16), (16,)),
}


class Quantized(NamedTuple):
    """
    An operand in a small number format.

    Attributes
    ----------
    values : (..., N, K) array, float8_e4m3fn, int8 or uint8, or (..., N, K/2) array, uint8
        Codes; those of four bits two a byte along K, the even k in the low bits.
    scale : (..., Nb, Kb) array
        Scale of each group, of as many axes as the operand.
    scheme : str
        ``"fp8"``, ``"int8"``, ``"int4"``, ``"uint8"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``.
    group_shape : GroupShape
        Rows and columns that share a scale, -1 for a whole axis.
    zero_points : (..., N/2, Kb) or (..., Nb, Kb) array, uint8, or None
        Codes of zero: of ``"int4"``, two a byte along N, None for 8; of ``"uint8"``, one a byte, None for 128.
    global_scale : (...) array, float32, or None
        What the block scales of ``"nvfp4"`` are divided by to get a number back, one for each matrix.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> quantized = cumoe.quantize(np.ones((2, 4), "float32"), "int8")
    >>> quantized.values.dtype, quantized.scale.shape
    (dtype('int8'), (2, 1))
    >>> quantized.desc
    FusedMoEQuantDesc(dtype=dtype('int8'), shape=GroupShape(row=1, col=-1), scale=<float32 (2, 1)>)
    """

    values: Array
    scale: Array
    scheme: str
    group_shape: GroupShape
    zero_points: Array = None
    global_scale: Array = None

    @property
    def desc(self) -> FusedMoEQuantDesc:
        """
        The descriptor of this operand.

        Its ``dtype`` is int8 for both schemes of integers of eight bits. Its ``alpha_or_gscale`` is
        `global_scale`, as activations have it; the alphas of a weight are the product of the inverse global
        scales of both operands.
        """
        dtype = {"fp8": FLOAT8_E4M3FN, "int8": INT8, "uint8": INT8}.get(self.scheme, self.scheme)
        return FusedMoEQuantDesc(dtype, self.group_shape, self.scale, self.global_scale, self.zero_points)


class Layout(NamedTuple):
    """An operand as the rooms see it: L matrices, and their groups."""

    shape: tuple[int, ...]
    group_shape: GroupShape

    @property
    def matrices(self) -> int:
        """L."""
        return math.prod(self.shape[:-2])

    @property
    def flat(self) -> tuple[int, int, int]:
        """(L, N, K)."""
        return self.matrices, self.shape[-2], self.shape[-1]

    @property
    def group(self) -> tuple[int, int]:
        """Rows and columns of a group."""
        sizes = zip(self.shape[-2:], self.group_shape, strict=True)
        rows, cols = (max(size, 1) if group == -1 else group for size, group in sizes)
        return rows, cols

    @property
    def groups(self) -> tuple[int, int, int]:
        """(L, Nb, Kb)."""
        sizes = zip(self.shape[-2:], self.group_shape, strict=True)
        down, across = (1 if group == -1 else -(-size // group) for size, group in sizes)
        return self.matrices, down, across

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """(..., Nb, Kb)."""
        return (*self.shape[:-2], *self.groups[1:])

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """(..., N/2, Kb), of zero points two a byte; groups of one row."""
        return (*self.shape[:-2], self.shape[-2] // 2, self.groups[2])


def scheme_of(name: Any) -> Scheme:
    """The scheme of that name, or an error."""
    _check.choice("scheme", name, tuple(SCHEMES))
    return SCHEMES[name]


def group_shape_of(scheme: str, group_shape: Sequence[int] | None) -> GroupShape:
    """The group that `scheme` works on: the given one if it can, its own by default."""
    rule = SCHEMES[scheme]
    if group_shape is None:
        return rule.group_shape
    try:
        rows, cols = (operator.index(size) for size in group_shape)
    except (TypeError, ValueError):
        raise TypeError(f"group_shape must be two ints (rows, columns), got {group_shape!r}") from None
    shape = GroupShape(rows, cols)
    if rule.groups:
        allowed = tuple(f"(1, {size})" for size in rule.groups)
        listed = " or ".join([", ".join(allowed[:-1])] * (len(allowed) > 1) + [allowed[-1]])
        if rows != 1 or cols not in rule.groups:
            raise ValueError(f"group_shape must be {listed} for {scheme!r}, got {tuple(shape)}")
    elif not (shape.is_per_tensor() or shape.is_per_token() or min(shape) >= 1):
        raise ValueError(f"group_shape must be (-1, -1), (1, -1) or two sizes >= 1 for {scheme!r}, got {tuple(shape)}")
    return shape


def check_parts(scheme: str, layout: Layout, scale: Array, zero_points: Array, global_scale: Array) -> None:
    """Check the arrays that go with the codes of an operand; None passes."""
    if scale is not None:
        _check.dtype("scale", scale, SCHEMES[scheme].scales)
        if tuple(scale.shape) not in _without_ones(layout):
            _check.shape("scale", scale, _letters(layout.group_shape), layout.scale_shape)
    if zero_points is not None:
        packed = SCHEMES[scheme].is_packed
        letters, shape = ("(..., N/2, Kb)", layout.packed_shape) if packed else ("(..., Nb, Kb)", layout.scale_shape)
        _check.dtype("zero_points", zero_points, ("uint8",))
        _check.shape("zero_points", zero_points, letters, shape)
    if global_scale is not None:
        _check.dtype("global_scale", global_scale, ("float32",))
        lead = layout.shape[:-2]
        if lead or tuple(global_scale.shape) != (1,):
            _check.shape("global_scale", global_scale, "(...)", lead)


def check_even(name: str, layout: Layout, scheme: str, zero_points: bool) -> None:
    """Two codes of four bits share a byte along K, two zero points along N."""
    *_, n, k = layout.shape
    packed = SCHEMES[scheme].is_packed
    if packed and k % 2:
        raise ValueError(f"{name} must have an even last axis K for {scheme!r}, got shape {layout.shape}")
    if packed and zero_points and n % 2:
        raise ValueError(f"{name} must have an even axis N for zero points, got shape {layout.shape}")


def check_options(
    scheme: str,
    shape: GroupShape,
    has_scale: bool,
    has_zeros: bool,
    has_global_scale: bool,
    scale_ub: Any,
    use_ue8m0: bool,
) -> None:
    """Refuse options that a scheme does not have, or that do not go together."""
    refuse("zero_points", has_zeros and not SCHEMES[scheme].largest_code, f"for {scheme!r}", "False")
    refuse("global_scale", has_global_scale and scheme != "nvfp4", f"for {scheme!r}")
    if has_scale and scheme == "nvfp4" and not has_global_scale:
        raise ValueError("global_scale must be given with scale for 'nvfp4', got None")
    for name, is_set, absent in (("scale_ub", scale_ub is not None, "None"), ("use_ue8m0", use_ue8m0, "False")):
        refuse(name, is_set and scheme != "fp8", f"for {scheme!r}", absent)
        refuse(name, is_set and has_scale, "with a static scale", absent)
    if scale_ub is not None:
        refuse("scale_ub", not shape.is_per_token(), f"for group_shape {tuple(shape)}")
        if isinstance(scale_ub, bool) or not isinstance(scale_ub, numbers.Real):
            raise TypeError(f"scale_ub must be a number, got {type(scale_ub).__name__}")
        if not float(scale_ub) > 0:
            raise ValueError(f"scale_ub must be > 0, got {scale_ub}")


def refuse(name: str, wrong: bool, why: str, absent: str = "None") -> None:
    """Raise ValueError if an option is given where it means nothing."""
    if wrong:
        raise ValueError(f"{name} must be {absent} {why}")


def scale_rule(scheme: str, shape: GroupShape, zero_points: bool, use_ue8m0: bool) -> str:
    """Name of the rule by which the rooms find dynamic scales."""
    if scheme == "fp8":
        return "fp8" + "_group" * (min(shape) >= 1) + "_ue8m0" * bool(use_ue8m0)
    return scheme + "_zero_points" * zero_points


def code_rule(scheme: str, shape: GroupShape, is_static: bool) -> str:
    """Name of the rule by which the rooms find codes."""
    if scheme == "fp8":
        return "fp8_static" if is_static else "fp8"
    if scheme == "int8":
        if is_static or shape.is_per_tensor():
            return "int8_even"
        return "int8_away" if shape.is_per_token() else "int8_truncate"
    return scheme


def _without_ones(layout: Layout) -> list[tuple[int, ...]]:
    """Shapes of scales that leave out the axes along which there is one group only; (1,) for one in all."""
    shape, (rows, cols) = layout.scale_shape, layout.group_shape
    if rows == -1:
        return [shape, shape[:-2], *([(1,)] if len(shape) == 2 else [])]
    return [shape, shape[:-1]] if cols == -1 else [shape]


def _letters(group_shape: GroupShape) -> str:
    rows, cols = (
        "1" if size == -1 else axis if size == 1 else f"ceil({axis} / {size})"
        for axis, size in zip("NK", group_shape, strict=True)
    )
    return f"(..., {rows}, {cols})"
