"""The batched format, other libraries' layouts and the forms of reduction."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from sides import assert_equal, back, on

import cumoe
from cumoe.reference import batched as reference
from cumoe.reference import unpermute as unpermute_reference
from cumoe.reference.experts import ratio

DTYPES = st.sampled_from(("float32", "float16", "bfloat16"))


def draw(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def assert_same_bytes(result, expected):
    result = back(result)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert result.tobytes() == expected.tobytes()


@st.composite
def placements(draw_one):
    """A routing and where this rank's experts are: (routing, E_l, keyword arguments, first expert, map)."""
    routing = draw_one(strategies.routings())
    if routing.expert_map is not None:
        return routing, routing.num_local_experts, {}, 0, routing.expert_map
    num_local = draw_one(st.integers(1, routing.num_experts))
    rank = draw_one(st.integers(0, 3))
    way = {"first_expert": num_local * rank} if draw_one(st.booleans()) else {"rank": rank}
    return routing, num_local, way, num_local * rank, None


@given(
    placement=placements(),
    max_num_tokens=st.sampled_from((0, 1, 2, 7, 40, 240)),
    num_dispatchers=st.integers(1, 2),
    dtype=st.sampled_from(("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "float64")),
    scale_size=st.sampled_from((None, 1, 3)),
)
def test_batch_equals_reference(xp, placement, max_num_tokens, num_dispatchers, dtype, scale_size):
    (ids, *_), num_local, way, first, expert_map = placement
    x = draw((len(ids), 9), dtype)
    scale = None if scale_size is None else draw((len(ids), scale_size), "float32", seed=1)
    capacity = max_num_tokens * num_dispatchers
    slots, counts = reference.assign_slots(ids, num_local, capacity, first, expert_map)
    batched, expert_num_tokens, *batched_scale = cumoe.moe_batch(
        on(xp, x),
        on(xp, ids),
        num_local,
        max_num_tokens,
        **way,
        expert_map=on(xp, expert_map),
        num_dispatchers=num_dispatchers,
        a1q_scale=on(xp, scale),
    )
    assert_equal([expert_num_tokens], [counts])
    assert_same_bytes(batched, reference.scatter_rows(x, slots, num_local, capacity))
    if scale is not None:
        assert_same_bytes(batched_scale[0], reference.scatter_rows(scale, slots, num_local, capacity))


@given(
    placement=placements(),
    capacity=st.sampled_from((0, 1, 7, 240)),
    dtype=DTYPES,
    hidden_size=st.sampled_from((1, 16, 513)),
    weighted=st.booleans(),
)
def test_unbatch_equals_reference(xp, placement, capacity, dtype, hidden_size, weighted):
    (ids, *_), num_local, way, first, expert_map = placement
    slots, counts = reference.assign_slots(ids, num_local, capacity, first, expert_map)
    y = draw((num_local, capacity, hidden_size), dtype)
    y[np.arange(capacity) >= counts[:, None]] = np.nan  # unused slots are never read
    weights = np.random.default_rng(1).random(ids.shape, np.float32) if weighted else None
    expected = unpermute_reference.unpermute(y.reshape(-1, hidden_size), weights, slots)
    out = cumoe.moe_unbatch(on(xp, y), on(xp, weights), on(xp, ids), **way, expert_map=on(xp, expert_map))
    assert (out.dtype, out.shape) == (y.dtype, expected.value.shape)
    assert ratio(back(out), expected).max(initial=0) <= 1


@given(routing=strategies.routings(maps=False), dtype=DTYPES)
def test_batched_and_permuted_forms_have_the_same_bits(xp, routing, dtype):
    """Both add a token's rows in the order of its choices."""
    ids, num_experts, _, _ = routing
    x, weights = draw((len(ids), 21), dtype), np.random.default_rng(1).random(ids.shape, np.float32)
    x, ids, weights = on(xp, x), on(xp, ids), on(xp, weights)
    batched, _ = cumoe.moe_batch(x, ids, num_experts, 240, check=True)
    rows, _, offsets, inv, _ = cumoe.moe_permute(x, None, ids, num_experts)
    aligned, _, _, aligned_inv, *_ = cumoe.moe_permute_aligned(x, None, ids, num_experts, alignment=16)
    results = [
        cumoe.moe_unbatch(batched, weights, ids),
        cumoe.moe_unpermute(rows, weights, inv, offsets),
        cumoe.moe_unpermute(aligned, weights, aligned_inv),
    ]
    assert len({back(result).tobytes() for result in results}) == 1


def test_large_batches_go_to_threads(xp):
    x = draw((3000, 64), "bfloat16")
    ids = np.random.default_rng(0).integers(-1, 9, (3000, 4)).astype(np.int32)
    slots, counts = reference.assign_slots(ids, 8, 1500)
    batched, expert_num_tokens = cumoe.moe_batch(on(xp, x), on(xp, ids), 8, 1500)
    assert_equal([expert_num_tokens], [counts])
    assert_same_bytes(batched, reference.scatter_rows(x, slots, 8, 1500))


def test_ranks_share_the_experts(xp):
    """Each rank's part added up gives the whole."""
    x, ids = draw((20, 8), "float32"), np.random.default_rng(0).integers(0, 6, (20, 3))
    parts = []
    for rank in range(3):
        batched, _ = cumoe.moe_batch(on(xp, x), on(xp, ids), 2, 60, rank=rank, check=True)
        parts.append(back(cumoe.moe_unbatch(batched, None, on(xp, ids), rank=rank)))
    np.testing.assert_allclose(sum(parts), 3 * x, rtol=1e-6)


def test_unused_slots_keep_what_out_holds(xp):
    x, ids = draw((3, 4), "float32"), xp.asarray(np.array([[0], [1], [0]]))
    out = xp.full((2, 3, 4), np.nan, np.float32)
    batched, counts = cumoe.moe_batch(xp.asarray(x), ids, 2, 3, out=out)
    assert batched is out and counts.tolist() == [2, 1]
    np.testing.assert_array_equal(back(batched)[[0, 0, 1], [0, 1, 0]], x[[0, 2, 1]])
    assert np.isnan(back(batched)[[0, 1, 1], [2, 1, 2]]).all()


def test_one_scale_for_all(xp):
    x, ids = xp.zeros((3, 4), np.int8), xp.zeros((3, 1), np.int32)
    for shape in ((), (1,), (1, 1)):
        scale = cumoe.moe_batch(x, ids, 2, 3, a1q_scale=xp.full(shape, 0.5, np.float32))[2]
        assert_equal([scale], [np.full((2, 1, 1), 0.5, np.float32)])


def test_strides_and_read_only():
    x, ids = draw((6, 10), "float16"), np.random.default_rng(0).integers(0, 3, (6, 4))
    x.flags.writeable = ids.flags.writeable = False
    batched, counts = cumoe.moe_batch(x[:, ::2], ids[:, ::2], 3, 12)
    same, same_counts = cumoe.moe_batch(x[:, ::2].copy(), ids[:, ::2].copy(), 3, 12)
    assert batched.tobytes() == same.tobytes() and counts.tolist() == same_counts.tolist()
    strided = np.asfortranarray(batched)
    strided.flags.writeable = False
    weights = np.ones((6, 2), np.float32)
    out = cumoe.moe_unbatch(strided, weights, ids[:, ::2])
    assert out.tobytes() == cumoe.moe_unbatch(batched, weights, ids[:, ::2].copy()).tobytes()


# -- the layouts of other libraries -----------------------------------------------------------------


@given(routing=strategies.routings(), alignment=st.sampled_from((1, 4, 128)))
def test_layouts_describe_the_same_rows(xp, routing, alignment):
    ids, num_experts, num_local, expert_map = routing
    x = xp.zeros((len(ids), 1), np.float32)
    arguments = on(xp, ids), num_experts, num_local, on(xp, expert_map)
    offsets = cumoe.moe_permute(x, None, *arguments)[2]
    counts = cumoe.count_expert_num_tokens(on(xp, ids), num_local, on(xp, expert_map))
    assert_equal([cumoe.grouped_mm_offsets(offsets)], [np.cumsum(back(counts)).astype(np.int32)])
    assert_equal([cumoe.ragged_dot_group_sizes(offsets)], [back(counts)])
    assert_equal([cumoe.first_token_offset(counts)], [back(offsets)])
    _, _, m_indices, *_, aligned_counts = cumoe.moe_permute_aligned(
        x, None, on(xp, ids), num_local, alignment=alignment, expert_map=on(xp, expert_map)
    )
    assert_equal([aligned_counts], [back(counts)])
    ends = back(cumoe.aligned_end_offsets(counts, alignment))
    assert ends.dtype == np.int32
    for e, (end, count) in enumerate(zip(ends, back(counts), strict=True)):
        assert (back(m_indices)[end - count : end] == e).all()
        assert (end - count) % alignment == 0


def test_torch_grouped_mm_takes_the_offsets():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    ids = np.random.default_rng(0).integers(0, 4, (16, 2))
    x, w = torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(4, 32, 16, dtype=torch.bfloat16)
    rows, _, offsets, inv, idx = cumoe.moe_permute(x, None, torch.from_numpy(ids), 4)
    offs = cumoe.grouped_mm_offsets(offsets)
    y = torch.nn.functional.grouped_mm(rows, w, offs=offs)
    expert = ids.reshape(-1)[idx.numpy()]
    expected = torch.stack([x[p // 2].float() @ w[e].float() for p, e in zip(idx.tolist(), expert, strict=True)])
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.02)
    assert cumoe.moe_unpermute(y, None, inv).shape == (16, 16)


@pytest.mark.parametrize("shape", [(5, 3), (4, 1), (1, 7), (0, 2), (3, 6, 5), (2, 8, 4)])
def test_tma_aligned_scale(xp, shape):
    exponents = np.random.default_rng(0).integers(-20, 20, shape)
    scale = np.exp2(exponents).astype(np.float32)
    aligned = cumoe.tma_aligned_scale(xp.asarray(scale))
    assert_equal([aligned], [scale])
    rows = -(-shape[-2] // 4) * 4
    if scale.size and 1 not in shape:
        assert aligned.strides[-2:] == (4, 4 * rows)
    packed = cumoe.tma_aligned_scale(xp.asarray(scale), pack_ue8m0=True)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 4)) and packed.dtype == np.int32
    words = back(packed).view(np.uint32).astype(np.int64) if scale.size else np.zeros(packed.shape, np.int64)
    for column in range(shape[-1]):
        codes = words[..., column // 4] >> 8 * (column % 4) & 0xFF
        np.testing.assert_array_equal(codes, exponents[..., column] + 127)
    if shape[-1] % 4 and scale.size:
        assert (words[..., -1] >> 8 * (shape[-1] % 4) == 0).all()
    codes = (exponents + 127).astype(np.uint8).view("float8_e8m0fnu")
    again = cumoe.tma_aligned_scale(on(xp, codes), pack_ue8m0=True)
    assert_equal([again], [back(packed)])


# -- the forms of reduction -------------------------------------------------------------------------


def test_contiguous_form(xp):
    x, weights = draw((5, 3, 7), "bfloat16"), np.random.default_rng(1).random((5, 3), np.float32)
    ids = np.array([[0, 1, 2], [-1, 1, 2], [-1, -1, -1], [3, -1, 0], [0, 0, 0]])
    used = ids >= 0
    for on_input in (False, True):
        expected = unpermute_reference.weighted_sum(x, None if on_input else weights, used)
        for rows in (x, x.reshape(15, 7)):
            arguments = on(xp, rows), on(xp, weights), on(xp, ids)
            out = cumoe.topk_weight_and_reduce(*arguments, apply_router_weight_on_input=on_input)
            assert ratio(back(out), expected).max() <= 1
            given_out = on(xp, np.full(out.shape, 7, out.dtype))
            same = cumoe.topk_weight_and_reduce(*arguments, apply_router_weight_on_input=on_input, out=given_out)
            assert same is given_out and back(same).tobytes() == back(out).tobytes()
            assert (back(out)[2] == 0).all()


def test_noop_form(xp):
    x, weights, ids = xp.asarray(draw((5, 7), "float32")), xp.ones((5, 2), np.float32), xp.zeros((5, 2), np.int32)
    assert cumoe.topk_weight_and_reduce(x, weights, ids, form="noop") is x
    out = xp.empty((5, 7), np.float32)
    assert cumoe.topk_weight_and_reduce(x, weights, ids, form="noop", out=out) is out
    np.testing.assert_array_equal(back(out), back(x))


def test_naive_batched_form(xp):
    y, weights = draw((2, 9, 4), "float32"), np.random.default_rng(1).random((6, 2), np.float32)
    ids = np.random.default_rng(0).integers(0, 6, (6, 2))
    y, weights, ids = on(xp, y), on(xp, weights), on(xp, ids)
    for on_input in (False, True):
        out = cumoe.topk_weight_and_reduce(
            y, weights, ids, form="naive_batched", rank=1, apply_router_weight_on_input=on_input
        )
        same = cumoe.moe_unbatch(y, None if on_input else weights, ids, first_expert=2)
        assert back(out).tobytes() == back(same).tobytes()


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x, ids = torch.randn(4, 6, dtype=torch.bfloat16), torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]])
    batched, counts = cumoe.moe_batch(x, ids, 3, 4)
    out = torch.empty(4, 6, dtype=torch.bfloat16)
    same = cumoe.topk_weight_and_reduce(batched, torch.full((4, 2), 0.5), ids, form="naive_batched", out=out)
    assert same is out and torch.equal(out, x) and counts.tolist() == [3, 3, 2]


X, IDS, W = np.zeros((2, 4), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
MAP, Y = np.zeros(5, np.int32), np.zeros((2, 6, 4), np.float32)
ONLY_ONE = "only one of rank, first_expert and expert_map may be given, got "
WRONG = [
    (lambda: cumoe.moe_batch(X[0], IDS, 2, 6), ValueError, "hidden_states must have 2 axes (T, H), got shape (4,)"),
    (lambda: cumoe.moe_batch(X, IDS[:1], 2, 6), ValueError, "topk_ids must have shape (T, k) = (2, 3), got (1, 3)"),
    (lambda: cumoe.moe_batch(X, IDS, 0, 6), ValueError, "num_local_experts must be >= 1, got 0"),
    (lambda: cumoe.moe_batch(X, IDS, 2, -1), ValueError, "max_num_tokens must be >= 0, got -1"),
    (lambda: cumoe.moe_batch(X, IDS, 2, 6, num_dispatchers=0), ValueError, "num_dispatchers must be >= 1, got 0"),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 2**30, num_dispatchers=2),
        ValueError,
        "E_l * max_num_tokens * num_dispatchers must be in 0..2147483647, got 4294967296",
    ),
    (lambda: cumoe.moe_batch(X, IDS, 2, 6, rank=-1), ValueError, "rank must be >= 0, got -1"),
    (lambda: cumoe.moe_batch(X, IDS, 2, 6, rank=1, first_expert=2), ValueError, ONLY_ONE + "rank and first_expert"),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 6, first_expert=0, expert_map=MAP),
        ValueError,
        ONLY_ONE + "first_expert and expert_map",
    ),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 6, expert_map=IDS),
        ValueError,
        "expert_map must have 1 axis (E,), got shape (2, 3)",
    ),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 5, check=True),
        ValueError,
        "max_num_tokens * num_dispatchers must be >= the tokens of local expert 0 = 6, got 5",
    ),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 6, a1q_scale=np.zeros((3, 1), np.float32)),
        ValueError,
        "a1q_scale must have shape (T, H / group) = (2, 1), got (3, 1)",
    ),
    (
        lambda: cumoe.moe_batch(X, IDS, 2, 6, out=np.zeros((2, 5, 4), np.float32)),
        ValueError,
        "out must have shape (E_l, slots, H) = (2, 6, 4), got (2, 5, 4)",
    ),
    (lambda: cumoe.moe_batch(X.astype(object), IDS, 2, 6), TypeError, "hidden_states must be numbers, got object"),
    (lambda: cumoe.moe_unbatch(X, W, IDS), ValueError, "batched must have 3 axes (E_l, slots, H), got shape (2, 4)"),
    (
        lambda: cumoe.moe_unbatch(Y.astype(int), W, IDS),
        TypeError,
        "batched must be float32, float16 or bfloat16, got int64",
    ),
    (
        lambda: cumoe.moe_unbatch(Y, W[:, :2], IDS),
        ValueError,
        "topk_weights must have shape (T, k) = (2, 3), got (2, 2)",
    ),
    (
        lambda: cumoe.moe_unbatch(Y, W, IDS, out=Y[0, :2]),
        ValueError,
        "out must not share memory with batched; pass a separate array or out=None",
    ),
    (
        lambda: cumoe.grouped_mm_offsets(X),
        ValueError,
        "expert_first_token_offset must have 1 axis (E + 1,), got shape (2, 4)",
    ),
    (
        lambda: cumoe.ragged_dot_group_sizes(X[0]),
        TypeError,
        "expert_first_token_offset must be int32 or int64, got float32",
    ),
    (
        lambda: cumoe.grouped_mm_offsets(MAP[:0]),
        ValueError,
        "expert_first_token_offset must have shape (E + 1,), got (0,)",
    ),
    (lambda: cumoe.first_token_offset(X), ValueError, "group_sizes must have 1 axis (E,), got shape (2, 4)"),
    (lambda: cumoe.aligned_end_offsets(MAP, 0), ValueError, "alignment must be in 1..2147483647, got 0"),
    (lambda: cumoe.tma_aligned_scale(X[0]), ValueError, "scale must have 2 or 3 axes (M, K / group), got shape (4,)"),
    (lambda: cumoe.tma_aligned_scale(X.astype(np.float64)), TypeError, "scale must be float32, got float64"),
    (
        lambda: cumoe.topk_weight_and_reduce(X, W, IDS, form="delegate"),
        ValueError,
        "form must be noop, contiguous or naive_batched, got 'delegate'",
    ),
    (
        lambda: cumoe.topk_weight_and_reduce(X, W, IDS),
        ValueError,
        "fused_expert_output must have shape (T*k, H) = (6, 4), got (2, 4)",
    ),
    (
        lambda: cumoe.topk_weight_and_reduce(X[:1], W, IDS, form="noop"),
        ValueError,
        "fused_expert_output must have shape (T, H) = (2, 4), got (1, 4)",
    ),
    (
        lambda: cumoe.topk_weight_and_reduce(X, W, IDS, rank=1),
        ValueError,
        "rank must be 0 unless form is 'naive_batched', got 1",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
