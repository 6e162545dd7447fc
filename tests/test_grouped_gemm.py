"""Grouped products: every kernel of every side against the float64 law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from products import (
    CPU_KERNELS,
    EVERY_KERNEL,
    FASTEST,
    ON_GPU,
    ON_GPU_ANY_SIZE,
    assert_within,
    bits,
    law,
    make_product,
    on_kernels,
    on_side,
)
from sides import back
from strategies import DTYPES

import cumoe
from cumoe import _arrays
from cumoe.cpu import microkernel, pack
from cumoe.rawkernels import _grouped_gemm_wgmma, _load
from cumoe.reference import experts
from cumoe.reference.rounding import TF32_UNIT, rounded


def groups(seed, num_groups, n, k, dtype, most=40):
    """Rows, matrices and ragged offsets, some groups empty."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most, num_groups) * (rng.random(num_groups) < 0.8)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    a = rng.standard_normal((int(offsets[-1]), k)).astype(dtype)
    b = rng.standard_normal((num_groups, n, k)).astype(dtype)
    return a, b, offsets


def expected(a, b, offsets, bias=None, unit=0.0):
    """The law for `cumoe.grouped_gemm`."""
    value, error = np.zeros((len(a), b.shape[1])), np.zeros((len(a), b.shape[1]))
    for g in range(len(b)):
        rows = slice(offsets[g], offsets[g + 1])
        x = a[rows].astype(np.float64)
        y = experts.linear(experts.Bounded(x, np.zeros_like(x)), b[g], None if bias is None else bias[g], unit)
        value[rows], error[rows] = y.value, rounded(y.value, y.error, a.dtype)
    return experts.Bounded(value, error)


# -- the public function ----------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 80), st.sampled_from((16, 31, 32, 33, 64, 65, 128, 200)))


@given(st.integers(0, 2**32), st.integers(1, 5), sizes, sizes, st.sampled_from(DTYPES), st.booleans())
def test_equals_reference(xp, seed, num_groups, n, k, dtype, with_bias):
    a, b, offsets = groups(seed, num_groups, n, k, dtype)
    bias = np.random.default_rng(seed).standard_normal((num_groups, n)).astype(dtype) if with_bias else None
    arguments = [xp.asarray(array) for array in (a, b, offsets)]
    out = cumoe.grouped_gemm(*arguments, bias=None if bias is None else xp.asarray(bias))
    assert isinstance(out, xp.ndarray)
    assert out.dtype == dtype
    assert_within(back(out), expected(a, b, offsets, bias))


@on_kernels(EVERY_KERNEL)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (72, 200), (264, 136), (1, 1), (65, 33), (130, 257)])
def test_every_backend_equals_reference(xp, dtype, kernel, n, k):
    a, b, offsets = groups(n * k, 3, n, k, dtype, most=300 if n == 72 else 50)
    reason = _arrays.room(xp, "pack").refusal(kernel, dtype, k, n, True, False)
    arguments = [xp.asarray(array) for array in (a, b, offsets)]
    if reason:
        with pytest.raises(NotImplementedError, match=f"no kernel for backend='{kernel}' "):
            cumoe.grouped_gemm(*arguments, backend=kernel)
        return
    out = cumoe.grouped_gemm(*arguments, backend=kernel)
    assert_within(back(out), expected(a, b, offsets, unit=TF32_UNIT if kernel == "tf32" else 0.0))


def test_rows_outside_every_group_are_not_touched(xp):
    a, b = np.full((6, 8), np.nan, np.float32), np.ones((2, 5, 8), np.float32)
    a[1:4] = 1
    out = xp.full((6, 5), 7, "float32")
    cumoe.grouped_gemm(xp.asarray(a), xp.asarray(b), xp.asarray([1, 2, 4]), out=out)
    out = back(out)
    assert (out[1:4] == 8).all()
    assert (out[[0, 4, 5]] == 7).all()


def test_no_rows(xp):
    b = xp.ones((2, 5, 8), np.float32)
    assert cumoe.grouped_gemm(xp.ones((0, 8), np.float32), b, xp.asarray([0, 0, 0])).shape == (0, 5)
    out = cumoe.grouped_gemm(xp.ones((3, 8), np.float32), b, xp.asarray([0, 0, 0]))
    assert not back(out).any()


# -- the room: all that the layer asks of it --------------------------------------------------------

STEPS = [
    ({"activation": "silu"}, (40, 72)),
    ({"activation": "silu", "input_scale": True, "bias": True}, (24, 136)),
    ({"activation": "swigluoai", "bias": True}, (136, 64)),
    ({"activation": "gelu", "output_scale": True}, (65, 33)),
    ({"activation": "swigluoai", "input_scale": True, "bias": True, "output_scale": True}, (37, 51)),
    ({"activation": "relu2_no_mul", "bias": True}, (129, 130)),
    ({"activation": "situ"}, (8, 8)),
    ({"in_place": True, "output_scale": True, "bias": True}, (200, 64)),
    ({"in_place": True}, (31, 17)),
]


@on_kernels([*FASTEST, *ON_GPU])
@pytest.mark.parametrize(("parts", "shape"), STEPS)
def test_the_steps_of_a_layer(xp, dtype, kernel, parts, shape):
    for num_tokens, top_k, num_experts in ((1, 1, 1), (3, 2, 5), (70, 2, 3), (300, 1, 2)):
        p = make_product(num_tokens, num_tokens, top_k, num_experts, *shape, dtype, **parts)
        side = on_side(xp, p, dtype, kernel)
        out = side()
        assert_within(out, law(p, kernel))
        assert side().tobytes() == out.tobytes()
        for array, given_array in ((side.x, p.x), (side.weights, p.weights)):
            assert back(array).tobytes() == given_array.tobytes()


@on_kernels([("numpy", *one) for one in CPU_KERNELS])
def test_packed_weights_give_the_bits_of_plain_ones(xp, dtype, kernel):
    for n, k, most in ((1, 1, 50), (64, 64, 50), (65, 33, 50), (130, 257, 50), (37, 96, 300)):
        p = make_product(n, most, 2, 3, n, k, dtype)
        plain = on_side(xp, p, dtype, kernel)
        packed = np.empty(pack.panel_shape(p.weights.shape, dtype, kernel, False), plain.weights.dtype)
        pack.pack_weights(plain.weights, dtype, kernel, False, False, packed)
        out = plain()
        assert_within(out, law(p, kernel))
        assert on_side(xp, p, dtype, kernel, weights=packed)().tobytes() == out.tobytes()


@on_kernels(EVERY_KERNEL)
def test_a_row_does_not_depend_on_its_neighbours(xp, dtype, kernel):
    whole = make_product(1, 300, 1, 1, 72, 136, dtype, skipped=0.0, in_place=True)
    together = on_side(xp, whole, dtype, kernel)()
    for first, last in ((0, 1), (1, 3), (3, 20), (20, 67), (67, 150), (100, 300)):
        rows = last - first
        part = whole._replace(
            x=whole.x[first:last],
            permuted_idx=whole.permuted_idx[:rows],
            offsets=np.array([0, rows]),
            num_rows=rows,
        )
        assert on_side(xp, part, dtype, kernel)().tobytes() == together[first:last].tobytes()


@on_kernels(ON_GPU_ANY_SIZE)
def test_tiles_of_any_height_give_the_same_bits(xp, dtype, kernel):
    """From one row to more than a tile of the kernel, and few or many tiles beside each other."""
    for outputs in (40, 1000):
        p = make_product(2, 180, 2, 3, outputs, 96, dtype, "silu", bias=True)
        out = on_side(xp, p, dtype, kernel, block_rows=16)()
        assert_within(out, law(p, kernel))
        for block_rows in (1, 7, 32, 33, 64, 96, 128, 160, 300):
            assert on_side(xp, p, dtype, kernel, block_rows=block_rows)().tobytes() == out.tobytes()


@on_kernels([*FASTEST, *ON_GPU_ANY_SIZE])
@pytest.mark.parametrize("start", [1, 2, 4])
def test_addresses_that_fit_nothing(xp, dtype, kernel, start):
    p = make_product(start, 50, 2, 3, 40, 64, dtype, "silu")
    side = on_side(xp, p, dtype, kernel)

    def moved(array):
        memory = xp.zeros(array.size + start, array.dtype)
        memory[start:] = array.ravel()
        return memory[start:].reshape(array.shape)

    other = {name: moved(getattr(side, name)) for name in ("x", "weights", "out")}
    assert on_side(xp, p, dtype, kernel, **other)().tobytes() == side().tobytes()


@on_kernels([*FASTEST, *ON_GPU])
def test_weights_lie_anywhere(xp, dtype, kernel):
    p = make_product(5, 40, 2, 4, 40, 72, dtype, "swigluoai")
    out = on_side(xp, p, dtype, kernel)()
    e, n, k = p.weights.shape
    wide = bits(xp, np.full((2 * e, n + 3, k + 8), np.nan, dtype))
    by_row = bits(xp, np.full((n, e, k), np.nan, dtype))
    views = [wide[::2, 1 : n + 1, :k], wide[::-2, n - 1 :: -1, 8:], by_row.transpose(1, 0, 2)]
    for view in views if xp is np or kernel != "wgmma" else [views[0], views[2]]:
        view[...] = bits(xp, p.weights)
        assert on_side(xp, p, dtype, kernel, weights=view)().tobytes() == out.tobytes()


def test_one_misplaced_product_is_noticed(xp):
    """The bound is tight enough to see one product of 512 left out."""
    a, b, offsets = groups(3, 1, 8, 512, "float32")
    shorter = a.copy()
    shorter[:, 100] = 0
    out = cumoe.grouped_gemm(*(xp.asarray(array) for array in (shorter, b, offsets)))
    ratio = experts.ratio(back(out), expected(a, b, offsets))
    assert (ratio > 1).mean() > 0.8


@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_the_bound_of_tf32_holds_and_is_not_far(spread):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((64, 96)) * np.exp(spread * rng.standard_normal((64, 96))) for _ in range(2))
    x, w = x.astype(np.float32), w.astype(np.float32)
    bounded = experts.linear(experts.Bounded(x.astype(np.float64), np.zeros(x.shape)), w, None, TF32_UNIT)
    # to nearest, ties away from zero: 13 bits of the mantissa go
    shorter = [((one.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64) for one in (x, w)]
    ratio = experts.ratio(shorter[0] @ shorter[1].T, bounded)
    assert 0.05 < ratio.max() <= 1
    exact = experts.linear(experts.Bounded(x.astype(np.float64), np.zeros(x.shape)), w)
    assert (experts.ratio(shorter[0] @ shorter[1].T, exact) > 1).mean() > 0.5
    # the largest numbers become infinite
    most = np.full((1, 1), np.finfo(np.float32).max)
    huge = experts.linear(experts.Bounded(most, np.zeros((1, 1))), most.astype(np.float32) * 1e-30, None, TF32_UNIT)
    assert huge.error[0, 0] == np.inf


# -- the GPU ----------------------------------------------------------------------------------------


@on_kernels(ON_GPU)
def test_more_than_2_to_the_31_elements(xp, dtype, kernel):
    """First of the output, then of the rows; what lies around the border is looked at."""
    if xp.cuda.Device().mem_info[0] < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    width, last = 4096, 300
    rows = 2**31 // width + 1000
    # 997 tokens, each chosen again and again by one choice
    p = make_product(0, 997, 1, 2, width, 16, dtype, skipped=0.0)
    order = np.arange(rows, dtype=np.int32) % 997
    p = p._replace(permuted_idx=order, offsets=np.array([0, 5, rows]), num_rows=rows)
    side = on_side(xp, p._replace(num_rows=1), dtype, kernel)
    side = sized(xp, side, p, xp.empty((rows, width), side.out.dtype))
    side.run()
    for picked in (slice(0, last), slice(2**31 // width - last, 2**31 // width + last), slice(rows - last, rows)):
        count, of_first = picked.stop - picked.start, max(0, 5 - picked.start)
        part = p._replace(permuted_idx=order[picked], offsets=np.array([0, of_first, count]), num_rows=count)
        assert_within(back(side.out[picked]).view(dtype), law(part, kernel))
    # rows in place: the input is as large
    p = make_product(1, last, 1, 1, 16, width, dtype, skipped=0.0, in_place=True)
    x = xp.zeros((rows, width), side.out.dtype)
    x[-last:] = bits(xp, p.x)
    big = p._replace(permuted_idx=np.arange(rows, dtype=np.int32), offsets=np.array([0, rows]), num_rows=rows)
    side = on_side(xp, p, dtype, kernel)._replace(x=x)
    side = sized(xp, side, big, xp.empty((rows, 16), side.out.dtype))
    side.run()
    assert_within(back(side.out[-last:]).view(dtype), law(p, kernel))
    assert not back(side.out[:-last]).any()


def sized(xp, side, p, out):
    """`side` with the rows of `p` and an output of its own."""
    sizes = p.num_rows, len(p.weights)
    block_rows = side.room.block_rows(*sizes, p.x.shape[1], p.outputs, side.dtype, 0, False, side.kernel)
    schedule = xp.empty(side.permute.schedule_size(*sizes, block_rows), np.int32)
    lists = {"permuted_idx": xp.asarray(p.permuted_idx), "offsets": xp.asarray(p.offsets)}
    return side._replace(block_rows=block_rows, schedule=schedule, out=out, **lists)


@on_kernels(ON_GPU)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("processors", [1, 3])
def test_few_blocks_share_many_units_again_and_again(xp, dtype, kernel, processors, in_place, monkeypatch):
    """The blocks draw their units; what they leave in the list of tiles serves the next product."""
    monkeypatch.setattr(_load, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(_grouped_gemm_wgmma, "_MANY_UNITS", 0)
    p = make_product(5, 300, 2, 4, 264, 72, dtype, "" if in_place else "silu", in_place=in_place, output_scale=True)
    for height in _grouped_gemm_wgmma._TILES if kernel == "wgmma" else (None,):
        side = on_side(xp, p, dtype, kernel, block_rows=height) if height else on_side(xp, p, dtype, kernel)
        expected = side()
        assert_within(expected, law(p, kernel))
        for _ in range(3):
            side.out[...] = 0
            side.multiply()
            rows = slice(p.offsets[-1])
            assert back(side.out).view(dtype)[rows].tobytes() == expected[rows].tobytes()


@on_kernels(ON_GPU)
def test_a_captured_product_runs_again_on_new_numbers(xp, dtype, kernel):
    first, second = (make_product(seed, 60, 2, 4, 40, 72, dtype, "silu", bias=True) for seed in (1, 2))
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        side, other = (on_side(xp, p, dtype, kernel) for p in (first, second))
        assert_within(side(), law(first, kernel))
        stream.begin_capture()
        side.run()
        graph = stream.end_capture()
        for name in ("x", "permuted_idx", "weights", "offsets", "bias"):
            getattr(side, name)[...] = getattr(other, name)
        side.out[...] = other.out
        graph.launch()
        stream.synchronize()
        assert_within(back(side.out).view(dtype), law(second, kernel))


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": np.ones((4, 3), "float32")}, ValueError, "a must have shape (M, K) = (4, 5), got (4, 3)"),
        ({"a": np.ones((4, 5), "float64")}, TypeError, "a must be float32, float16 or bfloat16, got float64"),
        (
            {"b": np.ones((2, 3, 5), "float16")},
            TypeError,
            "b must have the dtype of a = float32, got float16; convert one of them",
        ),
        ({"b": np.ones((2, 0, 5), "float32")}, ValueError, "b must have G, N, K >= 1, got shape (2, 0, 5)"),
        (
            {"group_offsets": np.array([0, 4])},
            ValueError,
            "group_offsets must have shape (G + 1,) = (3,), got (2,)",
        ),
        (
            {"group_offsets": np.array([0, 3, 5])},
            ValueError,
            "group_offsets must ascend within 0..M = 0..4, got 5 at index 2",
        ),
        (
            {"group_offsets": np.array([0, 3, 2])},
            ValueError,
            "group_offsets must ascend within 0..M = 0..4, got 2 at index 2",
        ),
        ({"bias": np.ones((2, 4), "float32")}, ValueError, "bias must have shape (G, N) = (2, 3), got (2, 4)"),
        ({"out": np.ones((4, 5), "float32")}, ValueError, "out must have shape (M, N) = (4, 3), got (4, 5)"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "a": np.ones((4, 5), "float32"),
        "b": np.ones((2, 3, 5), "float32"),
        "group_offsets": np.array([0, 1, 4]),
    }
    with pytest.raises(error) as raised:
        cumoe.grouped_gemm(**(arguments | change))
    assert str(raised.value) == message


def test_an_unknown_kernel_lists_the_others():
    with pytest.raises(NotImplementedError, match="no micro-kernel 'amx' for float32 on this CPU; available: "):
        microkernel.choose("float32", "amx")
