"""Quantisers: the bits of the law for every scheme, the way back, and what a call leaves alone."""

from typing import NamedTuple

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sides import back, gpu, on

import cumoe
from cumoe import GroupShape, Quantized
from cumoe.reference import quantisers as law

E4M3, E8M0 = np.dtype("float8_e4m3fn"), np.dtype("float8_e8m0fnu")
DTYPES = ("float32", "float16", "bfloat16")
MATRIX, ROW = (-1, -1), (1, -1)
CASES = [
    *(("fp8", group, options) for group in (MATRIX, ROW, (1, 128), (128, 128), (3, 5)) for options in ({}, "ue8m0")),
    ("fp8", ROW, {"scale_ub": 3.0}),
    *(("int8", group, {}) for group in (MATRIX, ROW, (1, 128), (1, 7), (4, 6))),
    *(("int4", (1, cols), {"zero_points": zeros}) for cols in (32, 64, 128) for zeros in (False, True)),
    *(("uint8", group, {"zero_points": zeros}) for group in (MATRIX, ROW, (1, 128), (4, 6)) for zeros in (False, True)),
    ("mxfp4", (1, 32), {}),
    ("mxfp8", (1, 32), {}),
    ("nvfp4", (1, 16), {}),
]
CASES = [(scheme, group, {"use_ue8m0": True} if options == "ue8m0" else options) for scheme, group, options in CASES]
each_case = pytest.mark.parametrize(("scheme", "group", "options"), CASES, ids=str)
ONE_EACH = [next(case for case in CASES if case[0] == scheme) for scheme in dict.fromkeys(case[0] for case in CASES)]


def raw(array):
    """The bits, in host memory."""
    return None if array is None else np.ascontiguousarray(back(array)).view(f"u{array.dtype.itemsize}")


def one_a_byte(quantized):
    packed = quantized.scheme in ("int4", "mxfp4", "nvfp4")
    return raw(cumoe.unpack_int4(quantized.values) if packed else quantized.values)


def assert_same_bits(quantized, parts):
    for name in law.Parts._fields:
        got, expected = getattr(quantized, name), getattr(parts, name)
        assert (got is None) == (expected is None), name
        if got is not None:
            assert got.shape == expected.shape, name
            np.testing.assert_array_equal(raw(got), raw(expected), err_msg=name)


@st.composite
def operands(draw, dtypes=DTYPES):
    """Numbers of every size: rows of one magnitude, zeros, subnormals, multiples of a step (ties), the largest."""
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    n, k = 2 * draw(st.integers(0, 4)), 2 * draw(st.integers(0, 150))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (*lead, n, k)
    power = draw(st.sampled_from([(-3, 3), (-40, -30), (30, 38), (-12, -8)]))
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(*power, (*shape[:-1], 1))
    # each row has its own largest multiple, so that quotients by its scale fall on tie points and just beside them
    top = rng.integers(1, 65, (*shape[:-1], 1))
    steps = np.rint(rng.uniform(-1, 1, shape) * top) * draw(st.sampled_from([0.125, 0.25, 0.5, 1e-3]))
    kind = draw(st.sampled_from(["smooth", "steps", "mixed", "one-sided"]))
    x = {"smooth": x, "steps": steps, "mixed": np.where(rng.random(shape) < 0.1, x, steps), "one-sided": np.abs(x)}[
        kind
    ]
    x = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.3, 1])), rng.choice([0.0, -0.0, 1e-45], shape), x)
    largest = float(np.finfo(np.float16).max if dtype == np.float16 else np.float32(3.3e38))
    return np.clip(x, -largest, largest).astype(np.float32).astype(dtype)


@each_case
@given(x=operands())
def test_bits_are_those_of_the_law(xp, scheme, group, options, x):
    quantized = cumoe.quantize(on(xp, x), scheme, group, **options)
    expected = law.quantize(x, scheme, *group, **options)
    assert_same_bits(quantized, expected)
    for dtype in DTYPES:
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = law.dequantize(expected, scheme, *group).astype(dtype)
        got = back(cumoe.dequantize(quantized, dtype))
        assert got.dtype == dtype
        is_nan = np.isnan(numbers)
        np.testing.assert_array_equal(np.isnan(got), is_nan)
        np.testing.assert_array_equal(raw(got)[~is_nan], raw(numbers)[~is_nan])


@each_case
@given(x=operands(dtypes=("float32", "bfloat16")), seed=st.integers(0, 99))
def test_bits_with_given_scales_are_those_of_the_law(xp, scheme, group, options, x, seed):
    """Scales that have nothing to do with the numbers: everything saturates or vanishes somewhere."""
    rng = np.random.default_rng(seed)
    like = law.quantize(x, scheme, *group).scale
    codes = rng.integers(0, 120, like.shape).astype(np.uint8)
    dtype = {"mxfp4": E8M0, "mxfp8": E8M0, "nvfp4": E4M3}.get(scheme, like.dtype)
    scale = codes.view(dtype) if dtype.itemsize == 1 else (10.0 ** rng.integers(-8, 9, codes.shape)).astype(dtype)
    keywords = {}
    if scheme == "nvfp4":
        keywords["global_scale"] = np.asarray(10.0 ** rng.integers(-20, 20, x.shape[:-2]), np.float32)
    if options.get("zero_points"):
        shape = (*scale.shape[:-2], scale.shape[-2] // (2 if scheme == "int4" else 1), scale.shape[-1])
        keywords["zero_points"] = rng.integers(0, 256, shape).astype(np.uint8)
        assert_same_bits(  # and scales for given zero points
            cumoe.quantize(on(xp, x), scheme, group, zero_points=on(xp, keywords["zero_points"])),
            law.quantize(x, scheme, *group, zero_points=keywords["zero_points"]),
        )
    there = {name: on(xp, array) for name, array in keywords.items()}
    got = cumoe.quantize(on(xp, x), scheme, group, scale=on(xp, scale), **there)
    given_scale = scale if scale.dtype.itemsize > 1 else raw(scale)
    assert_same_bits(got, law.quantize(x, scheme, *group, scale=given_scale, **keywords))


@each_case
@given(x=operands())
def test_quantizing_the_numbers_again_gives_the_codes(xp, scheme, group, options, x):
    quantized = cumoe.quantize(on(xp, x), scheme, group, **options)
    zeros = False if quantized.zero_points is None else quantized.zero_points
    static = {"scale": quantized.scale, "zero_points": zeros, "global_scale": quantized.global_scale}
    exact = back(cumoe.dequantize(quantized))
    if not np.isfinite(exact).all():
        return  # 6 * 2**126 is beyond float32
    subnormal = (exact != 0) & (np.abs(exact) < 2.0**-126)
    dtypes = [("float32", np.ones(x.shape, bool))]
    if scheme != "uint8" or not options["zero_points"]:  # 255 steps in bfloat16's 8 bits are off by half a step
        dtypes.append(("bfloat16", ~subnormal))
    for dtype, keeps in dtypes:
        numbers = cumoe.dequantize(quantized, dtype)
        if not np.isfinite(back(numbers).astype(np.float32)).all():
            continue
        again = cumoe.quantize(numbers, scheme, group, **static)
        np.testing.assert_array_equal(one_a_byte(again)[keeps], one_a_byte(quantized)[keeps])
        np.testing.assert_array_equal(raw(again.scale), raw(quantized.scale))


class Error(NamedTuple):
    """Largest error of a number in units of its scale, and relative to the number."""

    steps: float
    relative: float


ERRORS = {"fp8": Error(2.0**-10, 2.0**-4)} | dict.fromkeys(("int8", "int4", "uint8"), Error(0.5, 0))


@pytest.mark.parametrize(
    ("scheme", "group"),
    [("fp8", MATRIX), ("fp8", (128, 128)), ("int8", ROW), ("int4", (1, 32)), ("uint8", ROW), ("uint8", (128, 128))],
)
def test_numbers_come_back_within_half_a_step(xp, scheme, group):
    x = np.random.default_rng(0).standard_normal((3, 130, 320)).astype(np.float32)
    quantized = cumoe.quantize(on(xp, x), scheme, group)
    rows, cols = (size if one == -1 else one for one, size in zip(group, x.shape[1:], strict=True))
    step = back(quantized.scale).repeat(rows, 1)[:, :130].repeat(cols, 2)[..., :320]
    bound = (ERRORS[scheme].steps * step + ERRORS[scheme].relative * np.abs(x)) * (1 + 2.0**-20)
    assert (np.abs(back(cumoe.dequantize(quantized)) - x) <= bound).all()


# shapes that the GPU cuts differently: many blocks for a group, a block, a warp, a lane; and ends of every kind
SIZES = [
    ("fp8", MATRIX, (2, 300, 1000)), ("fp8", MATRIX, (1, 77, 4099)), ("nvfp4", (1, 16), (2, 3, 70000)),
    ("fp8", ROW, (1, 2, 70001)), ("int8", ROW, (300, 8)), ("fp8", (128, 128), (2, 300, 392)),
    ("fp8", (10**6, 64), (1, 9000, 72)), ("int8", (2, 10**6), (7, 5000)), ("fp8", (3, 5), (31, 33)),
    ("uint8", (1, 7), (9, 30)), ("mxfp4", (1, 32), (3, 5, 96)), ("mxfp8", (1, 32), (3, 5, 90)),
    ("int4", (1, 64), (4, 98)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize(("scheme", "group", "shape"), SIZES, ids=str)
def test_any_size_and_address(xp, scheme, group, shape, shift, dtype):
    """Numbers of both signs, and only negative ones, that begin `shift` elements after an address of 16 bytes."""
    flat = np.random.default_rng(7).standard_normal(shift + int(np.prod(shape)), np.float32)
    flat[: flat.size // 2] = -np.abs(flat[: flat.size // 2])
    flat = flat.astype(dtype)
    x = flat[shift:].reshape(shape)
    expected = law.quantize(x, scheme, *group)
    quantized = cumoe.quantize(on(xp, flat)[shift:].reshape(shape), scheme, group)
    assert_same_bits(quantized, expected)
    moved = on(xp, np.concatenate([np.zeros(shift, np.uint8), raw(quantized.values).ravel()]))[shift:]
    quantized = quantized._replace(values=moved.view(quantized.values.dtype).reshape(quantized.values.shape))
    numbers = law.dequantize(expected, scheme, *group).astype(dtype)
    np.testing.assert_array_equal(raw(cumoe.dequantize(quantized, dtype)), raw(numbers))


@pytest.mark.parametrize(("scheme", "group", "options"), ONE_EACH, ids=str)
def test_same_bits_on_any_number_of_threads(scheme, group, options):
    x = np.random.default_rng(2).standard_normal((2, 258, 384)).astype(np.float32)
    expected = law.quantize(x, scheme, *group, **options)
    before = numba.get_num_threads()
    for threads in {1, before}:
        numba.set_num_threads(threads)
        try:
            quantized = cumoe.quantize(x, scheme, group, **options)
            numbers = cumoe.dequantize(quantized)
        finally:
            numba.set_num_threads(before)
        assert_same_bits(quantized, expected)
        np.testing.assert_array_equal(raw(numbers), raw(law.dequantize(expected, scheme, *group)))


@each_case
def test_any_strides_and_read_only(xp, scheme, group, options):
    host = np.random.default_rng(3).standard_normal((64, 6, 2)).astype(np.float32)
    expected = law.quantize(host.T, scheme, *group, **options)
    x = on(xp, host)
    if xp is np:
        x.flags.writeable = False
    before = back(x).tobytes()
    quantized = cumoe.quantize(x.T, scheme, group, **options)
    assert_same_bits(quantized, expected)
    assert back(x).tobytes() == before
    if xp is np:
        for part in quantized[:2]:
            part.flags.writeable = False
    np.testing.assert_array_equal(raw(cumoe.dequantize(quantized)), raw(law.dequantize(expected, scheme, *group)))


def test_a_row_does_not_depend_on_the_others(xp):
    x = on(xp, np.random.default_rng(4).standard_normal((8, 96)).astype(np.float32))
    for scheme, group in (("fp8", ROW), ("int8", ROW), ("int4", (1, 32)), ("mxfp4", None), ("mxfp8", None)):
        whole, part = cumoe.quantize(x, scheme, group), cumoe.quantize(x[3:5], scheme, group)
        np.testing.assert_array_equal(raw(whole.values)[3:5], raw(part.values))


def test_scales_without_their_axes_of_one(xp):
    x = on(xp, np.random.default_rng(5).standard_normal((3, 4, 32)).astype(np.float32))
    for group, shape in ((MATRIX, (3,)), (ROW, (3, 4))):
        quantized = cumoe.quantize(x, "fp8", group)
        squeezed = quantized._replace(scale=quantized.scale.reshape(shape))
        np.testing.assert_array_equal(raw(cumoe.dequantize(squeezed)), raw(cumoe.dequantize(quantized)))
        again = cumoe.quantize(x, "fp8", group, scale=squeezed.scale)
        np.testing.assert_array_equal(raw(again.scale), raw(quantized.scale))
    one = cumoe.quantize(x[0], "fp8", scale=on(xp, np.array([0.5], np.float32)))
    assert one.scale.shape == (1, 1)


def test_uint8_is_another_name_of_e8m0(xp):
    x = on(xp, np.random.default_rng(6).standard_normal((2, 64)).astype(np.float32))
    for scheme in ("mxfp4", "mxfp8"):
        quantized = cumoe.quantize(x, scheme)
        assert quantized.scale.dtype == E8M0
        plain = quantized._replace(scale=quantized.scale.view(np.uint8))
        np.testing.assert_array_equal(raw(cumoe.dequantize(plain)), raw(cumoe.dequantize(quantized)))
        np.testing.assert_array_equal(raw(cumoe.quantize(x, scheme, scale=plain.scale).values), raw(quantized.values))


def test_the_descriptor():
    x = np.ones((2, 4, 64), np.float32)
    quantized = cumoe.quantize(x, "int4", (1, 32), zero_points=True)
    desc = quantized.desc
    assert (desc.dtype, desc.shape, desc.alpha_or_gscale) == ("int4", GroupShape(1, 32), None)
    assert desc.scale is quantized.scale
    assert desc.zp is quantized.zero_points
    assert cumoe.quantize(x, "fp8").desc.dtype == E4M3
    assert cumoe.quantize(x, "uint8", ROW).desc.dtype == np.int8
    assert cumoe.quantize(x, "nvfp4").desc.alpha_or_gscale.shape == (2,)


def check_tensors(device, scheme, group, options):
    x = torch.randn(4, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)).to(device)
    quantized = cumoe.quantize(x, scheme, group, **options)
    assert isinstance(quantized, Quantized)
    assert all(isinstance(part, torch.Tensor) for part in (quantized.values, quantized.scale))
    assert quantized.values.device == quantized.scale.device == x.device
    numbers = cumoe.dequantize(quantized, torch.bfloat16)
    assert numbers.dtype == torch.bfloat16
    plain = x.cpu().view(torch.int16).numpy().view("bfloat16")
    expected = cumoe.dequantize(cumoe.quantize(plain, scheme, group, **options))
    np.testing.assert_array_equal(numbers.float().cpu().numpy(), expected.astype("bfloat16").astype(np.float32))


@pytest.mark.parametrize(("scheme", "group", "options"), ONE_EACH, ids=str)
def test_tensors_come_back_as_tensors(scheme, group, options):
    check_tensors("cpu", scheme, group, options)


@pytest.mark.parametrize(("scheme", "group", "options"), ONE_EACH, ids=str)
def test_cuda_tensors_come_back_as_tensors(scheme, group, options):
    gpu()
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    check_tensors("cuda", scheme, group, options)
