"""Weights of eight and four bits of several checkpoint formats: against their definition, and the way back."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import assert_equal, back, bits, on

import cumoe

E4M3, E8M0, BF16 = (np.dtype(name) for name in ("float8_e4m3fn", "float8_e8m0fnu", "bfloat16"))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
LEADS = st.sampled_from([(), (2,), (2, 1), (0,)])
SEEDS = st.integers(0, 2**16)


def e4m3(rng, shape):
    """Any codes but the two of NaN, with a positive sign and not 0 if they are scales."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, codes - 1, codes).view(E4M3)


def scales(rng, shape, dtype="float32"):
    return rng.uniform(0.01, 1, shape).astype(dtype)


def there(xp, arrays):
    return [on(xp, array) for array in arrays]


def same_bits(results, expected):
    assert_equal([bits(back(one)) for one in results], [bits(back(one)) for one in expected])


def block_numbers(weight, scale, rows, columns):
    """Code times scale of its block, one element after the other."""
    out = np.empty(weight.shape, np.float32)
    for place in np.ndindex(*weight.shape):
        *lead, n, k = place
        out[place] = np.float32(weight[place]) * np.float32(scale[(*lead, n // rows, k // columns)])
    return out


def fp4_numbers(packed, group, factor):
    """Number of each code, low half of a byte first, times the factor of its group."""
    *lead, half = packed.shape
    out = np.empty((*lead, 2 * half), np.float32)
    for place in np.ndindex(*out.shape):
        *row, k = place
        code = int(packed[(*row, k // 2)]) >> 4 * (k % 2) & 15
        out[place] = E2M1[code] * factor[(*row, k // group)]
    return out


# -- one byte a number ------------------------------------------------------------------------------


@given(lead=LEADS, seed=SEEDS, dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("shared_by", ["row", "matrix", "block", "group"])
def test_compressed_tensors_bytes_by_hand_and_back(xp, scheme, shared_by, lead, seed, dtype):
    rng, n, k = np.random.default_rng(seed), 5, 8
    codes = e4m3(rng, (*lead, n, k)) if scheme == "fp8" else rng.integers(-128, 128, (*lead, n, k)).astype(np.int8)
    group, stored, whole = {
        "row": (None, (n, 1), (1, k)),
        "matrix": (None, (1,), (n, k)),
        "block": ((4, 3), (2, 3), (4, 3)),
        "group": ((1, 4), (5, 2), (1, 4)),
    }[shared_by]
    weight, scale = there(xp, (codes, scales(rng, (*lead, *stored), dtype)))
    read, write = (getattr(cumoe, f"{way}_compressed_tensors_{scheme}") for way in ("from", "to"))
    quantized = read(weight, scale, group)
    assert quantized.scheme == scheme
    assert quantized.values is weight
    assert quantized.scale.dtype == np.float32
    each = back(scale).reshape(*lead, 1, 1) if shared_by == "matrix" else back(scale)
    np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), block_numbers(codes, each, *whole))
    written = write(quantized, scale_dtype=dtype)
    same_bits(written[:2], (weight, scale))
    assert written[2:] == (None,) * (scheme == "int8")


def test_a_scale_of_a_matrix_has_many_shapes(xp):
    weight = on(xp, np.ones((3, 4, 2), np.int8))
    for shape in ((3,), (3, 1), (3, 1, 1)):
        group = (-1, -1) if len(shape) == 3 else None
        quantized = cumoe.from_compressed_tensors_int8(weight, on(xp, np.ones(shape, np.float32)), group)
        assert quantized.scale.shape == (3, 1, 1)
        assert cumoe.to_compressed_tensors_int8(quantized)[1].shape == (3, 1)
    assert cumoe.from_compressed_tensors_int8(weight[0], on(xp, np.ones((), np.float32))).scale.shape == (1, 1)


@given(lead=LEADS, seed=SEEDS, n=st.sampled_from([1, 128, 130]), k=st.sampled_from([1, 3]))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
def test_deepseek_blocks_by_hand_and_back(xp, dtype, lead, seed, n, k):
    rng, block = np.random.default_rng(seed), (128, 2)
    codes, shape = e4m3(rng, (*lead, n, k)), (*lead, -(-n // 128), -(-k // 2))
    exponents = rng.integers(100, 140, shape).astype(np.uint8)
    stored = exponents.view(np.dtype(dtype)) if np.dtype(dtype).itemsize == 1 else scales(rng, shape, dtype)
    meant = 2.0 ** (exponents.astype(float) - 127) if np.dtype(dtype).itemsize == 1 else stored
    weight, scale = there(xp, (codes, stored))
    quantized = cumoe.from_deepseek_fp8(weight, scale, weight_block_size=block)
    assert (quantized.scheme, quantized.group_shape) == ("fp8", block)
    np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), block_numbers(codes, meant, *block))
    same_bits(cumoe.to_deepseek_fp8(quantized, scale_dtype=dtype), (weight, scale))


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "bfloat16", "float16"])
def test_every_narrow_scale_is_its_number_and_comes_back(xp, dtype):
    kind = np.dtype(dtype)
    codes = np.arange(2 ** (8 * kind.itemsize)).astype(f"u{kind.itemsize}").view(kind)
    quiet = np.isnan(codes.astype(np.float32)) & (codes.view(f"u{kind.itemsize}") != 0xFF)
    codes = codes[~quiet]  # NaNs have many patterns; e8m0 has one
    weight, scale = there(xp, (np.zeros((codes.size, 1, 1), E4M3), codes.reshape(-1, 1, 1)))
    quantized = cumoe.from_deepseek_fp8(weight, scale)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(back(quantized.scale).ravel(), codes.astype(np.float32))
    same_bits(cumoe.to_deepseek_fp8(quantized, scale_dtype=dtype)[1:], [scale])


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("bfloat16", 1 + 2**-8), ("float16", 65536.0), ("float16", 2**-25), ("uint8", 3.0), ("float8_e8m0fnu", -1.0)],
)
def test_a_scale_that_a_dtype_cannot_hold_is_refused(xp, dtype, number):
    quantized = cumoe.from_deepseek_fp8(*there(xp, (np.zeros((1, 1), E4M3), np.array([[number]], np.float32))))
    message = f"scale must have numbers that {dtype} holds exactly; choose another scale_dtype"
    with pytest.raises(ValueError, match=message):
        cumoe.to_deepseek_fp8(quantized, scale_dtype=dtype)


# -- two numbers a byte -----------------------------------------------------------------------------


def nvfp4(seed, lead, n, k):
    """Random codes, block scales and a factor for each matrix."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (*lead, n, k // 2)).astype(np.uint8)
    return packed, e4m3(rng, (*lead, n, -(-k // 16))), rng.uniform(0.5, 3000, lead).astype(np.float32)


@given(lead=LEADS, seed=SEEDS, n=st.sampled_from([1, 3]), k=st.sampled_from([2, 16, 40]))
def test_compressed_tensors_nvfp4_by_hand_and_back(xp, lead, seed, n, k):
    packed, scale, factor = nvfp4(seed, lead, n, k)
    given_arrays = there(xp, (packed, scale, factor.reshape(*lead, 1)))
    quantized = cumoe.from_compressed_tensors_nvfp4(*given_arrays)
    assert (quantized.scheme, quantized.global_scale.shape) == ("nvfp4", lead)
    each = scale.astype(np.float32) / factor[..., None, None]
    np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), fp4_numbers(packed, 16, each))
    same_bits(cumoe.to_compressed_tensors_nvfp4(quantized), given_arrays)
    same_bits(cumoe.from_compressed_tensors_nvfp4(*given_arrays[:2], on(xp, factor))[:2], given_arrays[:2])


@given(lead=LEADS, seed=SEEDS, n=st.sampled_from([1, 130]), k=st.sampled_from([16, 80]), swizzled=st.booleans())
def test_modelopt_nvfp4_by_hand_and_back(xp, lead, seed, n, k, swizzled):
    packed, scale, factor = nvfp4(seed, lead, n, k)
    stored = cumoe.swizzle_scales(scale) if swizzled else scale
    factor = np.asarray(1 / factor, np.float32)
    given_arrays = there(xp, (packed, stored, factor))
    quantized = cumoe.from_modelopt_nvfp4(*given_arrays, is_scale_swizzled=swizzled)
    assert quantized.values is given_arrays[0]
    same_bits([quantized.scale], [scale])
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(back(quantized.global_scale), np.float32(1) / factor)
    same_bits(
        cumoe.to_modelopt_nvfp4(quantized, weight_scale_2=given_arrays[2], is_scale_swizzled=swizzled), given_arrays
    )
    written = cumoe.to_modelopt_nvfp4(quantized, is_scale_swizzled=swizzled)
    again = cumoe.from_modelopt_nvfp4(*written, is_scale_swizzled=swizzled)
    same_bits((*again[:2], again.global_scale), (*quantized[:2], quantized.global_scale))
    np.testing.assert_array_almost_equal_nulp(back(written[2]).reshape(-1), factor.reshape(-1), 1)


def test_the_two_kinds_of_nvfp4_are_one_operand(xp):
    packed, scale, _ = nvfp4(0, (3,), 2, 32)
    one = cumoe.from_modelopt_nvfp4(*there(xp, (packed, scale, np.array([0.5, 0.125, 0], np.float32))))
    two = cumoe.from_compressed_tensors_nvfp4(*there(xp, (packed, scale, np.array([2, 8, np.inf], np.float32))))
    same_bits((*one[:2], one.global_scale), (*two[:2], two.global_scale))
    np.testing.assert_array_equal(back(cumoe.to_modelopt_nvfp4(two)[2]), np.float32([0.5, 0.125, 0]))


def test_which_multipliers_of_modelopt_have_a_way_back(xp):
    """All of one binade, and all binades of one: what the docstring says of the reciprocal is so."""
    binade = (np.arange(2**23, dtype=np.uint32) | 0x3F800000).view(np.float32)
    exponents = 2.0 ** np.arange(-125, 127).astype(np.float32)
    for multipliers in (binade, exponents):
        empty = np.zeros((multipliers.size, 0, 0), np.uint8)
        codes = there(xp, (empty, empty.view(E4M3)))
        quantized = cumoe.from_modelopt_nvfp4(*codes, on(xp, multipliers))
        written = back(cumoe.to_modelopt_nvfp4(quantized)[2])
        assert (np.abs(written.view(np.int32) - multipliers.view(np.int32)) <= 1).all()
        lost = written != multipliers
        assert (multipliers[lost] > 2**0.5).all()
        assert lost.mean() < 0.172 and (lost.any() or multipliers is exponents)
        # no float32 at all has those for a reciprocal, also not a neighbour of the nearest
        nearest = back(quantized.global_scale)[lost].view(np.int32)
        for step in (-1, 1):
            assert (np.float32(1) / (nearest + step).view(np.float32) != multipliers[lost]).all()


def test_a_global_scale_without_a_reciprocal_is_refused_or_rounded(xp):
    packed, scale, _ = nvfp4(0, (2,), 1, 16)
    factor = np.array([1.0, np.nextafter(np.float32(2), np.float32(0))], np.float32)
    assert np.float32(1) / (np.float32(1) / factor[1]) != factor[1]
    arrays = there(xp, (packed, scale, factor))
    quantized = cumoe.from_compressed_tensors_nvfp4(*arrays)
    with pytest.raises(ValueError, match=r"^global_scale must be the reciprocal of any float32 to be written exactly"):
        cumoe.to_modelopt_nvfp4(quantized)
    with pytest.raises(ValueError, match=r"^global_scale must be the reciprocal of the given weight_scale_2"):
        cumoe.to_modelopt_nvfp4(quantized, weight_scale_2=on(xp, np.ones(2, np.float32)))
    rounded = cumoe.to_modelopt_nvfp4(quantized, allow_rounding=True)[2]
    np.testing.assert_array_equal(back(rounded), np.float32(1) / factor)


@given(lead=LEADS, seed=SEEDS, n=st.sampled_from([1, 4]), groups=st.sampled_from([1, 3]))
def test_gpt_oss_by_hand_and_back(xp, lead, seed, n, groups):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*lead, n, groups, 16)).astype(np.uint8)
    exponents = rng.integers(90, 160, (*lead, n, groups)).astype(np.uint8)
    arrays = there(xp, (blocks, exponents))
    quantized = cumoe.from_gpt_oss_mxfp4(*arrays)
    packed = blocks.reshape(*lead, n, groups * 16)
    factor = (2.0 ** (exponents.astype(float) - 127)).astype(np.float32)
    np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), fp4_numbers(packed, 32, factor))
    same_bits(cumoe.to_gpt_oss_mxfp4(quantized), arrays)
    labelled = quantized._replace(scale=quantized.scale.view(E8M0))
    same_bits(cumoe.to_gpt_oss_mxfp4(labelled), arrays)


def test_gpt_oss_is_read_as_transformers_reads_it():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8))
    exponents = torch.from_numpy(rng.integers(100, 150, (2, 6, 3)).astype(np.uint8))
    theirs = mxfp4.convert_moe_packed_tensors(blocks, exponents)  # (E, K, N)
    ours = cumoe.dequantize(cumoe.from_gpt_oss_mxfp4(blocks, exponents), "bfloat16")
    assert torch.equal(theirs.cpu().transpose(-1, -2), ours)


def test_torch_goes_in_and_comes_out():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weight = torch.full((2, 128, 128), 2.0).to(torch.float8_e4m3fn)
    exponents = torch.full((2, 1, 1), 4.0).to(torch.float8_e8m0fnu)
    quantized = cumoe.from_deepseek_fp8(weight, exponents)
    assert quantized.values is weight and quantized.scale.dtype == torch.float32
    assert (cumoe.dequantize(quantized) == 8).all()
    written = cumoe.to_deepseek_fp8(quantized, scale_dtype="float8_e8m0fnu")
    assert written[1].dtype == torch.float8_e8m0fnu
    packed, scale = torch.zeros(2, 4, 8, dtype=torch.uint8), torch.ones(2, 4, 1).to(torch.float8_e4m3fn)
    nv = cumoe.from_modelopt_nvfp4(packed, scale, torch.tensor([0.5, 2.0]))
    assert nv.global_scale.tolist() == [2, 0.5]
    assert torch.equal(cumoe.to_modelopt_nvfp4(nv)[2], torch.tensor([0.5, 2.0]))


CODES, ONE = np.zeros((4, 6), np.int8), np.ones((4, 1), np.float32)
FP8, PACKED = np.zeros((4, 6), E4M3), np.zeros((4, 8), np.uint8)
BLOCK_SCALE, FACTOR = np.ones((4, 1), ml_dtypes.float8_e4m3fn), np.ones((), np.float32)
NVFP4 = cumoe.from_modelopt_nvfp4(PACKED, BLOCK_SCALE, FACTOR)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cumoe.from_compressed_tensors_int8(FP8, ONE), TypeError, "weight must be int8, got float8_e4m3fn"),
        (
            lambda: cumoe.from_compressed_tensors_fp8(FP8, ONE.astype(float)),
            TypeError,
            "weight_scale must be float32, float16 or bfloat16, got float64",
        ),
        (
            lambda: cumoe.from_compressed_tensors_int8(CODES, ONE[:3]),
            ValueError,
            "weight_scale must have shape (..., N, 1) = (4, 1), got (3, 1)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_int8(CODES, np.ones(2, np.float32)),
            ValueError,
            "weight_scale must have shape (..., 1) = (1,), got (2,)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_fp8(FP8, ONE, (2, 2)),
            ValueError,
            "weight_scale must have shape (..., Nb, Kb) = (2, 3), got (4, 1)",
        ),
        (
            lambda: cumoe.from_deepseek_fp8(FP8, ONE),
            ValueError,
            "weight_scale_inv must have shape (..., Nb, Kb) = (1, 1), got (4, 1)",
        ),
        (
            lambda: cumoe.from_deepseek_fp8(FP8[0], ONE),
            ValueError,
            "weight must have at least 2 axes (..., N, K), got shape (6,)",
        ),
        (
            lambda: cumoe.to_compressed_tensors_int8(NVFP4),
            ValueError,
            "scheme must be int8 or uint8, got 'nvfp4'",
        ),
        (
            lambda: cumoe.from_compressed_tensors_int8(CODES, ONE, weight_zero_point=np.zeros(4, np.int8)),
            ValueError,
            "weight_zero_point must have shape of weight_scale = (4, 1), got (4,)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_int8(CODES, ONE, weight_zero_point=PACKED[:, :1]),
            TypeError,
            "weight_zero_point must be int8, got uint8",
        ),
        (
            lambda: cumoe.to_compressed_tensors_fp8(NVFP4, scale_dtype="uint8"),
            ValueError,
            "scale_dtype must be float32, float16 or bfloat16, got 'uint8'",
        ),
        (
            lambda: cumoe.to_deepseek_fp8(cumoe.quantize(np.ones((2, 2), np.float32), "fp8")),
            ValueError,
            "group_shape must be a block, two sizes >= 1, got (-1, -1)",
        ),
        (
            lambda: cumoe.from_modelopt_nvfp4(PACKED, BLOCK_SCALE, np.ones(2, np.float32)),
            ValueError,
            "weight_scale_2 must have shape (...) = (), got (2,)",
        ),
        (
            lambda: cumoe.from_modelopt_nvfp4(PACKED, BLOCK_SCALE, FACTOR, is_scale_swizzled=True),
            ValueError,
            "weight_scale must have shape (..., 128 ceil(N / 128), 4 ceil(K / 64)) = (128, 4), got (4, 1)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_nvfp4(PACKED, BLOCK_SCALE.view(np.uint8), FACTOR),
            TypeError,
            "weight_scale must be float8_e4m3fn, got uint8",
        ),
        (
            lambda: cumoe.to_compressed_tensors_nvfp4(NVFP4._replace(global_scale=None)),
            TypeError,
            "global_scale must be an array, got None",
        ),
        (
            lambda: cumoe.from_gpt_oss_mxfp4(PACKED, PACKED),
            ValueError,
            "blocks must have at least 3 axes (..., N, K / 32, 16), got shape (4, 8)",
        ),
        (
            lambda: cumoe.from_gpt_oss_mxfp4(np.zeros((4, 1, 8), np.uint8), PACKED),
            ValueError,
            "blocks must have shape (..., N, K / 32, 16) = (4, 1, 16), got (4, 1, 8)",
        ),
        (
            lambda: cumoe.from_gpt_oss_mxfp4(np.zeros((4, 1, 16), np.uint8), PACKED),
            ValueError,
            "scales must have shape (..., N, K / 32) = (4, 1), got (4, 8)",
        ),
        (
            lambda: cumoe.to_gpt_oss_mxfp4(cumoe.quantize(np.ones((2, 40), np.float32), "mxfp4")),
            ValueError,
            "values must have K a multiple of 32, got 40",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
