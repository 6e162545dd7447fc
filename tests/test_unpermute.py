"""Adding rows per token: within the derived bound of the float64 reference, and the exact things exactly."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from sides import back, gpu, on

import cumoe
from cumoe.reference import permute as permute_reference
from cumoe.reference import unpermute as reference
from cumoe.reference.experts import ratio

DTYPES = st.sampled_from(("float32", "float16", "bfloat16"))
SIZES = st.sampled_from((1, 3, 17, 64, 511, 512, 513))
SCALES = st.sampled_from((1.0, 1e-3, 1e-7, 100.0))  # 1e-7: float16 subnormals


def draw(shape, dtype, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def draw_weights(num_tokens, top_k, seed=0):
    return np.random.default_rng(seed).random((num_tokens, top_k), np.float32)


def assert_within_bound(out, bounded, dtype):
    out = back(out)
    assert (out.dtype.name, out.shape) == (dtype, bounded.value.shape)
    worst = ratio(out, bounded).max(initial=0.0)
    assert worst <= 1, worst


@given(
    routing=strategies.routings(),
    hidden_size=SIZES,
    dtype=DTYPES,
    scale=SCALES,
    weighted=st.booleans(),
    index_dtype=st.sampled_from(("int32", "int64")),
)
def test_unpermute_equals_reference(xp, routing, hidden_size, dtype, scale, weighted, index_dtype):
    ids, _, num_local, expert_map = routing
    offsets, _, inv = permute_reference.sort_by_expert(ids, num_local, expert_map)
    y = draw((ids.size, hidden_size), dtype, scale=scale)
    y[offsets[-1] :] = np.nan  # rows that no pair fills are never read
    weights = draw_weights(*ids.shape) if weighted else None
    expected = reference.unpermute(y, weights, inv)
    y, weights, inv = on(xp, y), on(xp, weights), on(xp, inv.astype(index_dtype))
    out = cumoe.moe_unpermute(y, weights, inv)
    assert_within_bound(out, expected, dtype)
    if weighted:
        flat = cumoe.moe_unpermute(y, weights, inv.reshape(-1), on(xp, offsets))
        assert back(flat).tobytes() == back(out).tobytes()


@given(routing=strategies.routings(), hidden_size=SIZES, dtype=DTYPES, scale=SCALES)
@pytest.mark.parametrize("with_ids", [False, True])
def test_sums_equal_reference(xp, routing, hidden_size, dtype, scale, with_ids):
    ids, expert_map = (routing.topk_ids, routing.expert_map) if with_ids else (None, None)
    shape = routing.topk_ids.shape
    used = reference.used_choices(*shape, ids, expert_map)
    untouched = ~used.any(axis=1)
    x = draw((*shape, hidden_size), dtype, scale=scale)
    x[~used] = np.nan  # skipped choices are never read
    weights = draw_weights(*shape)
    arguments = on(xp, ids), on(xp, expert_map)

    out = cumoe.moe_sum(on(xp, x), *arguments)
    assert_within_bound(out, reference.weighted_sum(x, None, used), dtype)
    filled = cumoe.moe_sum(on(xp, x), *arguments, out=xp.full_like(out, 7))
    np.testing.assert_array_equal(back(filled), back(out))
    assert (back(out)[untouched] == 0).all()

    out = cumoe.moe_fused_mul_sum(on(xp, x), on(xp, weights), *arguments)
    assert_within_bound(out, reference.weighted_sum(x, weights, used), dtype)
    filled = cumoe.moe_fused_mul_sum(on(xp, x), on(xp, weights), *arguments, out=xp.full_like(out, 7))
    np.testing.assert_array_equal(back(filled)[~untouched], back(out)[~untouched])
    assert (back(filled)[untouched] == 7).all() and (back(out)[untouched] == 0).all()


def test_which_choices_count(xp):
    """Ids below 0 do not wrap around, ids beyond the map do not read past it."""
    x = np.arange(1, 7, dtype=np.float32).reshape(6, 1, 1)
    ids = np.array([-1, -3, 0, 1, 3, 123_456_789])[:, None]
    expert_map = np.array([-1, 1, 0], np.int32)
    for dtype in (np.int32, np.int64):
        given_ids = xp.asarray(ids.astype(dtype))
        out = cumoe.moe_sum(xp.asarray(x), given_ids, xp.asarray(expert_map))
        assert back(out).ravel().tolist() == [0, 0, 0, 4, 0, 0]
        out = cumoe.moe_sum(xp.asarray(x), given_ids)
        assert back(out).ravel().tolist() == [0, 0, 3, 4, 5, 6]
        out = xp.full((6, 1), 9, np.float32)
        same = cumoe.moe_fused_mul_sum(
            xp.asarray(x), xp.ones((6, 1), np.float32), given_ids, xp.asarray(expert_map), out=out
        )
        assert same is out and back(out).ravel().tolist() == [9, 9, 9, 4, 9, 9]


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 0, 2),
    "last axis first": lambda x: x.transpose(2, 1, 0),
    "sliced": lambda x: x[1::2, :, 1:-2],
    "every third column": lambda x: x[:, :, ::3],
    "backwards": lambda x: x[::-1, :, ::-1],
    "one row for all": lambda x: (np if isinstance(x, np.ndarray) else gpu()).broadcast_to(x[:1, :1], x.shape),
    "one choice": lambda x: x[:, :1],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("read_only", [False, True])
def test_strides_change_no_bit(xp, view, dtype, read_only):
    x = draw((7, 5, 1600), dtype)  # every third column is still more than one tile of columns
    given_x = xp.asarray(x)
    if read_only and xp is np:
        given_x.flags.writeable = False
    strided, plain = VIEWS[view](given_x), VIEWS[view](x).copy(order="C")
    weights = draw_weights(*plain.shape[:2])
    for result, same in (
        (cumoe.moe_sum(strided), cumoe.moe_sum(xp.asarray(plain))),
        (
            cumoe.moe_fused_mul_sum(strided, xp.asarray(weights)),
            cumoe.moe_fused_mul_sum(xp.asarray(plain), xp.asarray(weights)),
        ),
    ):
        assert back(result).tobytes() == back(same).tobytes()
    used = np.ones(plain.shape[:2], bool)
    assert_within_bound(cumoe.moe_sum(strided), reference.weighted_sum(plain, None, used), dtype)


def test_unpermute_takes_strided_and_misaligned_rows():
    """A view with wider rows is read in place; other strides are copied."""
    y = draw((12, 40), "bfloat16")
    y.flags.writeable = False
    inv = np.array([[3, 1], [0, 5]])
    weights = draw_weights(2, 4)[:, ::2]
    for view in (y[::2], y[:, :33], y[:, ::2], y[::-1], y.T):
        plain = view.copy(order="C")
        out = cumoe.moe_unpermute(view, weights, inv)
        assert out.tobytes() == cumoe.moe_unpermute(plain, weights.copy(), inv).tobytes()
    memory = np.zeros(4 * 2 * 3 * 4 + 1, np.uint8)
    off = memory[1:].view(np.float32).reshape(4, 2, 3)
    off[...] = 2
    np.testing.assert_array_equal(cumoe.moe_sum(off), np.full((4, 3), 4, np.float32))
    np.testing.assert_array_equal(cumoe.moe_unpermute(off[0], None, inv[:1] - 1), np.full((1, 3), 2, np.float32))


@given(routing=strategies.routings(maps=False), dtype=DTYPES)
def test_unpermute_after_permute_gives_the_tokens_back(xp, routing, dtype):
    """With weight 1 on the first choice that counts, and 0 on the others: exactly."""
    ids, num_experts, _, _ = routing
    x = draw((len(ids), 19), dtype)
    rows, _, _, inv, _ = cumoe.moe_permute(on(xp, x), None, on(xp, ids), num_experts)
    used = back(inv) >= 0
    first = used & (np.cumsum(used, axis=1) == 1)
    out = cumoe.moe_unpermute(rows, on(xp, first.astype(np.float32)), inv)
    np.testing.assert_array_equal(back(out), np.where(used.any(axis=1)[:, None], x, np.zeros_like(x)))


def test_rows_at_or_after_the_last_offset_are_skipped(xp):
    y = xp.asarray(np.array([[1], [2], [np.nan], [np.nan]], np.float32))
    inv = xp.asarray(np.array([[0, 3], [2, 1], [3, 2], [7, -5]]))
    out = cumoe.moe_unpermute(y, xp.ones((4, 2), np.float32), inv, xp.asarray(np.array([0, 1, 2])))
    assert back(out).ravel().tolist() == [1, 2, 0, 0]


def test_every_size_gives_the_same_bits(xp):
    """Alone, and in a batch that goes to threads, a token has the same bits."""
    rng = np.random.default_rng(0)
    num_tokens, top_k, hidden_size = 300, 4, 700
    for dtype in ("float32", "float16", "bfloat16"):
        y = draw((num_tokens * top_k, hidden_size), dtype)
        inv = rng.permutation(num_tokens * top_k).reshape(num_tokens, top_k).astype(np.int32)
        weights = draw_weights(num_tokens, top_k)
        out = back(cumoe.moe_unpermute(on(xp, y), on(xp, weights), on(xp, inv)))
        assert_within_bound(out, reference.unpermute(y, weights, inv), dtype)
        for t in (0, 1, 57, 299):
            alone = cumoe.moe_unpermute(on(xp, y), on(xp, weights[t : t + 1]), on(xp, inv[t : t + 1]))
            assert back(alone).tobytes() == out[t : t + 1].tobytes()


@pytest.mark.parametrize("top_k", [7, 10, 11, 32, 33, 100])
@pytest.mark.parametrize("hidden_size", [1, 12, 264])
def test_many_choices(xp, top_k, hidden_size):
    """More of them than a kernel loads at once, of which some are skipped; loads of 2, 8 and 16 bytes."""
    rng = np.random.default_rng(top_k)
    inv = rng.integers(-2, 50, (9, top_k))
    weights = draw_weights(9, top_k)
    for dtype in ("float32", "bfloat16"):
        y = draw((40, hidden_size), dtype)
        inv_used = np.where(inv < 40, inv, -1)
        out = cumoe.moe_unpermute(on(xp, y), on(xp, weights), on(xp, inv))
        assert_within_bound(out, reference.unpermute(y, weights, inv_used), dtype)
        x = draw((9, top_k, hidden_size), dtype)
        used = inv >= 0
        out = cumoe.moe_fused_mul_sum(on(xp, x), on(xp, weights), on(xp, inv))
        assert_within_bound(out, reference.weighted_sum(x, weights, used), dtype)


@pytest.mark.parametrize("offset", [1, 2, 4, 6])
def test_rows_that_start_anywhere(xp, offset):
    """Rows whose addresses allow narrow loads only, in the same bits."""
    y, inv = draw((6, 64), "bfloat16"), np.array([[0, 3, 5], [2, -1, 1]])
    memory = xp.zeros(6 * 64 + offset, np.uint16)
    moved = memory[offset:].reshape(6, 64)
    moved[...] = on(xp, y.view(np.uint16))
    moved = moved.view(y.dtype)
    expected = cumoe.moe_unpermute(on(xp, y), None, on(xp, inv))
    assert back(cumoe.moe_unpermute(moved, None, on(xp, inv))).tobytes() == back(expected).tobytes()
    total = cumoe.moe_sum(on(xp, y).reshape(2, 3, 64))
    assert back(cumoe.moe_sum(moved.reshape(2, 3, 64))).tobytes() == back(total).tobytes()
    target = xp.zeros(2 * 64 + offset, np.uint16)[offset:].reshape(2, 64).view(y.dtype)
    assert cumoe.moe_unpermute(on(xp, y), None, on(xp, inv), out=target) is target
    assert back(target).tobytes() == back(expected).tobytes()


def test_choices_are_added_in_order(xp):
    """1 + 2**-24 + 2**-24: ascending order loses both, any other order may keep them."""
    x = np.array([1, 2.0**-24, 2.0**-24], np.float32).reshape(1, 3, 1)
    assert back(cumoe.moe_sum(xp.asarray(x)))[0, 0] == 1
    assert back(cumoe.moe_sum(xp.asarray(x[:, ::-1].copy())))[0, 0] > 1


def test_infinities_and_nans_pass(xp):
    x = np.array([[[np.inf, np.nan, 1, -np.inf]], [[0, 1, 2, 3]]], np.float32)
    for dtype in ("float32", "float16", "bfloat16"):
        out = back(cumoe.moe_sum(xp.asarray(x.astype(dtype)))).astype(np.float32)
        np.testing.assert_array_equal(out, x[:, 0])
    big = xp.full((1, 2, 1), 60_000, np.float16)
    assert np.isposinf(back(cumoe.moe_sum(big)))


@pytest.mark.parametrize("weight_dtype", ["float64", "float16", "bfloat16"])
def test_weights_of_other_types_are_converted(xp, weight_dtype):
    x, weights = draw((3, 2, 5), "float32"), draw_weights(3, 2).astype(weight_dtype)
    out = cumoe.moe_fused_mul_sum(xp.asarray(x), xp.asarray(weights))
    same = cumoe.moe_fused_mul_sum(xp.asarray(x), xp.asarray(weights.astype(np.float32)))
    assert back(out).tobytes() == back(same).tobytes()


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 0, 5), (3, 2, 0)])
def test_nothing_to_add(xp, shape):
    x, weights = xp.zeros(shape, np.float32), xp.zeros(shape[:2], np.float32)
    zeros = np.zeros((shape[0], shape[2]), np.float32)
    np.testing.assert_array_equal(back(cumoe.moe_sum(x)), zeros)
    np.testing.assert_array_equal(back(cumoe.moe_fused_mul_sum(x, weights)), zeros)
    y, inv = xp.zeros((0, shape[2]), np.float32), xp.full(shape[:2], -1)
    np.testing.assert_array_equal(back(cumoe.moe_unpermute(y, weights, inv)), zeros)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x, weights = torch.randn(5, 3, 8, dtype=torch.bfloat16), torch.rand(5, 3)
    out = cumoe.moe_fused_mul_sum(x, weights)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (x.float() * weights[..., None]).sum(1).bfloat16(), atol=1e-2, rtol=1e-2)


X, Y = np.zeros((2, 3, 4), np.float32), np.zeros((6, 4), np.float32)
W, INV, IDS = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32)
WRONG = [
    (
        lambda: cumoe.moe_unpermute(X, W, INV),
        ValueError,
        "permuted_hidden_states must have 2 axes (R, H), got shape (2, 3, 4)",
    ),
    (
        lambda: cumoe.moe_unpermute(Y.astype(np.float64), W, INV),
        TypeError,
        "permuted_hidden_states must be float32, float16 or bfloat16, got float64",
    ),
    (
        lambda: cumoe.moe_unpermute(Y, W, INV.T),
        ValueError,
        "inv_permuted_idx must have shape (T, k) = (2, 3), got (3, 2); the last two axes look swapped",
    ),
    (
        lambda: cumoe.moe_unpermute(Y, W, INV.ravel()[1:]),
        ValueError,
        "inv_permuted_idx must have shape (T*k,) = (6,), got (5,)",
    ),
    (
        lambda: cumoe.moe_unpermute(Y, None, INV.ravel()),
        ValueError,
        "inv_permuted_idx must have 2 axes (T, k), got shape (6,)",
    ),
    (
        lambda: cumoe.moe_unpermute(Y, W.astype(int), INV),
        TypeError,
        "topk_weights must be float32, float64, float16 or bfloat16, got int64",
    ),
    (lambda: cumoe.moe_unpermute(Y, W, W), TypeError, "inv_permuted_idx must be int32 or int64, got float32"),
    (
        lambda: cumoe.moe_unpermute(Y, W, INV, INV),
        ValueError,
        "expert_first_token_offset must have 1 axis (E_l + 1,), got shape (2, 3)",
    ),
    (lambda: cumoe.moe_unpermute(Y, W, INV, INV[0]), TypeError, "expert_first_token_offset must be int64, got int32"),
    (
        lambda: cumoe.moe_unpermute(Y, W, INV, np.zeros(0, np.int64)),
        ValueError,
        "expert_first_token_offset must have shape (E_l + 1,), got (0,)",
    ),
    (lambda: cumoe.moe_unpermute(Y, W, INV, out=Y[:3]), ValueError, "out must have shape (T, H) = (2, 4), got (3, 4)"),
    (
        lambda: cumoe.moe_unpermute(Y, W, INV, out=Y[1:3]),
        ValueError,
        "out must not share memory with permuted_hidden_states; pass a separate array or out=None",
    ),
    (lambda: cumoe.moe_sum(Y), ValueError, "x must have 3 axes (T, k, H), got shape (6, 4)"),
    (lambda: cumoe.moe_sum(X.astype(int)), TypeError, "x must be float32, float16 or bfloat16, got int64"),
    (lambda: cumoe.moe_sum(X, IDS[:, :2]), ValueError, "topk_ids must have shape (T, k) = (2, 3), got (2, 2)"),
    (lambda: cumoe.moe_sum(X, None, IDS[0]), ValueError, "topk_ids must be given with expert_map, got None"),
    (
        lambda: cumoe.moe_fused_mul_sum(X, None),
        TypeError,
        "topk_weights must be a (T, k) array, got None; moe_sum adds without weights",
    ),
    (lambda: cumoe.moe_fused_mul_sum(X, W[:1]), ValueError, "topk_weights must have shape (T, k) = (2, 3), got (1, 3)"),
    (
        lambda: cumoe.moe_sum(X, out=np.zeros((4, 2), np.float32).T),
        ValueError,
        "out must be C-contiguous, got strides (4, 8) for shape (2, 4); pass a separate array or out=None",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_read_only_out_is_refused():
    out = np.zeros((2, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out must be writeable, got a read-only array; pass a copy$"):
        cumoe.moe_sum(X, out=out)
