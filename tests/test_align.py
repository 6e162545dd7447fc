"""Blocks of pairs and counts of tokens: exactly the reference, on every input."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from sides import assert_equal, on

import cumoe
from cumoe.reference import align as reference

BLOCK_SIZES = st.sampled_from((1, 2, 3, 4, 16, 64))


@given(routing=strategies.routings(), block_size=BLOCK_SIZES, pad=st.booleans(), ignore=st.booleans())
def test_align_equals_reference(xp, routing, block_size, pad, ignore):
    ids, num_experts, _, expert_map = routing
    options = {"pad_sorted_ids": pad, "ignore_invalid_experts": ignore}
    expected = reference.align_block_size(ids, block_size, num_experts, expert_map=expert_map, **options)
    arguments = on(xp, ids), block_size, num_experts
    options["expert_map"] = on(xp, expert_map)
    assert_equal(cumoe.moe_align_block_size(*arguments, **options, return_scatter_idx=True), expected)
    assert_equal(cumoe.moe_align_block_size(*arguments, **options), expected[:3])


@given(routing=strategies.routings(), block_size=BLOCK_SIZES)
def test_align_keeps_every_pair_once(xp, routing, block_size):
    ids, num_experts, _, _ = routing
    slots, blocks, used = cumoe.moe_align_block_size(on(xp, ids), block_size, num_experts)
    slots, blocks, used = np.array(slots.tolist(), int), np.array(blocks.tolist(), int), int(used[0])
    flat = ids.reshape(-1).astype(np.int64)
    valid = np.flatnonzero((flat >= 0) & (flat < num_experts))
    np.testing.assert_array_equal(np.sort(slots[slots < ids.size]), valid)
    filled = np.flatnonzero(slots < ids.size)
    np.testing.assert_array_equal(flat[slots[filled]], blocks[filled // block_size])
    assert used % block_size == 0 and (slots[used:] == ids.size).all() and (blocks[used // block_size :] == -1).all()
    assert len(slots) >= used


@given(
    counts=st.lists(st.integers(-2, 20), max_size=9),
    max_num_tokens=st.integers(0, 17),
    block_size=BLOCK_SIZES,
    dtype=st.sampled_from(("int32", "int64")),
)
def test_batched_align_equals_reference(xp, counts, max_num_tokens, block_size, dtype):
    counts = np.array(counts, dtype)
    expected = reference.batched_align_block_size(max_num_tokens, block_size, counts)
    assert_equal(cumoe.batched_moe_align_block_size(max_num_tokens, block_size, on(xp, counts)), expected)


@given(routing=strategies.routings())
def test_count_equals_reference(xp, routing):
    ids, _, num_local, expert_map = routing
    expected = reference.count_expert_num_tokens(ids, num_local, expert_map)
    assert_equal([cumoe.count_expert_num_tokens(on(xp, ids), num_local, on(xp, expert_map))], [expected])


@given(routing=strategies.routings(maps=False), block_size=BLOCK_SIZES)
def test_naive_assignment_equals_reference(xp, routing, block_size):
    ids, num_experts, _, _ = routing
    slots, expert_ids, used = cumoe.naive_block_assignment(on(xp, ids), block_size, num_experts)
    assert slots is None
    expected = reference.naive_block_assignment(ids, num_experts), np.array([ids.size * block_size], np.int32)
    assert_equal([expert_ids, used], expected)


def test_the_documented_example(xp):
    ids = xp.asarray(np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], np.int32))
    expected = (
        np.array([3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12, *[12] * 11], np.int32),
        np.array([1, 2, 3, 4, -1, -1, -1], np.int32),
        np.array([16], np.int32),
    )
    assert_equal(cumoe.moe_align_block_size(ids, 4, 5), expected)


def test_the_documented_batched_example(xp):
    counts = xp.asarray(np.array([2, 3, 0, 6, 8], np.int32))
    s = 40
    slots = [0, 1, s, s, 8, 9, 10, s, *range(24, 30), s, s, *range(32, 40), *[s] * 16]
    expected = (
        np.array(slots, np.int32),
        np.array([0, 1, 3, 3, 4, 4, -1, -1, -1, -1], np.int32),
        np.array([24], np.int32),
    )
    assert_equal(cumoe.batched_moe_align_block_size(8, 4, counts), expected)


@pytest.mark.parametrize(
    ("num_tokens", "pad", "size"),
    [(2, False, 4 * 8), (2, True, 4 * 8), (3, False, 6 + 5 * 7), (3, True, 48), (0, False, 0)],
)
def test_sizes(xp, num_tokens, pad, size):
    """With fewer pairs than experts (here 5), no more than one block a pair."""
    ids = xp.zeros((num_tokens, 2), np.int32)
    slots, expert_ids, used = cumoe.moe_align_block_size(ids, 8, 5, pad_sorted_ids=pad)
    assert (slots.shape, expert_ids.shape, used.shape) == ((size,), (-(-size // 8),), (1,))


def test_blocks_of_other_ranks(xp):
    """Without `ignore_invalid_experts` they stay, labelled -1; with it they are gone."""
    ids = xp.asarray(np.array([[0, 1], [2, 1]]))
    expert_map = xp.asarray(np.array([-1, 0, 1], np.int32))
    slots, expert_ids, used = cumoe.moe_align_block_size(ids, 2, 3, expert_map=expert_map)
    assert (slots[:6].tolist(), expert_ids.tolist(), used.tolist()) == ([0, 4, 1, 3, 2, 4], [-1, 0, 1, -1], [6])
    slots, expert_ids, used, scatter_idx = cumoe.moe_align_block_size(
        ids, 2, 3, expert_map=expert_map, ignore_invalid_experts=True, return_scatter_idx=True
    )
    assert (slots[:4].tolist(), expert_ids.tolist(), used.tolist()) == ([1, 3, 2, 4], [0, 1, -1, -1], [4])
    assert scatter_idx.tolist() == [[-1], [1], [2], [3]]


def test_many_experts(xp):
    """No limit on their number."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 70_000, (300, 4))
    expected = reference.align_block_size(ids, 4, 70_000)[:3]
    assert_equal(cumoe.moe_align_block_size(xp.asarray(ids), 4, 70_000), expected)


def test_many_pairs_are_sorted_stably_by_threads(xp):
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 9, (40_000, 3)).astype(np.int32)
    expected = reference.align_block_size(ids, 64, 8)
    assert_equal(cumoe.moe_align_block_size(xp.asarray(ids), 64, 8, return_scatter_idx=True), expected)


def test_strides_and_read_only(xp):
    ids = np.arange(24, dtype=np.int32).reshape(4, 6) % 5
    expected = reference.align_block_size(ids[:, ::2], 4, 5)[:3]
    given_ids = xp.asarray(ids)
    if xp is np:
        given_ids.flags.writeable = False
    assert_equal(cumoe.moe_align_block_size(given_ids[:, ::2], 4, 5), expected)
    assert_equal(cumoe.moe_align_block_size(xp.asarray(ids.T)[::2].T, 4, 5), expected)
    counts = np.array([3, 9, 1, 9, 2], np.int32)
    given_counts = xp.asarray(counts)[::2]
    assert_equal(
        cumoe.batched_moe_align_block_size(4, 2, given_counts), reference.batched_align_block_size(4, 2, counts[::2])
    )


def test_naive_rule():
    assert cumoe.use_naive_block_assignment(0, 2, 1)
    assert cumoe.use_naive_block_assignment(16, 2, 128)
    assert not cumoe.use_naive_block_assignment(17, 2, 128)
    for reason in ({"has_expert_map": True}, {"weights_on_device": False}, {"is_grouped_wna16": True}):
        assert not cumoe.use_naive_block_assignment(1, 1, 128, **reason)


IDS = np.zeros((2, 3), np.int32)
WRONG = [
    (
        lambda: cumoe.moe_align_block_size([[1]], 4, 5),
        TypeError,
        "topk_ids must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    (
        lambda: cumoe.moe_align_block_size(IDS.astype(np.int16), 4, 5),
        TypeError,
        "topk_ids must be int32, int64 or uint32, got int16",
    ),
    (lambda: cumoe.moe_align_block_size(IDS[0], 4, 5), ValueError, "topk_ids must have 2 axes (T, k), got shape (3,)"),
    (lambda: cumoe.moe_align_block_size(IDS, 0, 5), ValueError, "block_size must be in 1..2147483647, got 0"),
    (lambda: cumoe.moe_align_block_size(IDS, 4, 0), ValueError, "num_experts must be in 1..2147483647, got 0"),
    (lambda: cumoe.moe_align_block_size(IDS, 4.0, 5), TypeError, "block_size must be an int, got float"),
    (
        lambda: cumoe.moe_align_block_size(IDS, 4, 5, expert_map=np.zeros(4, np.int32)),
        ValueError,
        "expert_map must have shape (E,) = (5,), got (4,)",
    ),
    (
        lambda: cumoe.moe_align_block_size(IDS, 4, 5, expert_map=np.zeros(5, np.int64)),
        TypeError,
        "expert_map must be int32, got int64",
    ),
    (
        lambda: cumoe.moe_align_block_size(IDS, 2**30, 5),
        ValueError,
        "T*k + E * (block_size - 1) must be in 0..2147483647, got 5368709121",
    ),
    (
        lambda: cumoe.moe_align_block_size(np.broadcast_to(IDS[0, 0], (2**20, 2**11)), 4, 5),
        ValueError,
        "topk_ids must have fewer than 2**31 elements, got shape (1048576, 2048)",
    ),
    (
        lambda: cumoe.batched_moe_align_block_size(-1, 4, np.zeros(5, np.int32)),
        ValueError,
        "max_tokens_per_batch must be in 0..2147483647, got -1",
    ),
    (
        lambda: cumoe.batched_moe_align_block_size(4, 4, IDS),
        ValueError,
        "expert_num_tokens must have 1 axis (E_l,), got shape (2, 3)",
    ),
    (
        lambda: cumoe.batched_moe_align_block_size(4, 4, np.zeros(5, np.uint8)),
        TypeError,
        "expert_num_tokens must be int32 or int64, got uint8",
    ),
    (
        lambda: cumoe.batched_moe_align_block_size(2**30, 4, np.zeros(5, np.int32)),
        ValueError,
        "E_l * max_tokens_per_batch, in whole blocks, must be in 0..2147483647, got 5368709120",
    ),
    (
        lambda: cumoe.naive_block_assignment(IDS, 2**30, 5),
        ValueError,
        "T*k * block_size must be in 0..2147483647, got 6442450944",
    ),
    (lambda: cumoe.count_expert_num_tokens(IDS, 0), ValueError, "num_local_experts must be in 1..2147483647, got 0"),
    (
        lambda: cumoe.count_expert_num_tokens(IDS, 3, IDS),
        ValueError,
        "expert_map must have 1 axis (E,), got shape (2, 3)",
    ),
    (lambda: cumoe.use_naive_block_assignment(-1, 2, 8), ValueError, "num_tokens must be >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
