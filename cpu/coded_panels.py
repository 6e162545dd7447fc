"""
Panels of codes: small formats in the order in which a micro-kernel turns them into numbers in its registers.

A panel has 64 columns, the gate rows of 32 outputs and then their up rows, or 64 rows. It holds all steps of K, and
before those of each group along K the scales of the group, 64 side by side, and its zero points, if there are any: one
stream of bytes, so that nothing is fetched from elsewhere on the way. How a step lies in memory: `_spread.py` for pairs
of bfloat16, `_vector_tile.py` for integers.
"""

import functools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cumoe.cpu import rows as row_loop
from cumoe.cpu._features import cpu_features
from cumoe.cpu._jit import jit
from cumoe.cpu._vector_tile import INTEGERS, Tile

COLUMNS = 64
_KIND = {"int4": "int4", "mxfp4": "e2m1", "nvfp4": "e2m1", "fp8": "fp8", "mxfp8": "fp8", "int8": "int8"}
_KIND["uint8"] = "int8"
_INTEGER_KIND = {"int8": "bytes", "uint8": "bytes", "int4": "nibbles"}
_OF_A_BYTE = "fp8", "int8", "bytes"
_SCALE = {"mxfp4": "e8m0", "mxfp8": "e8m0", "nvfp4": "e4m3"}
_NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FOUR_BITS, _EIGHT_BITS, _PRODUCTS = {"avx512f", "avx512bw"}, {"avx512vbmi"}, {"avx512vnni"}
KERNELS = ("avx512bf16", "avx512")
_INTEGER_COLUMNS = 2**31 // 128**2  # of so many products of two int8 codes a sum may leave int32


class Layout(NamedTuple):
    """How the panels of a weight are made, and what multiplies them."""

    kind: str
    scale: str  # of groups, "" where all of K has one that meets the sums
    has_zeros: bool
    group: int  # columns of a group, 0 without scales
    group_rows: int
    in_parts: bool = False  # the rows have a factor for each group

    @property
    def step(self) -> int:
        """K of a step."""
        return 4 if self.is_integer else 2

    @property
    def step_bytes(self) -> int:
        """Bytes of a step."""
        return self.tile(True).step_bytes

    @property
    def group_steps(self) -> int:
        """Steps of a group, 0 without scales."""
        return self.group // self.step

    @property
    def group_bytes(self) -> int:
        """Bytes of the scales and zero points of a group."""
        return self.tile(True).group_bytes

    def k_padded(self, k: int) -> int:
        """K up to the end of the last step."""
        return -(-k // self.step) * self.step

    def groups(self, k: int) -> int:
        """Groups along K, one at least."""
        return -(-k // self.group) if self.group else 1

    def panel_bytes(self, k: int) -> int:
        """Bytes of a panel."""
        return -(-k // self.step) * self.step_bytes + self.groups(k) * self.group_bytes

    @property
    def is_integer(self) -> bool:
        """Whether rows are integers of eight bits."""
        return self.kind in INTEGERS

    @property
    def spreads(self) -> bool:
        """Whether many rows gain if a panel becomes numbers in memory first: four bits do so as fast on the way."""
        return self.kind in ("fp8", "int8") or self.has_zeros

    def tile(self, narrow: bool) -> Tile:
        """The micro-kernel, for rows of bfloat16 (`narrow`) or float32; of integers there is one."""
        is_wide = not narrow and not self.is_integer
        rows, in_parts = 5 if is_wide or self.has_zeros else 6, self.in_parts
        return Tile(self.kind, rows, 4, 16, True, self.scale, self.has_zeros, is_wide, in_parts=in_parts)

    def tile_of_pairs(self, narrow: bool) -> Tile:
        """The micro-kernel for pairs of bfloat16 that the codes were spread to."""
        kind, rows = ("dot", 6) if narrow else ("bfloat16", 5)
        return Tile(kind, rows, 4, 16, True, self.scale, in_parts=self.in_parts)


def layout(weight_format, k, kernel):
    """The layout of a weight for a micro-kernel, or None if that has to have numbers."""
    f = weight_format
    if f.panels is not None:
        return f.panels._replace(in_parts=f.row_cols > 0)
    if kernel not in KERNELS or not _FOUR_BITS <= cpu_features():
        return None
    # ones where the scales do not change along K: they are factors of the sums
    whole = f.scale_dtype == "float32" and f.scale.shape[1:] == (1, 1) and bool((f.scale == 1).all())
    has_zeros = f.zero_points is not None
    integers = f.integer_rows and not has_zeros and k < _INTEGER_COLUMNS and multiplies_integers()
    kinds = _INTEGER_KIND if integers else _KIND
    kind = kinds.get(f.rule, "")
    if kind == "bytes" and not whole:
        kind = "int8"
    if kind in ("fp8", "int8") and not _EIGHT_BITS <= cpu_features():
        return None
    if not kind or (has_zeros and kind != "int4"):
        return None
    if whole and not has_zeros:
        return Layout(kind, "", False, 0, 1)
    made = Layout(kind, _SCALE.get(f.rule, "float32"), has_zeros, f.group_cols, f.group_rows, f.row_cols > 0)
    return None if f.group_cols % made.step else made


def bits_in_registers():
    """Bits of the codes that become numbers in registers here."""
    needed = {4: _FOUR_BITS, 8: _FOUR_BITS | _EIGHT_BITS}
    return [bits for bits, features in needed.items() if features <= cpu_features()]


def multiplies_integers():
    """Whether a micro-kernel here multiplies integers."""
    return _FOUR_BITS | _PRODUCTS <= cpu_features()


def panel_shape(made, weights_shape, k, gated):
    """Shape of the packed form of codes (E, N, ...) of K columns: (E, panels, bytes)."""
    experts, n = weights_shape[:2]
    outputs, side = (n // 2, COLUMNS // 2) if gated else (n, COLUMNS)
    return experts, -(-outputs // side), made.panel_bytes(k)


def narrowed(made, scale):
    """The layout, and the scales of 16 bits in place of float32 if they are the same numbers: half the bytes."""
    if made.scale == "float32":
        for name, dtype in _NARROW.items():
            with np.errstate(over="ignore"):
                narrow = scale.astype(dtype)
            if (narrow.astype(np.float32) == scale).all():
                return made._replace(scale=name), narrow.view(np.uint16)
    return made, scale


def pack_weights(codes, weight_format, made, k, gated, order, out):
    """Pack codes (E, N, K), or (E, N, K/2) of four bits, into `out` of `panel_shape`; scales as `made` says."""
    f = weight_format
    zeros = np.empty((0, 0, 0), np.uint8) if f.zero_points is None else f.zero_points
    side = COLUMNS // 2 if gated else COLUMNS
    arguments = codes.view(np.uint8), f.scale, zeros, *order, side, made.k_padded(k), out
    row_loop.run(_pack_panels, out.shape[0] * out.shape[1], out.size, arguments, pack=pack_panel(made, f.rule))


@functools.cache
def pack_panel(made, rule):
    """The compiled packer of one panel."""
    template = {"bytes": _fill_bytes, "nibbles": _fill_nibbles, "fp8": _fill_eight, "int8": _fill_eight}
    return jit(
        inner=True,
        fill=jit(inner=True, change=_CHANGES[rule, made.kind])(template.get(made.kind, _fill_four)),
        step=made.step,
        step_bytes=made.step_bytes,
        group=made.group,
        group_rows=made.group_rows,
        scale_bytes=made.group_bytes - COLUMNS * made.has_zeros,
        has_zeros=made.has_zeros,
        columns_per_byte=1 if made.kind in _OF_A_BYTE else 2,
    )(_pack_panel)


@jit(inline=True)
def _same(code):
    return code


@jit(inline=True)
def _sign_and_size(code):
    """int8 for `_spread.py`: -128 becomes -0."""
    return code if code < 128 else np.uint8(np.uint8(128) | np.uint8(np.uint8(0) - code))


@jit(inline=True)
def _other_sign(code):
    return np.uint8(code ^ np.uint8(128))


@jit(inline=True)
def _sign_and_size_of_unsigned(code):
    return _sign_and_size(_other_sign(code))


_CHANGES = {(rule, kind): _same for rule in _KIND for kind in ("int4", "e2m1", "fp8", "nibbles")}
_CHANGES |= {("int8", "int8"): _sign_and_size, ("uint8", "int8"): _sign_and_size_of_unsigned}
_CHANGES |= {("int8", "bytes"): _other_sign, ("uint8", "bytes"): _same}


@jit()
def _row_of(column, panel, first_gate, first_up, distance, outputs, side):
    """Which row of the weights is a column of a panel, -1 for none."""
    i = panel * side + column % side
    if i >= outputs:
        return -1
    return (first_gate if column < side else first_up) + i * distance


# ---- templates; jit(...) gives the names below their values ----

change = fill = pack = None
step = step_bytes = group_rows = columns_per_byte = 1
group = scale_bytes = 0
has_zeros = False


def _pack_panels(first, last, arguments):
    codes, scale, zeros, first_gate, first_up, distance, outputs, side, k_padded, out = arguments
    panels = out.shape[1]
    flat = out.reshape(out.shape[0] * panels, out.shape[2])
    for job in range(first, last):
        order = first_gate, first_up, distance, outputs, side
        pack(codes, scale, zeros, job // panels, job % panels, order, k_padded, flat[job])


def _pack_panel(codes, scale, zeros, expert, panel, order, k_padded, target):
    """Panel `panel` of an expert into bytes; `order` is that of the rows, the outputs, and those of a panel."""
    rows = np.empty(64, np.int64)
    for c in range(64):
        rows[c] = _row_of(c, panel, *order)
    target[:] = 0
    if group == 0:
        fill(codes[expert], rows, target)
        return
    at, width = 0, group // columns_per_byte
    for g in range((k_padded + group - 1) // group):
        scales = target[at : at + scale_bytes].view(scale.dtype)
        for c in range(64):
            scales[c] = scale[expert, rows[c] // group_rows, g] if rows[c] >= 0 else 0
        at += scale_bytes
        if has_zeros:
            for c in range(64):
                target[at + c] = zeros[expert, rows[c] // group_rows, g] if rows[c] >= 0 else np.uint8(0)
            at += 64
        fill(codes[expert, :, g * width : (g + 1) * width], rows, target[at:])
        at += group // step * step_bytes


def _fill_four(codes, rows, target):
    size, words = codes.shape[1], target.view(np.uint32)
    for c in range(16):
        for v in range(4):
            row = rows[16 * v + c]
            if row >= 0:
                for s in range(size):
                    pair = np.uint32(codes[row, s])
                    both = np.uint32((pair & np.uint32(15)) | (pair >> np.uint32(4)) << np.uint32(16))
                    words[16 * s + c] |= np.uint32(both << np.uint32(4 * v))


def _fill_eight(codes, rows, target):
    size = codes.shape[1]
    for column in range(64):
        row, v, c = rows[column], column // 16, column % 16
        if row >= 0:
            at = 64 * (v // 2) + 16 * (c // 4) + 8 * (v % 2) + 2 * (c % 4)
            for k in range(size):
                target[128 * (k // 2) + at + k % 2] = change(codes[row, k])


def _fill_bytes(codes, rows, target):
    size = codes.shape[1]
    for column in range(64):
        if rows[column] >= 0:
            for k in range(size):
                target[256 * (k // 4) + 4 * column + k % 4] = change(codes[rows[column], k])


def _fill_nibbles(codes, rows, target):
    size = codes.shape[1]
    for column in range(64):
        row, v, c = rows[column], column // 16, column % 16
        if row >= 0:
            shift = np.uint8(4 * (v % 2))
            for b in range(size):
                at = 128 * (b // 2) + 64 * (v // 2) + 4 * c + 2 * (b % 2)
                target[at] |= np.uint8(np.uint8(codes[row, b] & np.uint8(15)) << shift)
                target[at + 1] |= np.uint8(np.uint8(codes[row, b] >> np.uint8(4)) << shift)
