"""Products of rows in groups: the scales of these, and of the weights, meet the sums of parts of K."""

from typing import NamedTuple

import coded_products
import numpy as np
import pytest
from coded_products import GPU_KERNELS, Format, coded_product
from products import law

from cumoe.cpu import coded_panels, microkernel
from cumoe.rawkernels import _coded_weights
from cumoe.reference import experts
from cumoe.reference.rounding import gamma

__all__ = ["FORMATS", "GPU_KERNELS", "ON_CPU", "Parted", "heights", "of_every_kind", "on_every_tile", "parted_product"]

# weights whose scales do not change within a part, and, from the fifth on, others, whose numbers the GPU rounds before
FORMATS = [
    (Format("fp8", 128, 128), 128),
    (Format("int8", 48, 128), 64),
    (Format("fp8"), 128),
    (Format("int8", 1, 256), 256),
    (Format("int4", 1, 32), 128),
    (Format("int4", 1, 64, True), 64),
    (Format("uint8", 1, 64, True), 64),
    (Format("fp8", 3, 40), 192),
]
EXACT = 4
ON_CPU = [
    (dtype, name)
    for dtype in ("float32", "float16", "bfloat16")
    for name in microkernel.names(dtype)
    if name in coded_panels.KERNELS
]


class Parted(NamedTuple):
    """A product as `products.OnSide`, and what the law needs to know of it."""

    side: object
    exact: object  # as `products.Product`, with the numbers of the weights
    x: experts.Bounded  # rows times their factors; with room for the roundings of one part more

    def __str__(self):
        form = self.side.weight_format
        return f"{form.rule} and rows in groups of {form.row_cols} on tiles of {self.side.block_rows} rows"

    def law(self):
        return law(self.exact, self.side.kernel, self.x)

    def is_wrong(self):
        """Whether any element is beyond its bound."""
        exact = self.law()
        return experts.ratio(self.side()[: len(exact.value)], exact).max(initial=0) > 1


def parted_product(xp, seed, which, dtype, kernel, num_tokens, outputs, k, activation="", expands=False, **parts):
    """Put the product of a format to `xp`; `parts` are those of `coded_product`. If it `expands`, codes do so first."""
    how, row_cols = FORMATS[which]
    product = coded_product(
        xp, seed, how, dtype, kernel, num_tokens, outputs, k, activation, integer_rows=True, **parts
    )
    num_groups = -(-k // row_cols)
    shape = len(product.exact.x), -(-num_groups // 4) * 4
    factor = np.random.default_rng(seed).random(shape, np.float32) / 8 + np.float32(2**-8)
    x = product.exact.x.astype(np.float64) * np.repeat(factor[:, :num_groups], row_cols, axis=1)[:, :k]
    form = product.codes.weight_format._replace(integer_rows=False, row_cols=row_cols)
    if not product.codes.room.scales_parts(form, row_cols, kernel):
        pytest.skip("this kernel rounds rows that hold their scales")
    exact = product.exact
    if xp is not np and _coded_weights.parted(form, k) == 1:
        exact = exact._replace(weights=product.worth.astype(np.float64))
    side = product.codes._replace(x=product.numbers.x, weight_format=form, row_factor=xp.asarray(factor))
    if expands:
        side = side._replace(expanded=xp.full(exact.weights.shape, 7, side.x.dtype))
    return Parted(side, exact, experts.Bounded(x, gamma(8) * np.abs(x)))


def heights(kernel, expands):
    """Rows that tiles of a kernel of the GPU may have."""
    from cumoe.rawkernels import _grouped_gemm_mma, _grouped_gemm_wgmma

    return _grouped_gemm_wgmma.heights(not expands, True) if kernel == "wgmma" else _grouped_gemm_mma._HEIGHTS


def on_every_tile(xp, kernel, dtype):
    """Small products on tiles of each height, one after the other of each format: first ones and second ones."""
    for expands in (False, True):
        for i, height in enumerate(heights(kernel, expands)):
            given, more = (xp, i), {"bias": i % 2 == 1, "block_rows": height, "expands": expands}
            sizes = dtype, kernel, height + 5
            yield parted_product(*given, i % EXACT, *sizes, 136, 352, "silu", **more)
            more |= {"output_scale": True, "in_place": True}
            yield parted_product(*given, (i + 1) % EXACT, *sizes, 264, 160, **more)
            more["column_factor"] = True
            yield parted_product(*given, EXACT + i % (len(FORMATS) - EXACT), *sizes, 72, 320, **more)


def of_every_kind(xp, kernel, dtype, heights):
    """The same of weights whose rows are numbers, on tiles of `heights`, and then these."""
    yield from coded_products.on_every_tile(xp, kernel, dtype, heights)
    yield from on_every_tile(xp, kernel, dtype) if heights else ()
