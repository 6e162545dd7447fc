"""Grouped products: every micro-kernel that runs here, packed and plain weights, against the float64 law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES

import cumoe
from cumoe.cpu import grouped_gemm as room
from cumoe.cpu import microkernel, pack
from cumoe.reference import experts
from cumoe.reference.rounding import rounded

KERNELS = [(dtype, name) for dtype in DTYPES for name in microkernel.names(dtype)]


def groups(seed, num_groups, n, k, dtype, most=40):
    """Rows, matrices and ragged offsets, some groups empty."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most, num_groups) * (rng.random(num_groups) < 0.8)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    a = rng.standard_normal((int(offsets[-1]), k)).astype(dtype)
    b = rng.standard_normal((num_groups, n, k)).astype(dtype)
    return a, b, offsets


def expected(a, b, offsets, bias=None):
    """The law for `grouped_gemm`."""
    value, error = np.zeros((len(a), b.shape[1])), np.zeros((len(a), b.shape[1]))
    for g in range(len(b)):
        rows = slice(offsets[g], offsets[g + 1])
        x = a[rows].astype(np.float64)
        y = experts.linear(experts.Bounded(x, np.zeros_like(x)), b[g], None if bias is None else bias[g])
        value[rows], error[rows] = y.value, rounded(y.value, y.error, a.dtype)
    return experts.Bounded(value, error)


def assert_within(out, bounded):
    """Every element within its bound."""
    ratio = experts.ratio(out, bounded)
    assert out.shape == bounded.value.shape
    assert ratio.max(initial=0) <= 1, f"{ratio.max()} at {np.unravel_index(ratio.argmax(), ratio.shape)}"


sizes = st.one_of(st.integers(1, 80), st.sampled_from((16, 31, 32, 33, 64, 65, 128, 200)))


@given(st.integers(0, 2**32), st.integers(1, 5), sizes, sizes, st.sampled_from(DTYPES), st.booleans())
def test_equals_reference(xp, seed, num_groups, n, k, dtype, with_bias):
    a, b, offsets = groups(seed, num_groups, n, k, dtype)
    bias = np.random.default_rng(seed).standard_normal((num_groups, n)).astype(dtype) if with_bias else None
    arguments = [xp.asarray(array) for array in (a, b, offsets)]
    out = cumoe.grouped_gemm(*arguments, bias=None if bias is None else xp.asarray(bias))
    assert out.dtype == dtype
    assert_within(np.asarray(out.get() if xp is not np else out), expected(a, b, offsets, bias))


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 33), (130, 257), (37, 96)])
def test_every_kernel_equals_reference_with_packed_and_plain_weights(dtype, kernel, n, k):
    a, b, offsets = groups(n * k, 3, n, k, dtype, most=300 if n == 37 else 50)
    results = []
    for packed in (False, True):
        weights = b.view(np.uint16) if dtype != "float32" else b
        if packed:
            target = np.empty(pack.panel_shape(weights.shape, dtype, kernel, False), weights.dtype)
            pack.pack_weights(weights, dtype, kernel, False, False, target)
            weights = target
        results.append(call_room(a, weights, offsets, dtype, kernel, n))
        assert_within(results[-1], expected(a, b, offsets))
    assert results[0].tobytes() == results[1].tobytes()


def call_room(a, weights, offsets, dtype, kernel, n):
    """One plain product of the CPU room."""
    bits = "float32" if dtype == "float32" else "uint16"
    out = np.zeros((len(a), n), bits)
    nothing = np.empty(0, np.float32)
    room.grouped_gemm(
        a.view(bits), np.empty(0, np.int32), 0, nothing, weights, offsets, np.empty((0, 0), np.float32), nothing,
        "", False, 0, 0, 0, dtype, kernel, out,
    )  # fmt: skip
    return out.view(dtype)


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(dtype, kernel):
    a, b, _ = groups(1, 1, 70, 130, dtype)
    a = np.random.default_rng(2).standard_normal((67, 130)).astype(dtype)
    weights = b.view(np.uint16) if dtype != "float32" else b
    together = call_room(a, weights, np.array([0, 67]), dtype, kernel, 70)
    for first, last in ((0, 1), (1, 3), (3, 20), (20, 67)):
        alone = call_room(a[first:last], weights, np.array([0, last - first]), dtype, kernel, 70)
        assert alone.tobytes() == together[first:last].tobytes()


def test_rows_outside_every_group_are_not_touched(xp):
    a, b = np.full((6, 8), np.nan, np.float32), np.ones((2, 5, 8), np.float32)
    a[1:4] = 1
    out = xp.full((6, 5), 7, "float32")
    cumoe.grouped_gemm(xp.asarray(a), xp.asarray(b), xp.asarray([1, 2, 4]), out=out)
    out = np.asarray(out.tolist())
    assert (out[1:4] == 8).all()
    assert (out[[0, 4, 5]] == 7).all()


def test_one_misplaced_product_is_noticed():
    """The bound is tight enough to see one product of 512 left out."""
    a, b, offsets = groups(3, 1, 8, 512, "float32")
    shorter = a.copy()
    shorter[:, 100] = 0
    out = cumoe.grouped_gemm(shorter, b, offsets)
    ratio = experts.ratio(out, expected(a, b, offsets))
    assert (ratio > 1).mean() > 0.8


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
