"""Rows that are quantised before a product: every kind, by the room's one function and step by step."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16
import numpy as np

from cumoe import GroupShape, _arrays
from cumoe._schemes import SCHEMES, code_rule, scale_rule

DTYPES = ("float32", "float16", "bfloat16")
CODED = ("mxfp4", "mxfp8", "nvfp4")  # schemes whose scales are codes


class Kind(NamedTuple):
    """How rows are quantised; a group of 0 columns is a whole row."""

    scheme: str
    cols: int = 0
    scale: str = "of each group"
    by_row: bool = False  # whether each row has a global scale

    def __str__(self):
        return f"{self.scheme}-{self.cols or 'K'}-{'by row' if self.by_row else self.scale}".replace(" ", "_")

    @property
    def rules(self):
        """Names of the rules: of numbers, scales and codes."""
        shape = GroupShape(1, self.cols or -1) if self.scale == "of each group" else GroupShape.PER_TENSOR
        is_static = self.scale == "static"
        return self.scheme, scale_rule(self.scheme, shape, False, False), code_rule(self.scheme, shape, is_static)


KINDS = [
    *(Kind(scheme, scale=scale) for scheme in ("fp8", "int8") for scale in ("of each group", "static", "of all rows")),
    *(Kind(scheme, cols) for scheme in ("fp8", "int8") for cols in (128, 48, 5)),
    *(Kind("mxfp4", 32), Kind("mxfp8", 32), Kind("nvfp4", 16), Kind("nvfp4", 16, by_row=True)),
]


class Given(NamedTuple):
    """Arguments beside the rows: a scale for all, global scales."""

    scale: object
    global_scale: object


def given_scales(xp, kind, x, dtype):
    """What `kind` asks for, for rows `x`; the scale of all rows is found in them."""
    num_rows = len(x)
    scale = xp.asarray(np.array([0.0173], np.float32)) if kind.scale == "static" else None
    if kind.scale == "of all rows":
        low, high, scale = xp.empty((3, 1, 1, 1), np.float32)
        room = _arrays.room(xp, "formats")
        room.extremes(x[None], dtype, max(num_rows, 1), max(x.shape[1], 1), low, high)
        room.scales(low, high, None, kind.rules[1], "float32", scale)
        scale = scale.reshape(1)
    sizes = 300 * (1 + np.arange(num_rows if kind.by_row else 1, dtype=np.float32) / 7)
    return Given(scale, xp.asarray(sizes) if kind.scheme == "nvfp4" else None)


def at_once(xp, kind, x, dtype, given, numbers=None):
    """Numbers and factors of the rows `x`, bits of `dtype`; in place if ``numbers`` is `x`."""
    numbers = xp.empty_like(x) if numbers is None else numbers
    factor = xp.empty(0 if kind.cols else len(x), np.float32)
    cols = kind.cols or x.shape[1]
    _arrays.room(xp, "formats").quantise_rows(x, dtype, *kind.rules, cols, *given, numbers, factor)
    return numbers, factor


def step_by_step(xp, kind, x, dtype, given):
    """The same by `extremes`, `scales`, `encode` and `decode`; packed codes need an even number of columns."""
    room, (num_rows, size), cols = _arrays.room(xp, "formats"), x.shape, kind.cols or x.shape[1]
    one, (worth, scales, codes) = xp.ones(1, np.float32), kind.rules
    lead = (num_rows, 1) if kind.by_row else (1, num_rows)  # each row a matrix with a global scale, or one matrix
    scale_dtype = "uint8" if kind.scheme in CODED else "float32"
    x, across = x.reshape(*lead, size), -(-size // cols)
    low, high = xp.empty((2, *lead, across), np.float32)
    scale = xp.empty((*lead, across), scale_dtype)
    limits = one if given.global_scale is None else given.global_scale
    if given.scale is None:
        room.extremes(x, dtype, 1, cols, low, high)
        room.scales(low, high, given.global_scale, scales, scale_dtype, scale)
    else:
        scale[...] = given.scale
    rule = SCHEMES[kind.scheme]
    coded = xp.empty((*lead, size // 2 if rule.is_packed else size), np.int8 if kind.scheme == "int8" else np.uint8)
    room.encode(x, dtype, scale, scale_dtype, None, limits, 1, cols, codes, coded)
    factor = scale.reshape(-1)
    if not kind.cols:
        scale = xp.ones_like(scale)
    else:
        factor = factor[:0].astype(np.float32)
    scale, coded = scale.reshape(1, num_rows, across), coded.reshape(1, num_rows, -1)
    numbers = xp.empty((1, num_rows, size), x.dtype)
    room.decode(coded, scale, scale_dtype, None, one, 1, cols, worth, dtype, numbers)
    return numbers[0], factor


def drawn_rows(rng, num_rows, size, dtype):
    """Rows of every magnitude, as bits: numbers, ties of all formats, zeros of both signs, subnormals."""
    shape = num_rows, size
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, (num_rows, 1))
    x = np.where(rng.random(shape) < 0.3, np.rint(x * 8) / 8, x)
    x = np.where(rng.random(shape) < 0.1, rng.choice([0.0, -0.0, 1e-40, -3e-8], shape), x)
    x *= rng.random((num_rows, 1)) < 0.9
    return x.astype(np.float32).astype(dtype).view(np.float32 if dtype == "float32" else np.uint16)


def on_every_kernel(xp, rng):
    """Rows in the registers of a part of a warp, a warp and a block, and longer ones; to other memory and in place."""
    for kind in KINDS:
        for dtype in DTYPES:
            for shape in ((0, 64), (3, 38), (5, 264), (2, 1064), (2, 9000)):
                x = xp.asarray(drawn_rows(rng, *shape, dtype))
                given = given_scales(xp, kind, x, dtype)
                at_once(xp, kind, x, dtype, given)
                at_once(xp, kind, x, dtype, given, x)
