"""
The public test grids of vLLM 0.33 for align, count, permute, unpermute and the sums, cell by cell.

Integers are compared exactly, floats at the public tolerance and at the derived bound. Where a cell is
large, rows are sampled: a row's bits do not depend on the other rows, which test_permute.py and
test_unpermute.py show.
"""

import itertools

import numpy as np
import pytest
from sides import assert_equal, back, bits, on

import cumoe
from cumoe.reference import align as align_reference
from cumoe.reference import permute as permute_reference
from cumoe.reference import unpermute as unpermute_reference
from cumoe.reference.experts import Bounded, ratio


def draw_ids(num_tokens, top_k, num_experts, seed=0):
    """Distinct experts in each row, as a router gives them."""
    rng = np.random.default_rng(seed)
    return np.argpartition(rng.random((num_tokens, num_experts), np.float32), top_k - 1, axis=1)[:, :top_k].astype(
        np.int32
    )


def draw(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def local_map(num_experts, ep_size, rank):
    """The map of a rank that has a share of the experts, in a row."""
    num_local = num_experts // ep_size
    expert_map = np.full(num_experts, -1, np.int32)
    expert_map[num_local * rank : num_local * (rank + 1)] = np.arange(num_local)
    return expert_map


def assert_close(out, bounded, tolerance):
    """At the public tolerance, atol = rtol, and at the derived bound."""
    out = back(out)
    distance = np.abs(out.astype(np.float64) - bounded.value)
    assert (distance <= tolerance * (1 + np.abs(bounded.value))).all()
    assert ratio(out, bounded).max(initial=0) <= 1


# -- align and count --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [32, 160, 256, 257])
@pytest.mark.parametrize("num_tokens", [1, 3, 256, 2256, 4096])
def test_align(xp, num_tokens, num_experts):
    for top_k, block_size, pad in itertools.product((1, 2, 16, 32), (32, 128), (False, True)):
        ids = draw_ids(num_tokens, top_k, num_experts)
        expected = align_reference.align_block_size(ids, block_size, num_experts, pad_sorted_ids=pad)[:3]
        result = cumoe.moe_align_block_size(xp.asarray(ids), block_size, num_experts, pad_sorted_ids=pad)
        assert_equal(result, expected)


@pytest.mark.parametrize("num_tokens", [16, 32, 2048])
def test_align_with_map(xp, num_tokens):
    for top_k, num_experts, ignore in itertools.product((2, 4), (8, 64), (False, True)):
        ids, expert_map = draw_ids(num_tokens, top_k, num_experts), local_map(num_experts, 2, 0)
        options = {"ignore_invalid_experts": ignore}
        expected = align_reference.align_block_size(ids, 64, num_experts, expert_map=expert_map, **options)[:3]
        options["expert_map"] = xp.asarray(expert_map)
        assert_equal(cumoe.moe_align_block_size(xp.asarray(ids), 64, num_experts, **options), expected)


@pytest.mark.parametrize("max_num_tokens", [13, 16, 512])
def test_batched_align(xp, max_num_tokens):
    for num_experts, block_size in itertools.product((8, 16, 32, 64), (8, 16, 32, 48, 64)):
        counts = np.random.default_rng(num_experts).integers(0, max_num_tokens + 1, num_experts, dtype=np.int32)
        expected = align_reference.batched_align_block_size(max_num_tokens, block_size, counts)
        assert_equal(cumoe.batched_moe_align_block_size(max_num_tokens, block_size, xp.asarray(counts)), expected)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_count(xp, ep_size):
    for num_tokens, top_k in itertools.product((1, 4, 8, 11, 127, 128, 3333, 7317), (2, 6, 8)):
        ids = draw_ids(num_tokens, top_k, 64)
        for rank in range(ep_size):
            expert_map = local_map(64, ep_size, rank)
            expected = align_reference.count_expert_num_tokens(ids, 64 // ep_size, expert_map)
            result = cumoe.count_expert_num_tokens(xp.asarray(ids), 64 // ep_size, xp.asarray(expert_map))
            assert_equal([result], [expected])


def test_count_of_every_length(xp):
    for num_pairs in range(1, 8193, 111):
        ids = np.random.default_rng(num_pairs).integers(-1, 32, (num_pairs, 1)).astype(np.int32)
        expert_map = local_map(32, 2, 1)
        expected = align_reference.count_expert_num_tokens(ids, 16, expert_map)
        assert_equal([cumoe.count_expert_num_tokens(xp.asarray(ids), 16, xp.asarray(expert_map))], [expected])


# -- permute and unpermute --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_size", [2048, 7168])
@pytest.mark.parametrize("num_tokens", [1, 33, 1024, 5000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_permute_and_unpermute(xp, num_tokens, hidden_size, dtype):
    """Indices all, rows and sums sampled: 64 of each."""
    rng = np.random.default_rng(0)
    x = draw((num_tokens, hidden_size), dtype)
    given_x = on(xp, x)
    for num_experts, top_k, ep_size in itertools.product((16, 64, 256), (2, 6, 8), (1, 4, 16)):
        num_local, rank = num_experts // ep_size, ep_size - 1
        expert_map = local_map(num_experts, ep_size, rank)
        ids = draw_ids(num_tokens, top_k, num_experts)
        offsets, idx, inv = permute_reference.sort_by_expert(ids, num_local, expert_map)
        rows, _, *indices = cumoe.moe_permute(
            given_x, None, xp.asarray(ids), num_experts, num_local, xp.asarray(expert_map)
        )
        assert_equal(indices, [offsets, inv, idx])
        assert rows.shape == (num_tokens * top_k, hidden_size)
        filled = int(offsets[-1])
        some = rng.integers(0, filled, min(filled, 64)) if filled else np.zeros(0, int)
        assert back(bits(rows)[xp.asarray(some)]).tobytes() == x[idx[some] // top_k].tobytes()
        if dtype == "bfloat16":
            weights = rng.random((num_tokens, top_k), np.float32)
            out = cumoe.moe_unpermute(rows, xp.asarray(weights), indices[1], indices[0])
            t = rng.integers(0, num_tokens, min(num_tokens, 64))
            # a skipped choice adds nothing, so the tokens themselves stand for the rows
            choices = np.broadcast_to(x[t][:, None], (len(t), top_k, hidden_size))
            expected = unpermute_reference.weighted_sum(choices, weights[t], inv[t] >= 0)
            assert_close(back(out)[t], expected, 2e-2)


# -- the sums ---------------------------------------------------------------------------------------

SUM_VIEWS = {  # shape in memory, and the view of it
    "contiguous": (lambda m, k, h: (m, k, h), lambda x: x),
    "transposed": (lambda m, k, h: (k, m, h), lambda x: x.transpose(1, 0, 2)),
    "sliced": (lambda m, k, h: (m, 2 * k, h + 16), lambda x: x[:, ::2, 8:-8]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("view", SUM_VIEWS)
def test_moe_sum(xp, view, dtype):
    for num_tokens, top_k, hidden_size in itertools.product((1, 33, 222), (2, 6, 8), (128, 511, 1024)):
        shape, cut = SUM_VIEWS[view]
        memory = draw(shape(num_tokens, top_k, hidden_size), dtype)
        x, given = cut(memory), cut(on(xp, memory))
        ids, expert_map = draw_ids(num_tokens, top_k, 16), local_map(16, 2, 0)
        for arguments in ((), (ids,), (ids, expert_map)):
            used = unpermute_reference.used_choices(num_tokens, top_k, *(*arguments, None, None)[:2])
            expected = unpermute_reference.weighted_sum(x, None, used)
            assert_close(cumoe.moe_sum(given, *map(xp.asarray, arguments)), expected, 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 1e-2), ("float32", 1e-4)])
def test_moe_fused_mul_sum(xp, dtype, tolerance):
    for num_tokens, top_k, hidden_size in itertools.product((1, 16, 64, 128), (2, 4, 8), (128, 512, 4096)):
        x = draw((num_tokens, top_k, hidden_size), dtype)
        weights = np.random.default_rng(1).random((num_tokens, top_k), np.float32)
        ids, expert_map = draw_ids(num_tokens, top_k, 16), local_map(16, 2, 0)
        ids[::3, 0] = -1
        for arguments in ((), (ids, expert_map)):
            used = unpermute_reference.used_choices(num_tokens, top_k, *(*arguments, None, None)[:2])
            expected = unpermute_reference.weighted_sum(x, weights, used)
            out = cumoe.moe_fused_mul_sum(on(xp, x), xp.asarray(weights), *map(xp.asarray, arguments))
            assert_close(out, expected, tolerance)


def test_the_comparison_refuses_what_is_wrong():
    bounded = Bounded(np.ones((1, 2)), np.full((1, 2), 1e-3))
    assert_close(np.ones((1, 2), np.float32), bounded, 1e-2)
    for wrong in (1.005, 0.0, np.nan):
        with pytest.raises(AssertionError):
            assert_close(np.full((1, 2), wrong, np.float32), bounded, 1e-2)
