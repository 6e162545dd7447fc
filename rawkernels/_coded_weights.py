"""What a kernel with coded_weights.cuh is compiled with and launched with."""

import math

PIECE = 16  # codes that a thread decodes at a time; twin of PIECE
BITS = {"fp8": 8, "int8": 8, "uint8": 8, "int4": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}  # of a code, by rule


def constants(rule, group_cols):
    """Macros; `rule` "" for weights that are numbers already."""
    alike = math.gcd(PIECE, group_cols)
    return {"CODED": int(bool(rule)), "RULE": rule or "fp8", "ALIKE": alike}


def of_format(weight_format, k):
    """Rule, or "" without a format, and columns of a group of rows of `k` elements."""
    if weight_format is None:
        return "", k
    return weight_format.rule, weight_format.group_cols if weight_format.group_cols < k else PIECE * -(-k // PIECE)


def arguments(weight_format, num_rows, k):
    """Scales and zero points, then rows, columns, and groups along both axes of a matrix."""
    f = weight_format
    if f is None:
        return (None, None), (1, 1, 1, 1)
    rows, cols = min(f.group_rows, num_rows), min(f.group_cols, k)
    return (f.scale, f.zero_points), (rows, cols, -(-num_rows // rows), -(-k // cols))
