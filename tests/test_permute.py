"""Sorting pairs by expert and gathering rows: exactly the reference, for every type of number."""

import ml_dtypes
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from sides import assert_equal, back, on

import cumoe
from cumoe.reference import permute as reference

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    *("int8", "uint8", "int32", "bool"),
)


def tokens(num_tokens, hidden_size, dtype, seed=0):
    """Every byte counts: random bits, read as `dtype`; NaNs survive because nothing computes with them."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    codes = rng.integers(0, 2 if dtype == "bool" else 256, (num_tokens, hidden_size * size), dtype=np.uint8)
    return codes.view(dtype)


def assert_same_bytes(result, expected):
    result = back(result)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert result.tobytes() == expected.tobytes()


@given(
    routing=strategies.routings(),
    hidden_size=st.sampled_from((0, 1, 5, 33, 64)),
    dtype=st.sampled_from(DTYPES),
    scale_size=st.sampled_from((None, 1, 3)),
)
def test_permute_equals_reference(xp, routing, hidden_size, dtype, scale_size):
    ids, num_experts, num_local, expert_map = routing
    num_tokens, top_k = ids.shape
    x = tokens(num_tokens, hidden_size, dtype)
    scale = None if scale_size is None else tokens(num_tokens, scale_size, "float32", seed=1)
    offsets, idx, inv = reference.sort_by_expert(ids, num_local, expert_map)
    rows, row_scale, *indices = cumoe.moe_permute(
        on(xp, x), on(xp, scale), on(xp, ids), num_experts, num_local, on(xp, expert_map)
    )
    assert_equal(indices, [offsets, inv, idx])
    assert_same_bytes(rows, reference.gather_rows(x, idx, top_k))
    if scale is None:
        assert row_scale is None
    elif scale.shape != (1, 1):
        assert_same_bytes(row_scale, reference.gather_rows(scale, idx, top_k))


@given(routing=strategies.routings(), alignment=st.sampled_from((1, 2, 4, 16, 128)), dtype=st.sampled_from(DTYPES))
def test_permute_aligned_equals_reference(xp, routing, alignment, dtype):
    ids, _, num_local, expert_map = routing
    x, scale = tokens(len(ids), 7, dtype), tokens(len(ids), 2, "float32", seed=1)
    m_indices, idx, inv, counts = reference.sort_by_expert_aligned(ids, num_local, alignment, expert_map)
    rows, row_scale, *indices = cumoe.moe_permute_aligned(
        on(xp, x), on(xp, scale), on(xp, ids), num_local, alignment=alignment, expert_map=on(xp, expert_map)
    )
    assert len(m_indices) == cumoe.aligned_num_rows(*ids.shape, num_local, alignment)
    assert_equal(indices, [m_indices, inv, idx, counts])
    assert_same_bytes(rows, reference.gather_rows(x, idx, ids.shape[1]))
    assert_same_bytes(row_scale, reference.gather_rows(scale, idx, ids.shape[1]))


@given(routing=strategies.routings(), alignment=st.sampled_from((1, 4, 128)))
def test_a_block_of_the_aligned_form_has_one_expert(xp, routing, alignment):
    ids, _, num_local, expert_map = routing
    x = xp.zeros((len(ids), 1), np.float32)
    _, _, m_indices, _, idx, counts = map(
        back,
        cumoe.moe_permute_aligned(x, None, on(xp, ids), num_local, alignment=alignment, expert_map=on(xp, expert_map)),
    )
    for block in m_indices.reshape(-1, alignment):
        assert len(set(block.tolist()) - {-1}) <= 1
    np.testing.assert_array_equal(m_indices >= 0, idx < ids.size)
    np.testing.assert_array_equal(np.bincount(m_indices[m_indices >= 0], minlength=num_local), counts)


@given(routing=strategies.routings())
def test_pairs_ascend_within_an_expert(xp, routing):
    ids, num_experts, num_local, expert_map = routing
    x = xp.zeros((len(ids), 1), np.float32)
    _, _, offsets, inv, idx = map(
        back, cumoe.moe_permute(x, None, on(xp, ids), num_experts, num_local, on(xp, expert_map))
    )
    for e in range(num_local):
        pairs = idx[offsets[e] : offsets[e + 1]]
        assert (np.diff(pairs) > 0).all()
        np.testing.assert_array_equal(inv.reshape(-1)[pairs], np.arange(offsets[e], offsets[e + 1]))
    assert (idx[offsets[-1] :] == ids.size).all()
    assert np.count_nonzero(inv == -1) == ids.size - offsets[-1]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
def test_many_pairs_are_sorted_by_threads(xp, dtype):
    """Above the size where the blocks of pairs go to threads; 17 local experts of 60."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (30_001, 3)).astype(dtype)
    expert_map = np.full(60, -1, np.int32)
    expert_map[rng.permutation(60)[:17]] = np.arange(17)
    x = tokens(len(ids), 3, "float32")
    offsets, idx, inv = reference.sort_by_expert(ids, 17, expert_map)
    rows, _, *indices = cumoe.moe_permute(on(xp, x), None, on(xp, ids), 60, 17, on(xp, expert_map))
    assert_equal(indices, [offsets, inv, idx])
    assert_same_bytes(rows, reference.gather_rows(x, idx, 3))


def test_which_pairs_are_skipped(xp):
    """Ids outside the map, and local numbers outside 0..E_l-1."""
    ids = np.array([[-1, -3, 0, 1, 2, 3, 4, 123_456_789]])
    expert_map = np.array([1, -1, 2, -5], np.int32)
    x = np.ones((1, 1), np.float32)
    offsets, inv, idx = cumoe.moe_permute(on(xp, x), None, on(xp, ids), 4, 2, on(xp, expert_map))[2:]
    assert offsets.tolist() == [0, 0, 1] and inv.tolist() == [[-1, -1, 0, -1, -1, -1, -1, -1]]
    assert idx.tolist() == [2, *[8] * 7]
    assert cumoe.count_expert_num_tokens(on(xp, ids), 2, on(xp, expert_map)).tolist() == [0, 1]


def test_rows_without_a_pair_keep_what_out_holds(xp):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    ids = xp.asarray(np.array([[1, -1], [0, 9]]))
    out = xp.full((4, 3), np.nan, np.float32)
    rows, *_ = cumoe.moe_permute(xp.asarray(x), None, ids, 2, out=out)
    assert rows is out
    np.testing.assert_array_equal(back(rows), [x[1], x[0], [np.nan] * 3, [np.nan] * 3])
    out = xp.full((6, 3), np.nan, np.float32)
    rows, *_ = cumoe.moe_permute_aligned(xp.asarray(x), None, ids, 2, alignment=2, out=out)
    assert rows is out
    np.testing.assert_array_equal(back(rows)[[0, 2]], [x[1], x[0]])
    assert np.isnan(back(rows)[[1, 3, 4, 5]]).all()


def test_a_scale_for_all_tokens_is_handed_back(xp):
    x, ids = xp.zeros((3, 4), np.float32), xp.zeros((3, 2), np.int32)
    for shape in ((), (1,), (1, 1), (3,)):
        scale = xp.ones(shape, np.float32)
        assert cumoe.moe_permute(x, scale, ids, 1)[1] is scale
        assert cumoe.moe_permute_aligned(x, scale, ids, 1)[1] is scale


def test_strides_and_read_only(xp):
    x = tokens(6, 20, "bfloat16")
    ids = np.random.default_rng(0).integers(0, 5, (6, 4)).astype(np.int32)
    given_x, given_ids = on(xp, x), xp.asarray(ids)
    if xp is np:
        given_x.flags.writeable = given_ids.flags.writeable = False
    views = [(slice(None), slice(1, None, 2)), (slice(None, None, -1), slice(3))]
    for view in views:
        for other in views:
            offsets, idx, inv = reference.sort_by_expert(ids[other], 5)
            rows, _, *indices = cumoe.moe_permute(given_x[view], None, given_ids[other], 5)
            assert_equal(indices, [offsets, inv, idx])
            assert_same_bytes(rows, reference.gather_rows(x[view], idx, ids[other].shape[1]))


def test_inputs_are_not_written(xp):
    x, scale, ids = tokens(5, 3, "float32"), tokens(5, 1, "float32"), np.array([[0, 1]] * 5)
    given_arrays = [xp.array(array) for array in (x, scale, ids)]
    cumoe.moe_permute(given_arrays[0], given_arrays[1], given_arrays[2], 2)
    cumoe.moe_permute_aligned(given_arrays[0], given_arrays[1], given_arrays[2], 2)
    for array, before in zip(given_arrays, (x, scale, ids), strict=True):
        assert_same_bytes(array, before)


X, IDS = np.zeros((2, 4), np.float32), np.zeros((2, 3), np.int32)
WRONG = [
    (
        lambda: cumoe.moe_permute(X, None, [[0]], 4),
        TypeError,
        "topk_ids must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    (
        lambda: cumoe.moe_permute(X[0], None, IDS, 4),
        ValueError,
        "hidden_states must have 2 axes (T, H), got shape (4,)",
    ),
    (
        lambda: cumoe.moe_permute(X, None, IDS[:1], 4),
        ValueError,
        "topk_ids must have shape (T, k) = (2, 3), got (1, 3)",
    ),
    (lambda: cumoe.moe_permute(X, None, X, 4), TypeError, "topk_ids must be int32, int64 or uint32, got float32"),
    (lambda: cumoe.moe_permute(X.astype(object), None, IDS, 4), TypeError, "hidden_states must be numbers, got object"),
    (lambda: cumoe.moe_permute(X, None, IDS, 0), ValueError, "num_experts must be in 1..2147483647, got 0"),
    (lambda: cumoe.moe_permute(X, None, IDS, 4, 5), ValueError, "num_local_experts must be in 1..4, got 5"),
    (
        lambda: cumoe.moe_permute(X, None, IDS, 4, 2),
        ValueError,
        "num_local_experts must be num_experts = 4 without expert_map, got 2; pass the map",
    ),
    (
        lambda: cumoe.moe_permute(X, None, IDS, 4, 2, np.zeros(3, np.int32)),
        ValueError,
        "expert_map must have shape (E,) = (4,), got (3,)",
    ),
    (
        lambda: cumoe.moe_permute(X, np.zeros((3, 1), np.float32), IDS, 4),
        ValueError,
        "a1q_scale must have shape (T, H / group) = (2, 1), got (3, 1)",
    ),
    (
        lambda: cumoe.moe_permute(X, None, IDS, 4, out=np.zeros((5, 4), np.float32)),
        ValueError,
        "out must have shape (T*k, H) = (6, 4), got (5, 4)",
    ),
    (
        lambda: cumoe.moe_permute(X, None, IDS, 4, out=np.zeros((6, 4), np.float16)),
        TypeError,
        "out must be float32, got float16",
    ),
    (
        lambda: cumoe.moe_permute(X, None, IDS[:, :1], 4, out=X),
        ValueError,
        "out must not share memory with hidden_states; pass a separate array or out=None",
    ),
    (
        lambda: cumoe.moe_permute_aligned(X, None, IDS, 4, alignment=0),
        ValueError,
        "alignment must be in 1..2147483647, got 0",
    ),
    (
        lambda: cumoe.moe_permute_aligned(X, None, IDS, 0),
        ValueError,
        "num_local_experts must be in 1..2147483647, got 0",
    ),
    (
        lambda: cumoe.moe_permute_aligned(X, None, IDS, 4, alignment=2**31 - 1),
        ValueError,
        "M_sum must be in 0..2147483647, got 10737418235",
    ),
    (lambda: cumoe.aligned_num_rows(-1, 2, 3), ValueError, "num_tokens must be >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_misaligned_out_is_refused():
    memory = np.zeros(6 * 4 * 4 + 1, np.uint8)
    out = memory[1:].view(np.float32).reshape(6, 4)
    with pytest.raises(ValueError, match=r"^out must be aligned to 4 bytes, got an address [123] bytes off; pass a "):
        cumoe.moe_permute(X, None, IDS, 4, out=out)


def test_small_floats_have_their_own_type(xp):
    rows, *_ = cumoe.moe_permute(on(xp, tokens(2, 4, "float8_e4m3fn")), None, on(xp, IDS), 1)
    assert rows.dtype == ml_dtypes.float8_e4m3fn
