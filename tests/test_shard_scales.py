"""One scale for two shards, groups that are cut, scales of two levels: against the rule of each, step by step."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import back, bits, on

import cumoe

E4M3 = np.dtype("float8_e4m3fn")
SEEDS = st.integers(0, 2**16)


def finite_codes(rng, shape):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, codes - 1, codes).view(E4M3)


@given(lead=st.sampled_from([(), (3,), (2, 2), (0,)]), seed=SEEDS, half=st.integers(1, 3))
def test_merged_scales_by_the_rule(xp, lead, seed, half):
    rng = np.random.default_rng(seed)
    codes = finite_codes(rng, (*lead, 2 * half, 5))
    scale = (10.0 ** rng.uniform(-5, 2, (*lead, 2))).astype(np.float32)
    merged = cumoe.merge_w13_scales(on(xp, codes), on(xp, scale))
    assert (merged.scheme, merged.group_shape, merged.scale.shape) == ("fp8", (-1, -1), (*lead, 1, 1))
    largest = scale.max(-1)[..., None, None]
    np.testing.assert_array_equal(back(merged.scale), largest)
    numbers = codes.astype(np.float32) * np.repeat(scale, half, axis=-1)[..., None]
    expected = np.clip(numbers * (np.float32(1) / largest), -448, 448).astype(E4M3)
    np.testing.assert_array_equal(bits(back(merged.values)), bits(expected))


@given(seed=SEEDS)
def test_the_half_with_the_larger_scale_keeps_its_codes(xp, seed):
    rng = np.random.default_rng(seed)
    codes = np.tile(finite_codes(rng, (1, 256)).view(np.uint8), (3, 4, 1)).view(E4M3)
    scale = (10.0 ** rng.uniform(-5, 2, (3, 2))).astype(np.float32)
    scale[2, 1] = scale[2, 0]
    halves = bits(back(cumoe.merge_w13_scales(on(xp, codes), on(xp, scale)).values)).reshape(3, 2, 2, 256)
    kept = scale == scale.max(-1, keepdims=True)
    np.testing.assert_array_equal(halves[kept], bits(codes).reshape(3, 2, 2, 256)[kept])


@given(
    seed=SEEDS,
    group=st.sampled_from([64, 128, 256]),
    scheme=st.sampled_from(["int4", "uint8"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    zero_points=st.booleans(),
    lead=st.sampled_from([(), (2,)]),
)
def test_halved_groups_stand_for_the_same_numbers(xp, seed, group, scheme, dtype, zero_points, lead):
    group = min(group, 128) if scheme == "int4" else group
    x = np.random.default_rng(seed).standard_normal((*lead, 4, 512)).astype(dtype)
    quantized = cumoe.quantize(on(xp, x), scheme, (1, group), zero_points=zero_points)
    halved = cumoe.halve_groups(quantized, 512, 96)
    assert halved.group_shape == (1, 32)
    assert halved.values is quantized.values
    assert halved.scale.dtype == quantized.scale.dtype
    same = (bits(back(cumoe.dequantize(one, dtype))) for one in (halved, quantized))
    np.testing.assert_array_equal(*same)


def test_groups_that_divide_all_sizes_stay():
    quantized = cumoe.quantize(np.ones((2, 128), np.float32), "int4", (1, 64))
    assert cumoe.halve_groups(quantized, 64, 192) is quantized
    assert cumoe.halve_groups(quantized) is quantized


def test_a_shard_that_ends_inside_a_group(xp):
    """A shard of 96 columns out of 192: the halved operand can be cut there, and its parts stand for the same."""
    x = np.random.default_rng(0).standard_normal((4, 384), np.float32)
    quantized = cumoe.quantize(on(xp, x), "int4", (1, 128))
    halved = cumoe.halve_groups(quantized, 96)
    shards = [
        halved._replace(
            values=halved.values[:, 48 * rank : 48 * (rank + 1)], scale=halved.scale[:, 3 * rank : 3 * (rank + 1)]
        )
        for rank in range(4)
    ]
    whole = np.concatenate([back(cumoe.dequantize(shard)) for shard in shards], axis=1)
    np.testing.assert_array_equal(whole, back(cumoe.dequantize(quantized)))


@given(
    lead=st.sampled_from([(), (2,)]),
    n=st.integers(1, 3),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=SEEDS,
)
def test_scales_of_two_levels_by_the_rule_of_vllm(xp, lead, n, groups, dtype, seed):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(seed)
    scale = (10.0 ** rng.uniform(-4, 1, (*lead, n, groups))).astype(np.float32).astype(dtype)
    group_scale, channel_scale = cumoe.w4a8_scales(on(xp, scale))
    wide = torch.from_numpy(scale.astype(np.float32))
    rows = (wide.amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    codes = (wide / rows).clamp(-448, 448).to(torch.float8_e4m3fn)
    eighths = (codes.float() / 8).to(torch.float8_e4m3fn)
    assert (group_scale.dtype, channel_scale.dtype) == (E4M3, np.float32)
    np.testing.assert_array_equal(bits(back(group_scale)), eighths.view(torch.uint8).numpy())
    np.testing.assert_array_equal(back(channel_scale), (rows * 8).numpy())


W13, PAIR = np.zeros((2, 4, 3), E4M3), np.ones((2, 2), np.float32)
INT4 = cumoe.quantize(np.ones((2, 128), np.float32), "int4", (1, 128))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cumoe.merge_w13_scales(W13.view(np.int8), PAIR),
            TypeError,
            "w13_weight must be float8_e4m3fn, got int8",
        ),
        (
            lambda: cumoe.merge_w13_scales(W13[:, :3], PAIR),
            ValueError,
            "w13_weight must have an even number of rows 2I, got shape (2, 3, 3)",
        ),
        (
            lambda: cumoe.merge_w13_scales(W13, PAIR[:1]),
            ValueError,
            "w13_weight_scale must have shape (..., 2) = (2, 2), got (1, 2)",
        ),
        (
            lambda: cumoe.halve_groups(INT4, 176),
            ValueError,
            "sizes must have a group size 128 / 2**n >= 32 of which all are multiples, got (176,)",
        ),
        (lambda: cumoe.halve_groups(INT4, 64.0), TypeError, "sizes must be an int, got float"),
        (
            lambda: cumoe.halve_groups(cumoe.quantize(np.ones((2, 32), np.float32), "mxfp4"), 32),
            ValueError,
            "scheme must be int4 or uint8, got 'mxfp4'",
        ),
        (
            lambda: cumoe.w4a8_scales(PAIR[0]),
            ValueError,
            "scale must have at least 2 axes (..., N, K / g), got shape (2,)",
        ),
        (
            lambda: cumoe.w4a8_scales(W13),
            TypeError,
            "scale must be float32, float16 or bfloat16, got float8_e4m3fn",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
