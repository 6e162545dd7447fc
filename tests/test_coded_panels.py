"""Panels of codes on the CPU: every code in every place, and what prepared codes keep."""

import ml_dtypes
import numpy as np
import pytest

import cumoe
from cumoe._weight_format import WeightFormat
from cumoe.cpu import coded_panels, grouped_gemm, microkernel, pack

KERNELS = [(dtype, name) for dtype in ("bfloat16", "float32") for name in microkernel.names(dtype)]
KERNELS = [pair for pair in KERNELS if pair[1] in coded_panels.KERNELS]
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
NOTHING, NO_MATRIX = np.empty(0, np.float32), np.empty((0, 0), np.float32)

pytestmark = pytest.mark.skipif(not KERNELS, reason="no micro-kernel here multiplies codes")


def product(x, codes, form, dtype, kernel, rows_of_expert):
    """Rows x times the only expert's codes, as float64."""
    bits = x.astype(dtype).view(np.uint16) if dtype == "bfloat16" else x.astype(dtype)
    outputs = codes.shape[1] if form.panels is None else codes.shape[1] * coded_panels.COLUMNS
    out = np.full((len(x), outputs), 7, bits.dtype)
    offsets = np.array([0, rows_of_expert], np.int64)
    grouped_gemm.grouped_gemm(
        bits, np.empty(0, np.int32), 0, NOTHING, codes, form, offsets, NO_MATRIX, NOTHING, NOTHING, NO_MATRIX, "",
        False, 0.0, 0.0, np.inf, dtype, kernel, np.empty(0, np.int32), 0, False, NO_MATRIX, out,
    )  # fmt: skip
    return out.view(dtype).astype(np.float64)


def shuffled(count, rows, columns):
    """All codes 0..count-1, again and again, each in many places."""
    return np.random.default_rng(0).permuted(np.resize(np.arange(count), (rows, columns)).astype(np.uint8), axis=1)


RULES = {
    "fp8": (256, lambda c: c.view(E4M3)),
    "int8": (256, lambda c: c.view(np.int8)),
    "uint8": (256, lambda c: c.astype(np.float64) - 128),
    "int4": (16, lambda c: c.astype(np.float64) - 8),
    "mxfp4": (16, lambda c: c.view(E2M1)),
}


@pytest.mark.parametrize("rows", [1, 6, 256], ids="{} rows".format)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_every_code_is_its_number(dtype, kernel, rule, rows):
    """Row k of the identity gives column k of the weights, exactly; each code meets every column of a panel."""
    count, worth = RULES[rule]
    n, k = 2 * coded_panels.COLUMNS + 5, 256
    codes = shuffled(count, n, k)
    stored = codes if count == 256 else codes[:, ::2] | codes[:, 1::2] << 4
    scale, scale_dtype = np.ones((1, 1, 1), np.float32), "float32"
    if rule == "mxfp4":
        scale, scale_dtype = np.full((1, n, k // 32), 127, np.uint8), "uint8"
    cols = 32 if rule == "mxfp4" else k
    form = WeightFormat(rule, scale, scale_dtype, None, np.ones(1, np.float32), n if cols == k else 1, cols)
    made = coded_panels.layout(form, k, kernel)
    assert made is not None and not made.is_integer
    numbers = worth(codes).astype(np.float64)
    if rule == "fp8":  # NaN times zero would be everywhere
        numbers, stored = np.where(np.isnan(numbers), 1.0, numbers), np.where(np.isnan(numbers), 0x38, stored)
        stored = stored.astype(np.uint8)
    for first in range(0, k, rows):
        x = np.eye(k, dtype=np.float32)[first : first + rows]
        out = product(x, stored[None].view(np.int8 if rule == "int8" else np.uint8), form, dtype, kernel, len(x))
        np.testing.assert_array_equal(out, numbers[:, first : first + rows].T)
        if rows == 1 and first == 32:
            break


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_nan_codes_stay_nan(dtype, kernel):
    codes = np.full((1, 64, 64), 0x38, np.uint8)
    codes[0, 3, 5], codes[0, 60, 63] = 0x7F, 0xFF
    form = WeightFormat("fp8", np.ones((1, 1, 1), np.float32), "float32", None, np.ones(1, np.float32), 64, 64)
    out = product(np.ones((2, 64), np.float32), codes, form, dtype, kernel, 2)
    assert np.isnan(out[:, [3, 60]]).all() and np.isfinite(np.delete(out, [3, 60], axis=1)).all()


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_every_zero_point_is_subtracted(dtype, kernel):
    """Code less zero point, all 256 pairs of them, in registers and from memory."""
    n, k = 256, 64
    codes = np.broadcast_to(np.arange(n)[:, None] % 16, (n, k)).astype(np.uint8)
    zeros = np.broadcast_to(np.arange(n)[:, None] // 16, (n, 2)).astype(np.uint8)
    scale = np.full((1, n, 2), 0.5, np.float32)
    form = WeightFormat("int4", scale, "float32", zeros[None], np.ones(1, np.float32), 1, 32)
    for rows in (1, 64):
        x = np.eye(k, dtype=np.float32)[:rows]
        out = product(x, (codes[:, ::2] | codes[:, 1::2] << 4)[None], form, dtype, kernel, rows)
        np.testing.assert_array_equal(out, np.broadcast_to((np.arange(n) % 16 - np.arange(n) // 16) / 2, (rows, n)))


def test_packed_codes_belong_to_kernels_that_read_them():
    w1, w2 = np.ones((2, 64, 32), np.float32), np.ones((2, 32, 32), np.float32)
    q1, q2 = cumoe.quantize(w1, "int8"), cumoe.quantize(w2, "int8")
    config = cumoe.int8_w8a16_moe_quant_config(q1.scale, q2.scale)
    prepared = cumoe.prepare(q1.values, q2.values, quant_config=config)
    assert prepared.experts.scheme.is_packed
    given = np.ones((3, 32), np.float32), prepared, None, np.ones((3, 1), np.float32), np.zeros((3, 1), np.int32)
    with pytest.raises(ValueError, match="backend must multiply codes as w1 packs them, got 'portable'"):
        cumoe.fused_experts(*given, backend="portable")
    plain = cumoe.fused_experts(given[0], q1.values, q2.values, *given[3:], quant_config=config)
    assert cumoe.fused_experts(*given).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("number", "scale_bytes"), [(1, 2), (1 + 2**-9, 2), (1.5 * 2**16, 2), (1e5 + 1, 4), (np.nan, 4)]
)
@pytest.mark.parametrize("rule", ["fp8", "int8", "int4", "mxfp4"])
def test_panels_hold_codes_and_scales_and_no_more(rule, number, scale_bytes):
    """
    The bytes of a matrix whose sizes fill panels: a code is as large as it was, and so is a scale of one byte.

    Others have two bytes where bfloat16 or float16 hold every one of them exactly, else four.
    """
    n, k, packed = 128, 256, rule in ("int4", "mxfp4")
    scale, scale_dtype = np.ones((1, n, k // 32), np.float32), "float32"
    if rule == "mxfp4":
        scale, scale_dtype, scale_bytes = scale.astype(np.uint8), "uint8", 1
    else:
        scale[0, 3, 5] = number
    form = WeightFormat(rule, scale, scale_dtype, None, np.ones(1, np.float32), 1, 32)
    codes, made = pack.pack_codes(np.zeros((1, n, k // (1 + packed)), np.uint8), form, k, False, False)
    assert codes.nbytes == n * k // (1 + packed) + scale.size * scale_bytes and made.scale.size == 0


@pytest.mark.parametrize("number", [1.0, 1 + 2**-9, 1 + 2**-20], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rule", ["fp8", "int8", "int4", "int4 and zero points"])
@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_scales_of_every_size_meet_their_groups(dtype, kernel, rule, number):
    """
    All scales are powers of two but one, which a single element meets, so that all sums are exact.

    K is more than one piece of a panel, and its last group is not whole.
    """
    n, k, group, rows = 64, 2600, 32, 40
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.integers(-2, 3, (1, n, -(-k // group)))).astype(np.float32)
    scale[0, 7, 0] = number
    whole, x = rng.integers(-7, 8, (n, k)), rng.integers(-1, 2, (rows, k)).astype(np.float32)
    x[:, :group] = 0
    x[0] = np.eye(1, k)
    zeros = None
    if rule == "fp8":
        codes = whole.astype(E4M3).view(np.uint8)
    elif rule == "int8":
        codes = whole.astype(np.int8)
    else:
        origin = 8
        if "zero" in rule:
            zeros = rng.integers(0, 16, scale.shape).astype(np.uint8)
            origin = zeros[0].repeat(group, axis=1)[:, :k]
        codes = (np.clip(whole + origin, 0, 15)).astype(np.uint8)
        whole, codes = codes.astype(np.int64) - origin, codes[:, ::2] | codes[:, 1::2] << 4
    form = WeightFormat(rule[:4].rstrip(), scale, "float32", zeros, np.ones(1, np.float32), 1, group)
    expected = x.astype(np.float64) @ (whole * scale[0].astype(np.float64).repeat(group, axis=1)[:, :k]).T
    expected = expected.astype(dtype).astype(np.float64)
    packed = pack.pack_codes(codes[None], form, k, False, False)
    assert packed[1].panels.scale == {1.0: "bfloat16", 1 + 2**-9: "float16"}.get(number, "float32")
    for given in ((codes[None], form), packed):
        for count in (1, rows):
            np.testing.assert_array_equal(product(x[:count], *given, dtype, kernel, count), expected[:count])


def test_integers_add_up_only_where_int32_holds_the_sum():
    if not coded_panels.multiplies_integers():
        pytest.skip("no micro-kernel here multiplies integers")
    one = np.ones((1, 1, 1), np.float32)
    form = WeightFormat("int8", one, "float32", None, one.reshape(1), 64, 64, integer_rows=True)
    kinds = [coded_panels.layout(form, k, "avx512").kind for k in (2**17 - 1, 2**17)]
    assert kinds == ["bytes", "int8"]
    assert (2**17 - 1) * 128 * 128 < 2**31 <= 2**17 * 128 * 128
