"""Products whose weights are codes of a small format, and what the codes are worth."""

from typing import NamedTuple

import numpy as np
from products import GPU_KERNELS, assert_within, bits, law, make_product, on_side
from sides import back

from cumoe import _arrays
from cumoe._weight_format import WeightFormat
from cumoe.cpu import coded_panels
from cumoe.reference import formats, quantised

__all__ = ["FORMATS", "GPU_KERNELS", "Format", "assert_right", "coded_product", "on_every_tile"]

PACKED = ("int4", "mxfp4", "nvfp4")


class Format(NamedTuple):
    """How weights are coded; a group of 0 columns is a whole row."""

    rule: str
    group_rows: int = 1
    group_cols: int = 0
    zero_points: bool = False

    def __str__(self):
        zeros = "-zeros" if self.zero_points else ""
        return f"{self.rule}-{self.group_rows}x{self.group_cols or 'K'}{zeros}"


FORMATS = [
    Format("fp8", 128, 128),
    Format("fp8"),
    Format("int8", 3, 40),
    Format("int4", 1, 32),
    Format("int4", 1, 64, True),
    Format("uint8", 128, 128),
    Format("uint8", 1, 64, True),
    Format("mxfp4", 1, 32),
    Format("mxfp8", 1, 32),
    Format("nvfp4", 1, 16),
]


def coded(seed, shape, how, dtype):
    """Codes for weights (E, N, K) and a `WeightFormat`, NumPy arrays; numbers of order ``K ** -0.5``, none infinite."""
    rng = np.random.default_rng(seed)
    e, n, k = shape
    rows, cols = how.group_rows, how.group_cols or k
    groups = e, -(-n // rows), -(-k // cols)
    codes = rng.integers(0, 256, (e, n, k // 2 if how.rule in PACKED else k), np.uint8)
    if how.rule in ("fp8", "mxfp8"):
        codes[codes & 0x7F == 0x7F] = 0x31  # for NaN
    size = {"fp8": 448, "mxfp8": 448, "int8": 127, "uint8": 128, "int4": 8}.get(how.rule, 6) * k**0.5
    scale_dtype, global_scale = "float32", np.ones(e, np.float32)
    scale = ((rng.random(groups, np.float32) + np.float32(0.5)) / np.float32(size)).astype(np.float32)
    if how.rule in ("int4", "uint8"):
        scale = scale.astype(dtype).astype(np.float32)  # as checkpoints store them
    elif how.rule.startswith("mx"):
        scale_dtype, scale = "uint8", (127 - np.log2(size) + rng.integers(-2, 2, groups)).astype(np.uint8)
    elif how.rule == "nvfp4":  # e4m3 codes of 2**-6 to 2**-3
        scale_dtype, scale = "uint8", rng.integers(0x08, 0x20, groups, np.uint8)
    most = 16 if how.rule == "int4" else 256
    zeros = rng.integers(0, most, groups, np.uint8) if how.zero_points else None
    return codes, WeightFormat(how.rule, scale, scale_dtype, zeros, global_scale, rows, cols)


class Coded(NamedTuple):
    """A product as `products.OnSide`, once with the codes and once with the numbers that they stand for."""

    codes: object
    numbers: object
    worth: np.ndarray  # the numbers
    exact: object  # the product of exact numbers, as `products.Product`

    def __str__(self):
        return f"{self.codes.weight_format.rule} codes on tiles of {self.codes.block_rows} rows"

    def is_wrong(self):
        """Whether codes that become numbers first give other bits than these."""
        return self.codes().tobytes() != self.numbers().tobytes()


def coded_product(xp, seed, how, dtype, kernel, num_tokens, outputs, k, activation="", num_experts=3, **parts):
    """
    Put a product of codes to `xp`; `parts` are those of `make_product`, `block_rows`, and `integer_rows`.

    With `integer_rows`, rows are integers of -127 to 127.
    """
    integer_rows = parts.pop("integer_rows", False)
    other = {name: parts.pop(name) for name in ("block_rows",) if name in parts}
    p = make_product(seed, num_tokens, 2, num_experts, outputs, k, dtype, activation, **parts)
    if integer_rows:
        p = p._replace(x=np.clip(np.nan_to_num(p.x.astype("f4") * 40).round(), -127, 127).astype(dtype))
    codes, form = coded(seed, p.weights.shape, how, dtype)
    form = form._replace(integer_rows=integer_rows)
    exact = p._replace(weights=np.stack([weights_of(codes, form).numbers(e) for e in range(num_experts)]))
    codes = xp.asarray(codes.view(np.int8) if how.rule == "int8" else codes)
    arrays = {name: getattr(form, name) for name in ("scale", "zero_points", "global_scale")}
    form = form._replace(**{name: None if array is None else xp.asarray(array) for name, array in arrays.items()})
    numbers = bits(xp, np.full(p.weights.shape, 7, dtype))
    decode(xp, codes, form, dtype, numbers)
    worth = back(numbers).view(dtype)
    plain = on_side(xp, p._replace(weights=worth), dtype, kernel, **other)
    product = plain._replace(weights=codes, weight_format=form)
    if integer_rows and plain.room.takes_bytes(form, k, kernel):
        product = product._replace(x=back(plain.x).view(dtype).astype(np.int8))
    return Coded(product, plain, worth, exact)


def decode(xp, codes, form, dtype, numbers):
    """Fill `numbers` with the bits that codes stand for."""
    given = form.scale, form.scale_dtype, form.zero_points, form.global_scale, form.group_rows, form.group_cols
    _arrays.room(xp, "formats").decode(codes, *given, form.rule, dtype, numbers)


def weights_of(codes, form):
    """Codes and their format in the words of the law."""
    codes = formats.unpack(codes, -1) if form.rule in PACKED else codes.view(np.int8) if form.rule == "int8" else codes
    given = form.scale, form.zero_points, form.group_rows, form.group_cols, np.empty((0, 0))
    return quantised.Weights(form.rule, codes, *given)


def assert_right(product):
    """
    The bits of the product of the numbers; or, where codes are multiplied as they are, exact ones within the bound.
    """
    side = product.codes
    out = side()
    k = product.exact.x.shape[1]
    if isinstance(side.x, np.ndarray) and coded_panels.layout(side.weight_format, k, side.kernel):
        assert_within(out, law(product.exact, side.kernel))
    else:
        assert out.tobytes() == product.numbers().tobytes()
    return out


def on_every_tile(xp, kernel, dtype, heights):
    """Small products on tiles of each height, one after the other of each format: first ones and second ones."""
    for i, height in enumerate(heights):
        first, second = FORMATS[i % len(FORMATS)], FORMATS[-1 - i % len(FORMATS)]
        given, more = (xp, i), {"bias": i % 2 == 1, "block_rows": height}
        yield coded_product(*given, first, dtype, kernel, height + 5, 136, 96, "silu", row_factor=True, **more)
        more |= {"output_scale": True, "in_place": True}
        yield coded_product(*given, second, dtype, kernel, height + 5, 264, 96, column_factor=True, **more)
