"""
The unquantised rows of vLLM's public test grids that concern the expert computation.

Every cell is judged twice: at the tolerance that the public test states, against float64, and at the derived
bound of `cumoe.reference.experts`, which is far tighter where outputs are small. Inputs have the public tests'
distributions. To keep drawing cheap, each expert's matrix is a window into one pool of normal numbers, at an
offset of its own: no two experts are equal anywhere, and all memory is real.

Where there are many tokens or experts, all of them are computed and some tokens are judged; the two shapes of
32768 and 40000 tokens compute all tokens in some cells and `COMPUTED` random ones in the others (see there).
"""

import functools

import numpy as np
import pytest
from grids import (
    ComputedOn,
    assert_close,
    assert_stated,
    assert_within,
    draw,
    draw_logits,
    exactly,
    law_of_variants,
)
from sides import back, on

import cumoe
from cumoe import _arrays
from cumoe._modular_experts import StandardExperts
from cumoe.reference import experts
from cumoe.reference.experts import Bounded
from cumoe.reference.rounding import SUM_UNIT, rounded

COMPUTED = 1024


def padded(weights):
    """The same numbers with 128 more in memory after each row, NaN instead of the public test's zeros."""
    wide = np.empty((*weights.shape[:-1], weights.shape[-1] + 128), weights.dtype)
    wide[..., :-128], wide[..., -128:] = weights, np.nan
    view = wide[..., :-128]
    assert not view.flags.c_contiguous
    return view


def some_experts(e, ep_size, seed):
    """The experts of one of `ep_size` ranks in random order, and their map; (all, None) for one rank."""
    if ep_size == 1:
        return slice(None), None
    local = np.random.default_rng(seed).permutation(e)[: e // ep_size]
    expert_map = np.full(e, -1, np.int32)
    expert_map[local] = np.arange(len(local))
    return local, expert_map


# ---- fused_moe in bfloat16: atol 2e-2, rtol 0 ----

SHAPES = [(1, 128, 128), (1, 2048, 128), (33, 2048, 128), (32768, 2048, 511), (40000, 1024, 1024)]


@functools.lru_cache(maxsize=1)
def moe_weights(n, k, e):
    """w1 (e, 2n, k) and w2 (e, k, n), randn / 10."""
    return draw((e, 2 * n, k), 0.1, 1), draw((e, k, n), 0.1, 2)


@pytest.mark.parametrize("topk", [2, 6])
@pytest.mark.parametrize("e", [8, 64, 192])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fused_moe(xp, m, n, k, e, topk):
    """
    Four cells: ep 1 and 4, weights padded or not.

    All tokens are computed if m is small or (e, topk, ep) is (8, 2, 1). Else `COMPUTED` tokens are, the first and
    the last among them: the others keep their rows in every array, but their ids are -1, which makes their rows
    of the output 0. Of the large shapes 3 tokens are judged, and all bits are compared between the layouts.
    """
    side = ComputedOn(xp)
    rng = np.random.default_rng(m + e + topk)
    w1, w2 = moe_weights(n, k, e)
    x, logits = draw((m, k), 0.1, 3), draw_logits((m, e), 4)
    weights, ids = side.fused_topk(logits, topk, renormalize=False)
    judged = np.arange(m) if m < 100 else np.array([0, int(rng.integers(1, m - 1)), m - 1])
    for ep_size in (1, 4):
        local, expert_map = some_experts(e, ep_size, e)
        mine = w1[local], w2[local]
        if whole := m < 100 or (e, topk, ep_size) == (8, 2, 1):
            keywords = {"top_k": topk, "renormalize": False, "expert_map": expert_map, "global_num_experts": e}
            out = side.fused_moe(x, *mine, logits, **keywords)
            other = side.fused_moe(x, *map(padded, mine), logits, **keywords)
        else:
            computed = np.union1d(judged, rng.choice(m, COMPUTED, replace=False))
            chosen = np.full_like(ids, -1)
            chosen[computed] = ids[computed]
            out = side.fused_experts(x, *mine, weights, chosen, expert_map=expert_map)
            other = side.fused_experts(x, *map(padded, mine), weights, chosen, expert_map=expert_map)
        cell = f"ep {ep_size}"
        exact = experts.fused_experts(x[judged], *mine, weights[judged], ids[judged], expert_map=expert_map)
        assert_close(out[judged], exact, 2e-2, cell=cell)
        assert other.tobytes() == out.tobytes(), f"{cell}: padding changes bits"
        if not whole:
            assert not out[chosen[:, 0] < 0].any()
        if ep_size == 1:
            assert out[judged].any(axis=1).all()


@pytest.mark.parametrize("e", [128, 256])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (1, 2048, 128), (2, 2048, 128), (2, 2048, 511)])
def test_naive_assignment(xp, m, n, k, e):
    """Two cells: topk 1 and 2. One block per pair, without sorting; atol 2e-2."""
    side = ComputedOn(xp)
    w1, w2 = moe_weights(n, k, e)
    x, logits = draw((m, k), 0.1, 5), draw_logits((m, e), 6)
    for topk in (1, 2):
        assert cumoe.use_naive_block_assignment(m, topk, e)
        weights, ids = side.fused_topk(logits, topk, renormalize=False)
        _, expert_ids, num_tokens_post_padded = cumoe.naive_block_assignment(ids, 16, e)
        exact = experts.fused_experts(x, w1, w2, weights, ids)
        assert_close(side.fused_experts(x, w1, w2, weights, ids), exact, 2e-2, cell=f"topk {topk}")
        # the blocks say what the layer did: each pair is a token of its own, with one choice
        pairs = np.arange(m * topk) // topk
        rows = side.fused_experts(x[pairs], w1, w2, weights.reshape(-1, 1), expert_ids.reshape(-1, 1))
        assert_close(rows.reshape(m, topk, k).astype(np.float32).sum(axis=1).astype(x.dtype), exact, 2e-2)
        assert num_tokens_post_padded == [m * topk * 16]


@pytest.mark.parametrize("activation", ["silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("n", [128, 256])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_no_act_mul(xp, m, n, k, topk, activation):
    """The public test wants finite and not all zero; the bound says more. Workspaces have the stated shapes."""
    side = ComputedOn(xp)
    e = 8
    x, w1, w2 = draw((m, k), 0.1, 7), draw((e, n, k), 0.1, 8), draw((e, k, n), 0.1, 9)
    weights, ids = side.fused_topk(draw_logits((m, e), 10), topk)
    out = side.fused_experts(x, w1, w2, weights, ids, activation=activation)
    assert np.isfinite(out.astype(np.float32)).all()
    assert out.any()
    assert_close(out, experts.fused_experts(x, w1, w2, weights, ids, activation=activation), 2e-2)
    shapes = StandardExperts(cumoe.FUSED_MOE_UNQUANTIZED_CONFIG).workspace_shapes(m, n, k, topk, e, e, None, activation)
    assert shapes == ((m, topk, max(n, k)), (m, topk, max(n, k)), (m, k))


# ---- the CPU layer: bf16 atol 1e-3 rtol 1.6e-2, fp16 1e-3 / 1e-3, fp32 1e-5 / 1.3e-6 ----

TOLERANCES = {"bfloat16": (1e-3, 1.6e-2), "float16": (1e-3, 1e-3), "float32": (1e-5, 1.3e-6)}
CPU_ACTIVATIONS = ("silu", "swigluoai", "gelu", "gelu_tanh")


def test_the_law_of_variants_is_the_law():
    rng = np.random.default_rng(0)
    x, w1, w2, b1, b2 = (rng.standard_normal(s, np.float32) for s in ((5, 8), (3, 12, 8), (3, 8, 6), (3, 12), (3, 8)))
    weights, ids = cumoe.fused_topk(rng.standard_normal((5, 3), np.float32), 2)
    found = law_of_variants(x, w1, w2, (b1, b2), weights, ids, CPU_ACTIVATIONS)
    assert len(found) == 8
    for (activation, with_bias), (bounded, stepwise) in found.items():
        biases = {"w1_bias": b1, "w2_bias": b2} if with_bias else {}
        law = experts.fused_experts(x, w1, w2, weights, ids, activation=activation, **biases)
        np.testing.assert_allclose(bounded.value, law.value, rtol=1e-12)
        np.testing.assert_allclose(bounded.error, law.error, rtol=1e-12)
        assert 0 < np.abs(stepwise - law.value).max() <= law.error.max()


def tokens_of_few_experts(ids, parts):
    """From each range of tokens the one whose experts are most nearly those of token 0, and token 0."""
    same = np.isin(ids, ids[0]).sum(axis=1)
    return np.array([0, *(first + int(same[first:last].argmax()) for first, last in parts)])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("hidden_size", [128, 2880])
@pytest.mark.parametrize("intermediate_size", [128, 176, 2880])
def test_cpu_fused_moe(xp, intermediate_size, hidden_size, dtype):
    """
    24 cells: batch 1, 64, 256, four activations, without and with biases; E 8, topk 4, prepared weights.

    A batch is the head of the next larger one, and its results must have the same bits; so a token that is judged
    stands for all batches that hold it. Judged are token 0, one of the first 64 and one of the rest.

    The stated tolerance is against float64 that is rounded where the layer says that it rounds, as the public
    test's reference is rounded where its kernel rounds: in bfloat16 even that kernel's one rounding is further
    from float64 than the tolerance at some elements. The bound, and the tolerance of the other two dtypes, are
    against float64 without rounding.
    """
    side = ComputedOn(xp)
    e, topk = 8, 4
    x = draw((256, hidden_size), 2 * hidden_size**-0.5, 11, dtype)
    w1 = draw((e, 2 * intermediate_size, hidden_size), 2 * hidden_size**-0.5, 12, dtype)
    w2 = draw((e, hidden_size, intermediate_size), 2 * intermediate_size**-0.5, 13, dtype)
    w1_bias = draw((e, 2 * intermediate_size), 2 * (2 * intermediate_size) ** -0.5, 14, dtype)
    w2_bias = draw((e, hidden_size), 2 * hidden_size**-0.5, 15, dtype)
    weights, ids = side.fused_topk(draw_logits((256, e), 16), topk, renormalize=False)
    judged = tokens_of_few_experts(ids, [(1, 64), (64, 256)])
    exact = law_of_variants(x[judged], w1, w2, (w1_bias, w2_bias), weights[judged], ids[judged], CPU_ACTIVATIONS)
    for (activation, with_bias), (bounded, stepwise) in exact.items():
        config = side.biased_moe_quant_config(w1_bias, w2_bias) if with_bias else None
        prepared = side.prepare(w1, w2, activation=activation, quant_config=config)
        cell = f"{activation}, {'biases' if with_bias else 'no bias'}"
        outs = [side.fused_experts(x[:b], prepared, None, weights[:b], ids[:b]) for b in (1, 64, 256)]
        assert_stated(outs[2][judged], stepwise, *TOLERANCES[dtype], cell=cell)
        assert_within(outs[2][judged], bounded, cell=cell)
        if dtype != "bfloat16":
            assert_stated(outs[2][judged], bounded.value, *TOLERANCES[dtype], cell=cell)
        for out in outs[:2]:
            assert out.tobytes() == outs[2][: len(out)].tobytes(), f"{cell}: batch {len(out)} has other bits"


# ---- experts that hand their token on: ids exact, atol 4e-3 ----


@pytest.mark.parametrize("num_zero_experts", [1, 4])
@pytest.mark.parametrize("topk", [1, 2, 6])
@pytest.mark.parametrize("m", [1, 33, 256])
def test_zero_expert(xp, m, topk, num_zero_experts):
    """Routing over experts with and without weights, then the layer and the rest of the sum."""
    side = ComputedOn(xp)
    e, n, k = 8, 128, 256
    x, w1, w2 = draw((m, k), 0.1, 17), draw((e, 2 * n, k), 0.1, 18), draw((e, k, n), 0.1, 19)
    logits = draw_logits((m, e + num_zero_experts), 20).astype(np.float32)
    weights, ids, rest = side.select_experts(
        x, logits, topk, zero_expert_type="identity", num_logical_experts=e, renormalize=False
    )
    order = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
    scores = np.exp(logits.astype(np.float64))
    chosen = np.take_along_axis(scores / scores.sum(axis=1, keepdims=True), order, axis=1)
    np.testing.assert_array_equal(ids, np.where(order < e, order, 0))
    np.testing.assert_allclose(weights, np.where(order < e, chosen, 0), rtol=1e-5)
    share = np.where(order >= e, chosen, 0).sum(axis=1, keepdims=True)
    exact = Bounded(share * x, rounded(share * x, 8 * SUM_UNIT * np.abs(share * x), x.dtype))
    assert_close(rest, exact, 4e-3)
    routed = side.fused_experts(x, w1, w2, weights, ids)
    assert_close(routed, experts.fused_experts(x, w1, w2, weights, ids), 4e-3)


# ---- the batched format: atol 3e-2, rtol 2e-2; its product alone 6e-2, in float32 1e-2 ----

BATCHED_SHAPES = [
    (1, 128, 128), (1, 512, 512), (1, 1024, 2048), (32, 128, 128), (32, 512, 512), (32, 1024, 2048),
    (45, 128, 2048), (45, 1024, 128), (64, 512, 512), (64, 1024, 2048), (222, 128, 2048), (222, 1024, 2048),
]  # fmt: skip


@pytest.mark.parametrize("e", [8, 64])
@pytest.mark.parametrize(("m", "n", "k"), BATCHED_SHAPES)
def test_batched_moe(xp, m, n, k, e):
    """Three cells: topk 1, 2, 6. Tokens to their shelves, both products there, and back; 3 tokens are judged."""
    side = ComputedOn(xp)
    x, w1, w2 = draw((m, k), 0.1, 21), draw((e, 2 * n, k), 1 / 15, 22), draw((e, k, n), 1 / 15, 23)
    for topk in (1, 2, 6):
        weights, ids = side.fused_topk(draw_logits((m, e), 24), topk, renormalize=False)
        batched, counts = side.moe_batch(x, ids, e, m, check=True)
        used = np.arange(m) < counts[:, None]
        batched[~used] = np.nan
        shelf = np.where(used, np.arange(e)[:, None], -1).reshape(-1, 1)
        rows = side.fused_experts(batched.reshape(-1, k), w1, w2, np.ones(shelf.shape, np.float32), shelf)
        out = side.moe_unbatch(rows.reshape(e, m, k), weights, ids)
        judged = np.unique([0, m // 2, m - 1])
        exact = experts.fused_experts(x[judged], w1, w2, weights[judged], ids[judged])
        assert_close(out[judged], exact, 3e-2, 2e-2, cell=f"topk {topk}")
        plain = side.fused_experts(x, w1, w2, weights, ids).astype(np.float64)
        np.testing.assert_allclose(out.astype(np.float64), plain, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("max_num_tokens", [32, 224, 512])
@pytest.mark.parametrize("e", [8, 32])
def test_batched_product(xp, e, max_num_tokens, dtype):
    """Four cells: K and N 128, 1024. Shelves as groups; rows beyond an expert's count are NaN and judge nothing."""
    side = ComputedOn(xp)
    tolerance = 1e-2 if dtype == "float32" else 6e-2
    for k, n in ((128, 128), (128, 1024), (1024, 128), (1024, 1024)):
        a, b = draw((e, max_num_tokens, k), 0.1, 25, dtype), draw((e, n, k), 1.0, 26, dtype)
        counts = np.random.default_rng(e + k + n).integers(0, max_num_tokens, e)
        used = np.arange(max_num_tokens) < counts[:, None]
        a[~used] = np.nan
        out = side.grouped_gemm(a.reshape(-1, k), b, np.arange(e + 1) * max_num_tokens)
        out = out.reshape(e, max_num_tokens, n)
        assert np.isfinite(out[used].astype(np.float32)).all()
        for expert in np.unique([0, int(counts.argmax()), e - 1]):
            rows = np.unique([0, counts[expert] // 2, counts[expert] - 1])[: counts[expert]]
            x = a[expert, rows].astype(np.float64)
            y = experts.linear(exactly(x), b[expert])
            exact = Bounded(y.value, rounded(y.value, y.error, a.dtype))
            assert_close(out[expert, rows], exact, tolerance, tolerance, cell=f"K {k}, N {n}, expert {expert}")


# ---- offsets beyond 2**31 elements: on the host, memory that is reserved, but touched only where it matters ----


def untouched(xp, shape, dtype="bfloat16"):
    """Zeros, which the host's system hands out page by page at the first write."""
    if xp is not np and xp.cuda.Device().mem_info[0] < 3 * 2 * np.prod(shape):
        pytest.skip("the device has too little free memory")
    array = xp.zeros(shape, np.dtype(dtype))
    assert array.size > 2**31
    return array


def test_weights_beyond_int32(xp):
    """The matrices of the last expert begin beyond element 2**31 - 2**20 of w1 and of w2 and end beyond 2**31."""
    n, k, e = 1024, 1024, 2049
    x, w1, w2 = draw((2, k), 0.1, 27), untouched(xp, (e, n, k)), untouched(xp, (e, k, n))
    first, last = ((draw((1, n, k), 0.1, seed + 1), draw((1, k, n), 0.1, seed + 2)) for seed in (0, e - 1))
    for expert, (one, two) in ((0, first), (e - 1, last)):
        w1[expert], w2[expert] = on(xp, one)[0], on(xp, two)[0]
    weights, ids = np.array([[0.75, 0.25]] * 2, np.float32), np.array([[0, e - 1], [e - 1, 1]])
    out = cumoe.fused_experts(on(xp, x), w1, w2, on(xp, weights), on(xp, ids), activation="silu_no_mul")
    few = [np.concatenate([one, np.zeros_like(one), two]) for one, two in zip(first, last, strict=True)]
    exact = experts.fused_experts(x, *few, weights, np.array([[0, 2], [2, 1]]), activation="silu_no_mul")
    assert_close(back(out), exact, 2e-2)


def test_rows_beyond_int32(xp):
    """Rows of a product, of its result and of the sum that lie beyond element 2**31."""
    m, k, n = (1 << 21) + 5, 1024, 1024
    a, out, b, rows = untouched(xp, (m, k)), untouched(xp, (m, n)), draw((3, n, k), 0.1, 28), draw((4, k), 0.1, 29)
    a[-4:] = on(xp, rows)
    assert cumoe.grouped_gemm(a, on(xp, b), on(xp, np.array([m - 4, m - 4, m - 1, m])), out=out) is out
    x, found = rows.astype(np.float64), back(out[-4:])
    for part, matrix in ((slice(0, 3), b[1]), (slice(3, 4), b[2])):
        y = experts.linear(exactly(x[part]), matrix)
        assert_close(found[part], Bounded(y.value, rounded(y.value, y.error, a.dtype)), 2e-2)
    assert not back(out[: 1 << 10]).any()
    assert not back(out[-8:-4]).any()
    total = back(cumoe.moe_unpermute(out, None, on(xp, np.array([[m - 1, -1], [m - 2, m - 3]]))))
    assert total[0].tobytes() == found[-1].tobytes()
    expected = found[-2].astype(np.float32) + found[-3].astype(np.float32)
    assert total[1].tobytes() == expected.astype(out.dtype).tobytes()


def test_tokens_beyond_int32(xp):
    """The first product gathers tokens that lie beyond element 2**31; the layer would have to write them all."""
    num_tokens, topk, k, n = (1 << 21) + 5, 2, 1024, 128
    x, w, rows = untouched(xp, (num_tokens, k)), on(xp, draw((1, n, k), 0.1, 30)), draw((2, k), 0.1, 31)
    x[-2:] = on(xp, rows)
    pairs = on(xp, np.array([num_tokens * topk - 1, num_tokens * topk - 3, 0], np.int32))
    out, offsets = xp.empty((3, n), np.uint16), on(xp, np.array([0, 3]))
    nothing, no_matrix = xp.empty(0, np.float32), xp.empty((0, 0), np.float32)
    room, permute = _arrays.room(xp, "grouped_gemm"), _arrays.room(xp, "permute")
    kernel = _arrays.room(xp, "pack").best_kernel("bfloat16", k, n, True, False)
    block_rows = room.block_rows(3, 1, k, n, "bfloat16", 0, False, kernel)
    schedule = xp.empty(permute.schedule_size(3, 1, block_rows), np.int32)
    permute.list_tiles(offsets, schedule, block_rows)
    room.grouped_gemm(
        x.view(np.uint16), pairs, topk, nothing, w.view(np.uint16), None, offsets, no_matrix, nothing, nothing,
        no_matrix, "", False, 0.0, 0.0, 0.0, "bfloat16", kernel, schedule, block_rows, False, no_matrix, out,
    )  # fmt: skip
    same = on(xp, np.stack([rows[1], rows[0], np.zeros_like(rows[0])]))
    assert out.tobytes() == cumoe.grouped_gemm(same, w, offsets).tobytes()
