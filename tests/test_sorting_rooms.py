"""
The launchers of sorting, aligning and copying, room by room: on a GPU, and everywhere on the simulated one.

Both run a GPU of a few warps too, so that few pairs take every path: one block, several, digit by digit.
"""

import numpy as np
import pytest
import simulated_gpu
import strategies
from conftest import _cupy
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import assert_equal, back

from cumoe.rawkernels import _copy, align, batched, permute
from cumoe.reference import align as align_reference
from cumoe.reference import batched as batched_reference
from cumoe.reference import permute as reference

NOTHING = np.empty(0, np.int32)
FEW_EXAMPLES = settings(max_examples=15)


@pytest.fixture(params=["simulated", "cupy"])
def gpu(request, monkeypatch):
    """Arrays of the device."""
    return simulated_gpu.install(monkeypatch) if request.param == "simulated" else _cupy()


@pytest.fixture
def shrink(monkeypatch):
    """A function that makes blocks of two warps, few of them, with little shared memory."""

    def shrink(shared_words=permute._SHARED_WORDS, **more):
        small = {
            "_MOST_THREADS": 64,
            "_ROUNDS": 1,
            "_MOST_BLOCKS": 3,
            "_THREADS": 32,
            "_LISTING_BLOCKS": 2,
            "_DIGIT_BITS": 2,
        }
        for name, value in {**small, "_SHARED_WORDS": shared_words, **more}.items():
            monkeypatch.setattr(permute, name, value)
        monkeypatch.setattr(_copy, "_THREADS", 32)
        permute.plan_sort.cache_clear()

    yield shrink
    permute.plan_sort.cache_clear()


def full(gpu, shape, dtype=np.int32):
    """An output with something in it."""
    array = gpu.empty(shape, dtype)
    array[...] = 99
    return array


def cdiv(a, b):
    return -(-a // b)


def tiles(offsets, block_rows):
    """The list as `sort_by_expert` describes it."""
    found = []
    for e, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        height, parts = block_rows, cdiv(end - first, block_rows)
        if parts > 1 and block_rows > 32:  # even parts, in steps of 16
            height = min(height, 16 * cdiv(cdiv(end - first, parts), 16))
        found += [[e, row, min(height, end - row), 0] for row in range(first, end, height)]
    return np.array([[len(found), 0, 0, 0], *found], np.int32).reshape(-1)


def assert_sorted(gpu, ids, num_local, expert_map=None, block_rows=0, own_schedule=True):
    expected = reference.sort_by_expert(ids, num_local, expert_map)
    outputs = full(gpu, num_local + 1, np.int64), full(gpu, ids.size), full(gpu, ids.shape)
    schedule = full(gpu, permute.schedule_size(ids.size, num_local, block_rows)) if own_schedule else None
    given_map = gpu.asarray(NOTHING if expert_map is None else expert_map)
    permute.sort_by_expert(gpu.asarray(ids), given_map, *outputs, schedule, block_rows)
    assert_equal([back(outputs[0]), back(outputs[1]), back(outputs[2])], expected)
    if block_rows:
        listed = tiles(expected[0], block_rows)
        assert len(listed) <= permute._list_words(ids.size, num_local, block_rows)
        np.testing.assert_array_equal(back(schedule)[: len(listed)], listed)
        schedule[...] = 99
        permute.list_tiles(outputs[0], schedule, block_rows)
        np.testing.assert_array_equal(back(schedule)[: len(listed)], listed)


def draw_ids(shape, num_experts, dtype="int32", seed=0):
    """Some ids are outside 0..E-1."""
    ids = np.random.default_rng(seed).integers(0, num_experts + 1 + num_experts // 4, shape)
    return (ids if dtype == "uint32" else ids - 1).astype(dtype)


# -- sorting ----------------------------------------------------------------------------------------

# (kind of plan, T, k, E, words of shared memory)
PATHS = [
    ("few", 1, 8, 20, 24 << 10),
    ("few", 0, 2, 3, 24 << 10),
    ("few", 8, 4, 31, 24 << 10),
    ("one", 11, 3, 5, 24 << 10),
    ("one", 4, 4, 70, 24 << 10),  # more experts than threads
    ("one", 0, 4, 70, 24 << 10),
    ("several", 60, 3, 5, 24 << 10),
    ("several", 33, 2, 150, 24 << 10),
    ("several", 100, 4, 20, 64 + 22 * 3),  # one warp has room for its counts
    ("wide", 20, 4, 50, 100),
    ("wide", 7, 3, 300, 100),
    ("wide", 0, 3, 300, 100),
]


def kind_of(num_pairs, num_local):
    plan = permute.plan_sort(num_pairs, num_local)
    return "few" if plan.few else "wide" if plan.wide else "one" if plan.blocks == 1 else "several"


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
@pytest.mark.parametrize(("kind", "num_tokens", "top_k", "num_experts", "words"), PATHS)
def test_sort_on_every_path(gpu, shrink, kind, num_tokens, top_k, num_experts, words, dtype):
    shrink(words)
    assert kind_of(num_tokens * top_k, num_experts) == kind
    ids = draw_ids((num_tokens, top_k), num_experts, dtype)
    assert_sorted(gpu, ids, num_experts)
    assert_sorted(gpu, ids, num_experts, block_rows=3)
    assert_sorted(gpu, ids, num_experts, own_schedule=False)


@pytest.mark.parametrize("words", [24 << 10, 150])
@FEW_EXAMPLES
@given(routing=strategies.routings(), block_rows=st.sampled_from((0, 1, 2, 8, 64)))
def test_sort_equals_reference(gpu, shrink, words, routing, block_rows):
    shrink(words)
    ids, _, num_local, expert_map = routing
    assert_sorted(gpu, ids, num_local, expert_map, block_rows)


@pytest.mark.parametrize("num_pairs", [31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_edges_of_warps_and_blocks(gpu, shrink, num_pairs):
    shrink()
    assert_sorted(gpu, draw_ids((num_pairs, 1), 7), 7, block_rows=4)
    assert_sorted(gpu, np.full((num_pairs, 1), 6), 7, block_rows=32)  # one expert has all
    assert_sorted(gpu, np.full((num_pairs, 1), -1), 7, block_rows=32)  # none has any
    assert_sorted(gpu, np.full((num_pairs, 1), 6), 7, block_rows=48)  # in even parts


def test_ids_from_another_first_expert(gpu, shrink):
    shrink()
    for dtype in ("int32", "uint32", "int64"):
        for num_tokens in (10, 30, 90):
            ids = np.random.default_rng(0).integers(2**31 - 9, 2**31 - 1, (num_tokens, 2)).astype(dtype)
            if dtype != "int32":
                ids += 3
            expected = reference.sort_by_expert(ids.astype(np.int64) - (2**31 - 5), 6, None)
            outputs = full(gpu, 7, np.int64), full(gpu, ids.size), full(gpu, ids.shape)
            permute.sort_shifted(gpu.asarray(ids), 2**31 - 5, gpu.asarray(NOTHING), *outputs)
            assert_equal(list(map(back, outputs)), expected)


# T, k, E of the real GPU: latency, one block, several blocks, rounds of a warp, wide
REAL = [(1, 8, 128), (4, 8, 991), (64, 8, 128), (512, 8, 256), (16384, 8, 128), (16384, 10, 512), (40000, 8, 128)]
REAL += [(700, 6, 1024), (50_000, 32, 64), (3000, 4, 6000), (3000, 2, 8169), (3000, 2, 8170), (300, 4, 2_000_000)]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), REAL)
def test_sort_at_real_sizes(num_tokens, top_k, num_experts, dtype):
    cupy = _cupy()
    ids = draw_ids((num_tokens, top_k), num_experts, dtype)
    flat = ids.reshape(-1).astype(np.int64)
    flat = np.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=num_experts + 1)
    offsets = np.concatenate([[0], np.cumsum(counts[:-1])])
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    outputs = full(cupy, num_experts + 1, np.int64), full(cupy, ids.size), full(cupy, ids.shape)
    schedule = full(cupy, permute.schedule_size(ids.size, num_experts, 64))
    permute.sort_by_expert(cupy.asarray(ids), cupy.asarray(NOTHING), *outputs, schedule, 64)
    np.testing.assert_array_equal(back(outputs[0]), offsets)
    np.testing.assert_array_equal(back(outputs[1]), np.where(flat[order] < num_experts, order, ids.size))
    np.testing.assert_array_equal(back(outputs[2]).reshape(-1), np.where(flat < num_experts, rows, -1))
    listed = tiles(offsets, 64)
    np.testing.assert_array_equal(back(schedule)[: len(listed)], listed)


def test_seventy_million_pairs_of_one_expert():
    cupy = _cupy()
    num_pairs = 70_000_001
    outputs = full(cupy, 3, np.int64), full(cupy, num_pairs), full(cupy, (num_pairs, 1))
    permute.sort_by_expert(cupy.ones((num_pairs, 1), np.int32), cupy.asarray(NOTHING), *outputs)
    assert outputs[0].tolist() == [0, 0, num_pairs]
    for rows in outputs[1:]:
        assert bool((rows.reshape(-1) == cupy.arange(num_pairs, dtype=np.int32)).all())


def test_what_a_schedule_holds_is_enough_for_fewer_pairs():
    """The last piece of the tokens uses the memory of the others."""
    for num_experts in (8, 128, 512, 5000, 9000):
        for block_rows in (0, 8, 128):
            sizes = [permute.schedule_size(n, num_experts, block_rows) for n in (*range(0, 5000, 7), 131_072, 131_100)]
            assert sizes == sorted(sizes)
    for num_pairs in (1, 32, 33, 1024, 4097, 131_072, 131_100, 2**31 - 1):
        for num_experts in (1, 127, 128, 359, 512, 1024, 8169):
            plan = permute.plan_sort(num_pairs, num_experts)
            if plan.few or plan.wide:
                continue
            assert plan.blocks * plan.sorters * plan.per_warp >= num_pairs
            assert (plan.blocks - 1) * plan.sorters * plan.per_warp < num_pairs
            assert 32 * plan.sorters <= plan.threads <= 1024 and plan.per_warp % 32 == 0
            assert plan.shared <= 96 << 10
            if plan.blocks > 1:
                assert plan.blocks * (num_experts + 1) <= permute._scratch_words(num_pairs, num_experts)


# -- the other layouts ------------------------------------------------------------------------------


@FEW_EXAMPLES
@given(routing=strategies.routings(), alignment=st.sampled_from((1, 2, 16, 128)))
def test_aligned_equals_reference(gpu, shrink, routing, alignment):
    shrink(500)
    ids, _, num_local, expert_map = routing
    m_indices, idx, inv, counts = reference.sort_by_expert_aligned(ids, num_local, alignment, expert_map)
    outputs = full(gpu, num_local), full(gpu, len(m_indices)), full(gpu, len(m_indices)), full(gpu, ids.shape)
    given_map = gpu.asarray(NOTHING if expert_map is None else expert_map)
    permute.sort_by_expert_aligned(gpu.asarray(ids), given_map, *outputs, alignment)
    assert_equal(list(map(back, outputs)), [counts, m_indices, idx, inv])


@FEW_EXAMPLES
@given(
    routing=strategies.routings(),
    block_size=st.sampled_from((1, 3, 16, 64)),
    pad=st.booleans(),
    ignore=st.booleans(),
    scatter=st.booleans(),
)
def test_align_equals_reference(gpu, shrink, routing, block_size, pad, ignore, scatter):
    shrink(500)
    ids, num_experts, _, expert_map = routing
    options = {"pad_sorted_ids": pad, "ignore_invalid_experts": ignore}
    expected = list(align_reference.align_block_size(ids, block_size, num_experts, expert_map=expert_map, **options))
    if not scatter:
        expected[3] = np.empty((0, 1), np.int32)
    outputs = [full(gpu, array.shape) for array in expected]
    given_map = gpu.asarray(NOTHING if expert_map is None else expert_map)
    align.align_block_size(gpu.asarray(ids), given_map, *outputs, num_experts, block_size, ignore)
    assert_equal(list(map(back, outputs)), expected)


@FEW_EXAMPLES
@given(
    counts=st.lists(st.integers(-2, 20), max_size=70),
    capacity=st.integers(0, 17),
    block_size=st.sampled_from((1, 4, 7, 64)),
    dtype=st.sampled_from(("int32", "int64")),
)
def test_batched_align_equals_reference(gpu, shrink, counts, capacity, block_size, dtype):
    shrink()
    counts = np.array(counts, dtype)
    expected = align_reference.batched_align_block_size(capacity, block_size, counts)
    outputs = [full(gpu, array.shape) for array in expected]
    align.batched_align_block_size(gpu.asarray(counts), *outputs, capacity, block_size)
    assert_equal(list(map(back, outputs)), expected)


@FEW_EXAMPLES
@given(routing=strategies.routings())
def test_counts_and_names_equal_reference(gpu, shrink, routing):
    shrink()
    ids, num_experts, num_local, expert_map = routing
    given_ids, counts, names = gpu.asarray(ids), full(gpu, num_local), full(gpu, ids.size)
    align.count_expert_num_tokens(given_ids, gpu.asarray(NOTHING if expert_map is None else expert_map), counts)
    align.naive_block_assignment(given_ids, names, num_experts)
    expected = align_reference.count_expert_num_tokens(ids, num_local, expert_map)
    assert_equal([back(counts), back(names)], [expected, align_reference.naive_block_assignment(ids, num_experts)])


@FEW_EXAMPLES
@given(routing=strategies.routings(), capacity=st.sampled_from((0, 1, 7, 240)), first=st.integers(0, 3))
def test_slots_equal_reference(gpu, shrink, routing, capacity, first):
    shrink()
    ids, _, num_local, expert_map = routing
    first = 0 if expert_map is not None else first
    slots, counts = batched_reference.assign_slots(ids, num_local, capacity, first, expert_map)
    outputs = full(gpu, num_local), full(gpu, ids.shape)
    given_map = gpu.asarray(NOTHING if expert_map is None else expert_map)
    batched.assign_slots(gpu.asarray(ids), given_map, *outputs, first, capacity)
    assert_equal(list(map(back, outputs)), [counts, slots])


# -- rows of bytes ----------------------------------------------------------------------------------


def placed(gpu, rows, offset):
    """The rows at an address that is `offset` bytes off."""
    memory = gpu.empty(rows.size + 64, np.uint8)
    start = -memory.data.ptr % 16 + offset
    array = memory[start : start + rows.size].reshape(rows.shape)
    array[...] = gpu.asarray(rows)
    return array


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 2, 6, 12, 40, 16, 64, 1104, 4096])
def test_rows_of_every_width(gpu, shrink, width, offset):
    shrink()
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, width), dtype=np.uint8)
    idx = np.array([5, 0, 2, 3, 6, 1, 6], np.int32)  # 6: no pair
    out = rng.integers(0, 256, (7, width), dtype=np.uint8)
    given_out = placed(gpu, out, offset)
    permute.gather_rows(placed(gpu, x, 0), gpu.asarray(idx), given_out, 2)
    filled = idx < 6
    expected = out.copy()
    expected[filled] = x[idx[filled] // 2]
    np.testing.assert_array_equal(back(given_out), expected)

    slots = np.array([[4, -1], [0, 6], [-1, 2]], np.int32)
    given_out = placed(gpu, out, 0)
    batched.scatter_rows(placed(gpu, x, offset), gpu.asarray(slots), given_out)
    expected = out.copy()
    expected[[4, 0, 6, 2]] = x[[0, 1, 1, 2]]
    np.testing.assert_array_equal(back(given_out), expected)


def test_no_rows_and_rows_of_no_bytes(gpu, shrink):
    shrink()
    for num_tokens, top_k, width in ((0, 2, 4), (3, 2, 0)):
        x, out = gpu.empty((num_tokens, width), np.uint8), gpu.empty((num_tokens * top_k, width), np.uint8)
        index = gpu.asarray(np.zeros((num_tokens, top_k), np.int32))
        permute.gather_rows(x, index.reshape(-1), out, top_k)
        batched.scatter_rows(x, index, out)
