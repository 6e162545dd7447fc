"""What a kernel with coded_weights.cuh is compiled with and launched with."""

import math

PIECE = 16  # codes that a thread decodes at a time; twin of PIECE
BITS = {"fp8": 8, "int8": 8, "uint8": 8, "int4": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}  # of a code, by rule


def constants(rule, group_cols, parted=0):
    """Macros; `rule` "" for weights that are numbers already."""
    alike = math.gcd(PIECE, group_cols)
    return {"CODED": int(bool(rule)), "RULE": rule or "fp8", "ALIKE": alike, "PARTED": parted}


def parted(weight_format, k):
    """Whether sums of parts of `k` elements meet factors of rows: 0 no, 1 yes, 2 and the scales of the weights too."""
    f = weight_format
    if f is None or not f.row_cols:
        return 0
    alike = f.group_cols % f.row_cols == 0 or f.group_cols >= k
    return 2 if f.scale is not None and f.zero_points is None and f.rule in ("", "fp8", "int8") and alike else 1


def expanded(weight_format, k):
    """Arguments of `formats.decode` before its dtype for the numbers of a weight, and the format that these have."""
    f = weight_format
    if parted(f, k) == 2:  # the scales stay behind
        ones = f.global_scale.reshape(-1, 1, 1)
        how = ones, "float32", None, f.global_scale, 2**31 - 1, 2**31 - 1, f.rule
        return how, f._replace(rule="")
    how = f.scale, f.scale_dtype, f.zero_points, f.global_scale, f.group_rows, f.group_cols, f.rule
    return how, f._replace(rule="", scale=None) if f.row_cols else None


def of_format(weight_format, k):
    """Rule, or "" without a format, and columns of a group of rows of `k` elements."""
    if weight_format is None or not weight_format.rule:
        return "", k
    return weight_format.rule, weight_format.group_cols if weight_format.group_cols < k else PIECE * -(-k // PIECE)


def arguments(weight_format, num_rows, k):
    """Scales and zero points; rows, columns, and groups along both axes of a matrix; elements of a part of a row."""
    f = weight_format
    if f is None:
        return (None, None), (1, 1, 1, 1, k)
    rows, cols = min(f.group_rows, num_rows), min(f.group_cols, k)
    return (f.scale, f.zero_points), (rows, cols, -(-num_rows // rows), -(-k // cols), f.row_cols or k)
