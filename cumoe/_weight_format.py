"""How the codes of a quantised weight become numbers, as the rooms see it."""

from typing import Any, NamedTuple


class WeightFormat(NamedTuple):
    """
    What stands beside the codes (E, N, K), or (E, N, K/2) where two of four bits share a byte.

    A code becomes ``code * scale`` or ``(code - zero point) * scale`` in float32, rounded to the dtype of the
    activations: the operand that is multiplied. A kernel that multiplies codes rounds nothing: scales of groups meet
    the sums of their groups, and so do those of rows in groups, with ``row_cols``. Factors that do not change along K
    are not here: they meet the sums.
    """

    rule: str  # of the rooms' `formats`: "fp8", "int8", "uint8", "int4", "mxfp4", "mxfp8", "nvfp4"
    scale: Any  # (E, Nb, Kb) bits
    scale_dtype: str  # what they mean; "uint8" where the rule reads codes
    zero_points: Any  # (E, Nb, Kb) uint8, or None: the middle of the range
    global_scale: Any  # (E,) float32, what `formats.decode` takes: ones
    group_rows: int
    group_cols: int
    integer_rows: bool = False  # the rows that are multiplied are int8 codes, their scales factors of the sums
    row_cols: int = 0  # columns of a group of the rows, if their scales meet the sums of the group; 0: they do not
    panels: Any = None  # how the codes and all that belongs to them are packed; None: they are not
