"""Rows in groups of which each has a scale: sums of parts of K are scaled, and no operand is rounded."""

import itertools

import numpy as np
import pytest
from parted_products import FORMATS, ON_CPU, heights, on_every_tile, parted_product
from products import ON_GPU, assert_within, on_kernels

import cumoe
from cumoe import _arrays, _layer_scheme
from cumoe.rawkernels import _coded_weights, grouped_gemm
from cumoe.reference import experts
from cumoe.reference.rounding import unit

EVERY_KERNEL = [*(("numpy", *one) for one in ON_CPU), *ON_GPU]
SHAPES = ((1, 8, 32), (3, 72, 352), (200, 136, 640))


def check(xp, which, dtype, kernel, *sizes, **parts):
    product = parted_product(xp, sizes[-1], which, dtype, kernel, *sizes, **parts)
    out = product.side()
    assert_within(out, product.law())
    assert product.side().tobytes() == out.tobytes()
    return out


@on_kernels(EVERY_KERNEL)
@pytest.mark.parametrize("which", range(len(FORMATS)), ids=lambda i: str(FORMATS[i][0]))
def test_every_format_on_every_kernel(xp, dtype, kernel, which):
    for sizes, expands in itertools.product(SHAPES, (False, True) if xp is not np else (False,)):
        check(xp, which, dtype, kernel, *sizes, expands=expands)
        check(xp, which, dtype, kernel, *sizes, activation="silu", expands=expands, bias=True, column_factor=True)
        check(xp, which, dtype, kernel, *sizes, expands=expands, in_place=True, output_scale=True)


@on_kernels(ON_GPU)
def test_every_tile(xp, dtype, kernel):
    for product in on_every_tile(xp, kernel, dtype):
        assert_within(product.side(), product.law())


@on_kernels(ON_GPU)
def test_a_row_does_not_depend_on_the_tile(xp, dtype, kernel):
    """Nor on whether codes become numbers before."""
    given = xp, 1, 0, dtype, kernel, 60, 72, 352, "silu"
    outs = [
        parted_product(*given, expands=expands, block_rows=height).side().tobytes()
        for expands in (False, True)
        for height in heights(kernel, expands)
    ]
    assert len(set(outs)) == 1


@on_kernels(EVERY_KERNEL)
@pytest.mark.parametrize("which", [0, 3, 4, 5])
def test_a_factor_of_another_part_is_noticed(xp, dtype, kernel, which):
    product = parted_product(xp, 1, which, dtype, kernel, 40, 64, 640)
    exact, factor = product.law(), product.side.row_factor
    for axis in (0, 1):
        moved = product.side._replace(row_factor=xp.roll(factor, 1, axis))
        assert (experts.ratio(moved()[: len(exact.value)], exact) > 1).mean() > 0.5, axis


@on_kernels(EVERY_KERNEL)
def test_the_bound_is_far_below_what_rounded_operands_err_by(xp, dtype, kernel):
    """Float32 sums of products that nothing has rounded, of many parts."""
    product = parted_product(xp, 1, 0, dtype, kernel, 40, 64, 4096)
    out, exact = product.side()[: product.exact.offsets[-1]].astype(np.float64), product.law().value
    error, size = np.sqrt(np.mean((out - exact) ** 2)), np.sqrt(np.mean(exact**2))
    # rounding the result costs 0.42 of a unit in the mean, rounding it and both operands 0.72
    assert error / size < 0.55 * unit(np.dtype(dtype)) + 64 * 2.0**-24


def test_which_scales_meet_parts():
    rng = np.random.default_rng(1)
    shapes = {"weights": ((2, 256, 512), (128, 128)), "scale": (2, 2, 4)}
    quantised = cumoe.quantize(rng.standard_normal(shapes["weights"][0]).astype("f4"), "fp8", (128, 128))
    assert quantised.scale.shape == shapes["scale"]
    config = cumoe.fp8_w8a8_moe_quant_config(quantised.scale, quantised.scale, block_shape=[128, 128])
    arrays = _layer_scheme.parts(config)
    rows = _layer_scheme.rows_of(1, config._a1, arrays, 2)
    weight = _layer_scheme.weight_of(np, 1, quantised.values, config._w1, arrays, shapes["weights"][0], False, rows)
    scheme = _layer_scheme.Scheme(weight, weight, rows, rows)
    ready = scheme.for_kernel(grouped_gemm, "mma", 512, 512)
    assert (ready.w1.format.row_cols, ready.a1.in_parts) == (128, True)
    assert _coded_weights.parted(ready.w1.format, 512) == 2
    assert _coded_weights.parted(ready.w1.format._replace(group_cols=64), 512) == 1
    assert _coded_weights.parted(ready.w1.format._replace(row_cols=0), 512) == 0
    odd = rows._replace(cols=48)
    assert not scheme._replace(a1=odd).for_kernel(grouped_gemm, "mma", 512, 512).a1.in_parts
    assert _arrays.room(np, "grouped_gemm").scales_parts(weight.format, 48, "fma") is False
