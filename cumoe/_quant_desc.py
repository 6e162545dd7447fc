"""How one operand is quantised: its number format, the elements that share a scale, and the arrays of that."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from cumoe._arrays import Array

DType = Any  # a NumPy, ml_dtypes or torch dtype, or a name; compared by name

FLOAT8_E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
INT8 = np.dtype(np.int8)


def dtype_name(dtype: DType) -> str | None:
    """Name that a NumPy, ml_dtypes or torch dtype, a scalar type or a string stands for; None stays None."""
    if dtype is None:
        return None
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    if isinstance(dtype, np.dtype):
        return dtype.name
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        return np.dtype(dtype).name
    if type(dtype).__module__.partition(".")[0] == "torch":
        return str(dtype).removeprefix("torch.")
    raise TypeError(f"dtype must be a NumPy, ml_dtypes or torch dtype or a name, got {type(dtype).__name__}")


class _RowCol(NamedTuple):
    row: int
    col: int


class GroupShape(_RowCol):
    """
    How many rows and columns share one scale; -1 stands for the whole axis.

    Attributes
    ----------
    row, col : int
        ``(128, 128)`` for block-quantised weights, ``(1, 128)`` for activations in groups along a row.
    PER_TENSOR, PER_TOKEN, PER_CHANNEL : GroupShape
        ``(-1, -1)``, ``(1, -1)`` and ``(-1, 1)``.

    Examples
    --------
    >>> from cumoe import GroupShape
    >>> GroupShape(1, 128).is_per_group(), GroupShape.PER_TOKEN.is_per_group()
    (True, False)
    """

    __slots__ = ()

    PER_TENSOR: ClassVar["GroupShape"]
    PER_TOKEN: ClassVar["GroupShape"]
    PER_CHANNEL: ClassVar["GroupShape"]

    def is_per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.row == -1 and self.col == -1

    def is_per_token(self) -> bool:
        """Whether each row has a scale."""
        return self.row == 1 and self.col == -1

    def is_per_channel(self) -> bool:
        """Whether each column has a scale."""
        return self.row == -1 and self.col == 1

    def is_per_group(self) -> bool:
        """Whether each row is cut into groups of `col` elements."""
        return self.row == 1 and self.col >= 1


GroupShape.PER_TENSOR = GroupShape(-1, -1)
GroupShape.PER_TOKEN = GroupShape(1, -1)
GroupShape.PER_CHANNEL = GroupShape(-1, 1)


@dataclass(frozen=True, eq=False, repr=False)
class FusedMoEQuantDesc:
    """
    How one operand, an activation or a weight, is quantised.

    Parameters
    ----------
    dtype : dtype or str, optional
        Number format; None when the operand is not quantised.
    shape : GroupShape, optional
        Elements that share a scale.
    scale : array or object, optional
        Scales, or a ``PrecisionConfig`` of triton_kernels that holds them.
    alpha_or_gscale : array, optional
        Global scale of an activation, alphas of a weight.
    zp : array, optional
        Zero points of an integer weight.
    bias : array, optional
        Bias added after the product with this weight.
    is_scale_swizzled : bool, default False
        The scales of this weight, mxfp4, mxfp8 or nvfp4, are in blocks of 128 x 4, as `swizzle_scales` gives them.

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import FusedMoEQuantDesc, GroupShape
    >>> FusedMoEQuantDesc("int4", GroupShape(1, 32), np.ones((8, 64, 4), np.float32))
    FusedMoEQuantDesc(dtype='int4', shape=GroupShape(row=1, col=32), scale=<float32 (8, 64, 4)>)
    """

    dtype: DType = None
    shape: GroupShape | None = None
    scale: Any = None
    alpha_or_gscale: Array = None
    zp: Array = None
    bias: Array = None
    is_scale_swizzled: bool = False

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        listed = ", ".join(
            f"{name}={_brief(value)}" for name, value in given if value is not None and value is not False
        )
        return f"FusedMoEQuantDesc({listed})"


def group_shape(block_shape: Sequence[int] | None) -> GroupShape | None:
    """Give the shape that a builder's `block_shape` names."""
    if block_shape is None:
        return None
    sizes = [operator.index(size) for size in block_shape]
    if len(sizes) != 2 or min(sizes) < -1:
        raise ValueError(f"block_shape must be [rows, columns], each >= -1, got {list(block_shape)}")
    return GroupShape(*sizes)


def _quant_flags_to_group_shape(
    quant_dtype: DType,
    per_act_token_quant: bool,
    per_out_ch_quant: bool,
    block_shape: Sequence[int] | None,
) -> tuple[GroupShape | None, GroupShape | None]:
    """Shapes of the activations and of the weights that the flags stand for."""
    if block_shape is not None:
        if per_act_token_quant or per_out_ch_quant:
            flag = "per_act_token_quant" if per_act_token_quant else "per_out_ch_quant"
            raise ValueError(f"block_shape must be None when {flag} is set, got {list(block_shape)}")
        block = group_shape(block_shape)
        return block, block
    a_shape = None if quant_dtype is None else GroupShape.PER_TENSOR
    # per token even without a dtype: the activations may arrive already quantised
    return (
        GroupShape.PER_TOKEN if per_act_token_quant else a_shape,
        GroupShape.PER_TOKEN if per_out_ch_quant else None,
    )


def is_array(value: Any) -> bool:
    """Whether `value` is an array of any library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _brief(value: Any) -> str:
    """Kind and shape of an array, so that a repr never reads a device."""
    return f"<{dtype_name(value.dtype)} {tuple(value.shape)}>" if is_array(value) else repr(value)
