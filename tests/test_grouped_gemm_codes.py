"""Grouped products of quantised operands: factors that meet the sums, and weights that are codes."""

import numpy as np
import pytest
from coded_products import FORMATS, Format, assert_right, coded_product, decode, weights_of
from hypothesis import given
from hypothesis import strategies as st
from products import (
    CPU_KERNELS,
    EVERY_KERNEL,
    FASTEST,
    ON_GPU,
    assert_within,
    bits,
    law,
    make_product,
    on_kernels,
    on_side,
)
from sides import back

from cumoe.reference import experts

FACTORS = [{"row_factor": True, "column_factor": True}, {"row_factor": True}, {"column_factor": True}]
FACTORS += [{"column_factor": "one"}, {"row_factor": True, "column_factor": "one"}]


# -- factors ----------------------------------------------------------------------------------------


def check_factors(xp, dtype, kernel, seed, sizes, activation, parts):
    num_tokens, outputs, k = sizes
    step = 8 if kernel == "wgmma" else 1
    p = make_product(seed, num_tokens, 2, 3, outputs * step, k * step, dtype, activation, **parts)
    side = on_side(xp, p, dtype, kernel)
    out = side()
    assert_within(out, law(p, kernel))
    assert side().tobytes() == out.tobytes()


small = st.tuples(st.integers(0, 90), st.integers(1, 70), st.integers(1, 70))
each_part = st.fixed_dictionaries({name: st.booleans() for name in ("bias", "output_scale", "in_place")})


@on_kernels([*FASTEST, *ON_GPU])
@given(st.integers(0, 2**32), small, st.sampled_from(["", "silu", "swigluoai"]), st.sampled_from(FACTORS), each_part)
def test_factors_meet_the_sums(xp, dtype, kernel, seed, sizes, activation, factors, parts):
    check_factors(xp, dtype, kernel, seed, sizes, activation, factors | parts)


@on_kernels(EVERY_KERNEL)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_every_kernel_has_factors(xp, dtype, kernel, factors, in_place):
    parts = factors | {"bias": True, "output_scale": in_place, "in_place": in_place}
    for sizes in ((1, 1, 1), (70, 37, 9), (300, 40, 33)):
        check_factors(xp, dtype, kernel, sizes[0], sizes, "" if in_place else "silu", parts)


@on_kernels(EVERY_KERNEL)
def test_factors_of_one_change_no_bit(xp, dtype, kernel):
    p = make_product(1, 90, 2, 3, 72, 40, dtype, "silu", bias=True)
    out = on_side(xp, p, dtype, kernel)()
    ones = {"row_factor": np.ones(len(p.x), np.float32), "column_factor": np.ones(p.weights.shape[:2], np.float32)}
    assert on_side(xp, p._replace(**ones), dtype, kernel)().tobytes() == out.tobytes()


@on_kernels([*FASTEST, *ON_GPU])
def test_a_factor_of_another_row_is_noticed(xp, dtype, kernel):
    p = make_product(1, 60, 2, 3, 24, 48, dtype, row_factor=True, column_factor=True)
    out = on_side(xp, p, dtype, kernel)()[: p.offsets[-1]]
    for name, axis in (("row_factor", 0), ("column_factor", 1), ("column_factor", 0)):
        moved = p._replace(**{name: np.roll(getattr(p, name), 1, axis)})
        assert (experts.ratio(out, law(moved, kernel)) > 1).mean() > 0.5, name


# -- codes ------------------------------------------------------------------------------------------


def check_codes(xp, dtype, kernel, how, activation="", **parts):
    odd = 224 if kernel == "wgmma" else 200  # its rows of codes begin at multiples of 16 bytes
    for num_tokens, outputs, k in ((1, 8, 32), (3, 72, odd), (200, 136, 64)):
        assert_right(coded_product(xp, k, how, dtype, kernel, num_tokens, outputs, k, activation, **parts))


@on_kernels([*FASTEST, *ON_GPU])
@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_codes_give_what_their_numbers_give(xp, dtype, kernel, how):
    check_codes(xp, dtype, kernel, how)


@on_kernels(EVERY_KERNEL)
@pytest.mark.parametrize(("how", "activation"), [(Format("int4", 1, 32, True), "silu"), (FORMATS[0], "swigluoai")])
def test_codes_of_gates_and_factors_on_every_kernel(xp, dtype, kernel, how, activation):
    check_codes(xp, dtype, kernel, how, activation, bias=True, row_factor=True, column_factor=True)


@on_kernels([*FASTEST, *ON_GPU])
def test_codes_of_many_experts_and_in_place(xp, dtype, kernel):
    """Few of them have rows: what no expert needs is not read."""
    for num_experts, num_tokens in ((75, 11), (33, 1), (1, 40)):
        parts = {"num_experts": num_experts, "in_place": True, "output_scale": True}
        assert_right(coded_product(xp, 1, FORMATS[0], dtype, kernel, num_tokens, 40, 160, **parts))


INTEGERS = [Format("int8"), Format("uint8"), Format("int4", 1, 32), Format("int8", 1, 40)]


@on_kernels(FASTEST)
@pytest.mark.parametrize("how", INTEGERS, ids=str)
def test_rows_that_are_integers(xp, dtype, kernel, how):
    """The largest codes of 6000 columns: the sums are near the ends of int32, and exact."""
    check_codes(xp, dtype, kernel, how, "silu", integer_rows=True, row_factor=True, column_factor=True)
    assert_right(coded_product(xp, 1, how, dtype, kernel, 9, 8, 50 if how.rule == "int4" else 51, integer_rows=True))
    product = coded_product(xp, 1, how, dtype, kernel, 9, 8, 6000, integer_rows=True)
    most = np.full(product.exact.x.shape, 127, dtype)
    product.codes.x[...] = most if product.codes.x.dtype == np.int8 else bits(xp, most)
    product.codes.weights[...] = {"int8": -128, "uint8": 255}.get(how.rule, 0)
    decode(xp, product.codes.weights, product.codes.weight_format, dtype, product.numbers.weights)
    exact = product.exact._replace(x=most)
    numbers = [weights_of(product.codes.weights, product.codes.weight_format).numbers(e) for e in range(3)]
    assert_right(product._replace(exact=exact._replace(weights=np.stack(numbers))))


@on_kernels([("numpy", *one) for one in CPU_KERNELS[:1]])
def test_odd_sizes_and_rows_that_lie_anywhere(xp, dtype, kernel):
    how = Format("fp8", 5, 7)
    product = coded_product(xp, 1, how, dtype, kernel, 30, 37, 51, "silu")
    out = assert_right(product)
    wide = np.zeros((6, 80, 102), np.uint8)
    wide[::2, 3:77, ::2] = product.codes.weights
    assert product.codes._replace(weights=wide[::2, 3:77, ::2])().tobytes() == out.tobytes()


@on_kernels(ON_GPU)
def test_a_captured_product_of_codes_runs_again(xp, dtype, kernel):
    """New codes and other experts with rows: nothing of the first run decides about the next."""
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        first, second = (coded_product(xp, i, FORMATS[3], dtype, kernel, 5, 40, 64, num_experts=9) for i in (1, 2))
        first.codes()
        stream.begin_capture()
        first.codes.run()
        graph = stream.end_capture()
        for name in ("x", "permuted_idx", "weights", "offsets"):
            getattr(first.codes, name)[...] = getattr(second.codes, name)
        first.codes.weight_format.scale[...] = second.codes.weight_format.scale
        first.codes.out[...] = bits(xp, np.full(first.codes.out.shape, 7, dtype))
        graph.launch()
        stream.synchronize()
        assert back(first.codes.out).view(dtype).tobytes() == second.numbers().tobytes()
