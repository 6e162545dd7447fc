"""Launches format_*.cu: extremes of groups, their scales and zero points, codes of numbers, and back; rows at once."""

import math
from typing import NamedTuple

import numpy as np

from cumoe.rawkernels import _load

_BLOCK = 256
_WARP = 32
_WIDEST_BYTES = 16  # of one load or store
_MOST_WIDTH = 16  # elements that a thread encodes or decodes
_BLOCKS_A_MULTIPROCESSOR = 8  # 2048 threads, as many as there is room for
_KEPT = 4  # pieces of a row that a thread holds in registers, as in format_rows.cu
_PIECES_A_THREAD = 4  # at least, where several blocks share a group
_MOST_PARTS = 32_768  # blocks along that axis of the grid, a power of two
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_BY_MATRIX = ("nvfp4",)  # rules that read a number of the matrix
_ROWS = (  # scheme, rules of scales and of codes, whether the scale is given; elements of a group
    *(("fp8", "fp8", "fp8", False, size) for size in (512, 4096)),
    *(("int8", "int8", "int8_away", False, size) for size in (512, 4096)),
    *(("fp8", "fp8", rule, True, size) for rule in ("fp8", "fp8_static") for size in (512, 4096)),
    *(("int8", "int8", "int8_even", True, size) for size in (512, 4096)),
    ("fp8", "fp8_group", "fp8", False, 128),
    ("int8", "int8", "int8_truncate", False, 128),
    ("mxfp4", "mxfp4", "mxfp4", False, 32),
    ("mxfp8", "mxfp8", "mxfp8", False, 32),
    ("nvfp4", "nvfp4", "nvfp4", False, 16),
)


class _Groups(NamedTuple):
    """How an operand is cut: N and K, rows and columns of a group, and groups along N and along K."""

    num_rows: int
    size: int
    rows: int
    cols: int
    down: int
    across: int

    def arguments(self, width):
        """As the kernels take them: along K in pieces of `width` elements."""
        return self.num_rows, self.size // width, self.rows, self.cols // width, self.down, self.across


def extremes(x, dtype, group_rows, group_cols, low, high):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    if low.size == 0:
        return
    if x.size == 0:
        low.fill(0)
        high.fill(0)
        return
    groups = _groups(x.shape, group_rows, group_cols)
    width = _width(groups, _WIDEST_BYTES // _ITEMSIZE[dtype])
    across = groups.cols // width
    team, parts = _team(groups.rows * across, low.size, _load.multiprocessors(x.device.id))
    if parts > 1:  # blocks combine what they find with what is there
        low.fill(0)
        high.fill(0)
    _load.kernel("format_extremes.cu", "extremes", **_of_extremes(dtype, width, team, _aligned(x)))(
        (-(-low.size // (_BLOCK // team)), parts),
        _BLOCK,
        x,
        low,
        high,
        low.size,
        *groups.arguments(width),
        min((across - 1).bit_length(), (team * parts).bit_length() - 1),
        overlap=True,
    )


def scales(low, high, limits, rule, dtype, out):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    if out.size == 0:
        return
    kernel = _load.kernel("format_scales.cu", "scales", **_of_scales(dtype, rule))
    arrays = low, high, limits, out
    kernel(-(-out.size // _BLOCK), _BLOCK, *arrays, out.size, out.size // out.shape[0], overlap=True)


def quantise_rows(x, dtype, scheme, scale_rule, code_rule, group_cols, scale, global_scale, numbers, factor):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    num_rows, size = x.shape
    if num_rows == 0 or x.size + factor.size == 0:
        return
    cols, across = (min(group_cols, size), -(-size // group_cols)) if group_cols else (size, 1)
    stride, groups_a_row = factor.size // num_rows, across
    is_by_row = global_scale is not None and len(global_scale) > 1
    if size == across * cols and not is_by_row:  # then the groups do not know of the rows
        num_rows, size, across = num_rows * across, cols, 1
    width = math.gcd(_WIDEST_BYTES // _ITEMSIZE[dtype], size, cols)
    pieces = cols // width
    team = _row_team(pieces)
    rules = scheme, scale_rule, code_rule, scale is not None
    _load.kernel("format_rows.cu", "quantise_rows", **_of_rows(dtype, *rules, width, team, _aligned(x, numbers)))(
        -(-num_rows * across // (_BLOCK // team)),
        _BLOCK,
        x,
        scale,
        global_scale,
        numbers,
        factor if factor.size else None,
        num_rows * across,
        across,
        size // width,
        pieces,
        int(is_by_row),
        groups_a_row,
        stride,
        overlap=True,
    )


def zero_points(low, scale, dtype, most, out):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    if out.size == 0:
        return
    rule = "int4_zero_points" if most == 15 else "uint8_zero_points"  # it is compiled with the scales of these
    kernel = _load.kernel("format_scales.cu", "zero_points", **_of_scales(dtype, rule))
    kernel(-(-out.size // _BLOCK), _BLOCK, low, scale, out, out.size, np.float32(most), overlap=True)


def encode(x, dtype, scale, scale_dtype, zero_points, global_scale, group_rows, group_cols, rule, out):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    if out.size == 0:
        return
    groups = _groups(x.shape, group_rows, group_cols, rule in _BY_MATRIX)
    width = _width(groups, _MOST_WIDTH)
    constants = _of_codes(dtype, scale_dtype, rule, width, _aligned(x, out))
    arrays = x, scale, zero_points, global_scale, out
    _launch(_load.kernel("format_encode.cu", "encode", **constants), arrays, x.size // width, groups.arguments(width))


def decode(codes, scale, scale_dtype, zero_points, global_scale, group_rows, group_cols, rule, dtype, out):
    """As the twin in cumoe.cpu.formats, on the current stream."""
    if out.size == 0:
        return
    groups = _groups(out.shape, group_rows, group_cols, rule in _BY_MATRIX)
    width = _width(groups, _MOST_WIDTH)
    constants = _of_codes(dtype, scale_dtype, rule, width, _aligned(codes, out))
    arrays = codes, scale, zero_points, global_scale, out
    _launch(_load.kernel("format_decode.cu", "decode", **constants), arrays, out.size // width, groups.arguments(width))


def variants(arch):
    """Every rule for rows and groups that allow wide loads, and one of each kernel that does not."""
    for dtype, itemsize in _ITEMSIZE.items():
        for team in (2, _WARP, _BLOCK):
            yield "format_extremes.cu", "extremes", _of_extremes(dtype, _WIDEST_BYTES // itemsize, team)
        for rule in ("int4", "int4_zero_points", "uint8", "uint8_zero_points"):
            yield "format_scales.cu", "scales", _of_scales(dtype, rule)
            yield "format_scales.cu", "zero_points", _of_scales(dtype, rule)
        for rule in ("fp8", "fp8_static", "int8_even", "int8_away", "int8_truncate"):
            yield "format_encode.cu", "encode", _of_codes(dtype, "float32", rule, _MOST_WIDTH)
        for rule in ("fp8", "int8"):
            yield "format_decode.cu", "decode", _of_codes(dtype, "float32", rule, _MOST_WIDTH)
        for rule, scale in (
            ("int4", dtype),
            ("uint8", dtype),
            ("mxfp4", "uint8"),
            ("mxfp8", "uint8"),
            ("nvfp4", "uint8"),
        ):
            yield "format_encode.cu", "encode", _of_codes(dtype, scale, rule, _MOST_WIDTH)
            yield "format_decode.cu", "decode", _of_codes(dtype, scale, rule, _MOST_WIDTH)
        for *rules, elements in _ROWS:
            width = _WIDEST_BYTES // itemsize
            yield "format_rows.cu", "quantise_rows", _of_rows(dtype, *rules, width, _row_team(-(-elements // width)))
    for rule in ("fp8", "fp8_ue8m0", "fp8_group", "fp8_group_ue8m0", "int8", "nvfp4_global"):
        yield "format_scales.cu", "scales", _of_scales("float32", rule)
    for rule in ("mxfp4", "mxfp8", "nvfp4"):
        yield "format_scales.cu", "scales", _of_scales("uint8", rule)
    yield "format_extremes.cu", "extremes", _of_extremes("bfloat16", 1, 1)
    yield "format_rows.cu", "quantise_rows", _of_rows("bfloat16", "fp8", "fp8", "fp8", False, 1, _BLOCK, 2)
    for constants in (_of_codes("float16", "float32", "fp8", 1), _of_codes("float16", "uint8", "mxfp4", 2, 2)):
        yield "format_encode.cu", "encode", constants
        yield "format_decode.cu", "decode", constants


def _launch(kernel, arrays, pieces, groups):
    kernel(-(-pieces // _BLOCK), _BLOCK, *arrays, pieces, *groups, overlap=True)


def _groups(shape, group_rows, group_cols, by_matrix=False):
    """
    The fewest and longest rows with the same groups in the same order: what is cut into pieces, and little to divide.

    Groups of one row do not know of the matrices, unless `by_matrix`; where they leave no rest, nor of the rows.
    """
    matrices, num_rows, size = shape
    rows, cols = min(group_rows, num_rows), min(group_cols, size)
    if rows == 1 and not by_matrix:
        num_rows *= matrices
    if rows == 1 and size % cols == 0:
        num_rows, size = 1, num_rows * size
    elif (rows, cols) == (num_rows, size):
        num_rows, rows, size, cols = 1, 1, num_rows * size, num_rows * size
    return _Groups(num_rows, size, rows, cols, -(-num_rows // rows), -(-size // cols))


def _width(groups, most):
    """Elements of a piece: a power of two that divides rows and groups."""
    return math.gcd(most, groups.size, groups.cols)


def _aligned(*arrays):
    """Bytes of the widest load or store that their addresses allow."""
    return math.gcd(_WIDEST_BYTES, *(array.data.ptr for array in arrays))


def _team(pieces, groups, multiprocessors):
    """Threads for each group of so many pieces, and how many such teams share one."""
    if pieces < _BLOCK:
        return min(_WARP, 1 << (pieces.bit_length() - 1)), 1
    wanted = -(-multiprocessors * _BLOCKS_A_MULTIPROCESSOR // groups)
    parts = max(1, min(wanted, pieces // (_BLOCK * _PIECES_A_THREAD), _MOST_PARTS))
    return _BLOCK, 1 << (parts.bit_length() - 1)


def _row_team(pieces):
    """Threads for each group of a row of so many pieces."""
    if pieces > _WARP * _KEPT:
        return _BLOCK
    return min(_WARP, 1 << max(pieces - 1, 0).bit_length())


def _of_extremes(dtype, width, team, aligned=_WIDEST_BYTES):
    return {"X": dtype, "WIDTH": width, "TEAM": team, "ALIGNED": aligned, "BLOCK": _BLOCK}


def _of_scales(dtype, rule):
    return {"S": dtype, "RULE": rule, "BLOCK": _BLOCK}


def _of_rows(dtype, scheme, scale_rule, code_rule, is_given, width, team, aligned=_WIDEST_BYTES):
    rules = {"SCHEME": scheme, "SCALE": "fp8" if is_given else scale_rule, "CODE": code_rule, "GIVEN": int(is_given)}
    return {"X": dtype, **rules, "WIDTH": width, "TEAM": team, "ALIGNED": aligned, "BLOCK": _BLOCK}


def _of_codes(dtype, scale_dtype, rule, width, aligned=_WIDEST_BYTES):
    return {"X": dtype, "S": scale_dtype, "RULE": rule, "WIDTH": width, "ALIGNED": aligned, "BLOCK": _BLOCK}
