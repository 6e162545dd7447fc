"""Every refusal names the argument, the rule and both numbers."""

import ml_dtypes  # noqa: F401  names the dtypes
import numpy as np
import pytest

from cumoe import _check


def locked(array):
    array.flags.writeable = False
    return array


BASE = np.zeros((4, 6), np.float32)

REFUSALS = [
    (
        lambda: _check.shape("w1", np.zeros((8, 2048, 2816)), "(E, 2I, H)", (8, 2816, 2048)),
        ValueError,
        "w1 must have shape (E, 2I, H) = (8, 2816, 2048), got (8, 2048, 2816); the last two axes look swapped",
    ),
    (
        lambda: _check.shape("w2", np.zeros((8, 3, 4)), "(E, H, I)", (7, 3, 4)),
        ValueError,
        "w2 must have shape (E, H, I) = (7, 3, 4), got (8, 3, 4)",
    ),
    (
        lambda: _check.shape("bias", np.zeros(3), "(E,)", (4,)),
        ValueError,
        "bias must have shape (E,) = (4,), got (3,)",
    ),
    (
        lambda: _check.shape("x", np.zeros(()), "(T, H)", (0, 4)),
        ValueError,
        "x must have shape (T, H) = (0, 4), got ()",
    ),
    (
        lambda: _check.ndim("hidden_states", np.zeros((2, 3, 4)), "(T, H)", 2),
        ValueError,
        "hidden_states must have 2 axes (T, H), got shape (2, 3, 4)",
    ),
    (
        lambda: _check.dtype("x", np.zeros(1, "int8"), ("float16", "float32", "bfloat16")),
        TypeError,
        "x must be float16, float32 or bfloat16, got int8",
    ),
    (
        lambda: _check.dtype("x", np.zeros(1, "complex64"), ("float32",)),
        TypeError,
        "x must be float32, got complex64",
    ),
    (
        lambda: _check.same_dtype("w1", np.zeros(1, "float32"), "hidden_states", np.zeros(1, "bfloat16")),
        TypeError,
        "w1 must have the dtype of hidden_states = bfloat16, got float32; convert one of them",
    ),
    (lambda: _check.integer("top_k", 2.0, 1), TypeError, "top_k must be an int, got float"),
    (lambda: _check.integer("top_k", True, 1), TypeError, "top_k must be an int, got bool"),
    (lambda: _check.integer("top_k", "2", 1), TypeError, "top_k must be an int, got str"),
    (lambda: _check.integer("top_k", 0, 1), ValueError, "top_k must be >= 1, got 0"),
    (lambda: _check.integer("top_k", 9, 1, 8), ValueError, "top_k must be in 1..8, got 9"),
    (
        lambda: _check.choice("activation", "tanh", ("silu", "gelu")),
        ValueError,
        "activation must be silu or gelu, got 'tanh'",
    ),
    (lambda: _check.choice("activation", None, ("silu",)), ValueError, "activation must be silu, got None"),
    (
        lambda: _check.no_overlap("out", BASE, hidden_states=BASE[1:3]),
        ValueError,
        "out must not share memory with hidden_states; pass a separate array or out=None",
    ),
    (
        lambda: _check.no_overlap("out", BASE[:, ::-1], w1=None, w2=BASE[::-1]),
        ValueError,
        "out must not share memory with w2; pass a separate array or out=None",
    ),
    (
        lambda: _check.writeable("out", locked(np.zeros(3))),
        ValueError,
        "out must be writeable, got a read-only array; pass a copy",
    ),
    (
        lambda: _check.contiguous("out", np.zeros((4, 6), np.float32)[:, ::2]),
        ValueError,
        "out must be C-contiguous, got strides (24, 8) for shape (4, 3); pass a separate array or out=None",
    ),
    (
        lambda: _check.output("out", np.zeros((2, 3), "float32"), "(T, H)", (2, 4), "float32"),
        ValueError,
        "out must have shape (T, H) = (2, 4), got (2, 3)",
    ),
    (
        lambda: _check.output("out", np.zeros((2, 4), "float64"), "(T, H)", (2, 4), "float32"),
        TypeError,
        "out must be float32, got float64",
    ),
    (
        lambda: _check.output("out", np.zeros((4, 2), "float32").T, "(T, H)", (2, 4), "float32"),
        ValueError,
        "out must be C-contiguous, got strides (4, 8) for shape (2, 4); pass a separate array or out=None",
    ),
    (
        lambda: _check.output(
            "out", np.zeros(33, np.uint8)[1:].view("float32").reshape(2, 4), "(T, H)", (2, 4), "float32"
        ),
        ValueError,
        "out must be aligned to 4 bytes, got an address 1 bytes off; pass a separate array or out=None",
    ),
    (
        lambda: _check.output("out", locked(np.zeros((2, 4), "float32")), "(T, H)", (2, 4), "float32"),
        ValueError,
        "out must be writeable, got a read-only array; pass a copy",
    ),
    (
        lambda: _check.output("out", BASE, "(T, H)", (4, 6), "float32", hidden_states=BASE),
        ValueError,
        "out must not share memory with hidden_states; pass a separate array or out=None",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_refusals(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_what_is_right_passes():
    array = np.zeros((2, 4), "bfloat16")
    _check.shape("x", array, "(T, H)", (2, 4))
    _check.ndim("x", array, "(T, H)", 2)
    _check.dtype("x", array, ("float32", "bfloat16"))
    _check.same_dtype("x", array, "y", array)
    _check.choice("activation", "silu", ("silu", "gelu"))
    _check.writeable("x", array)
    _check.contiguous("x", np.zeros((0, 4)))
    _check.output("out", array, "(T, H)", (2, 4), "bfloat16", x=np.zeros((2, 4)), w=None)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.int64(3)])
def test_integers_of_any_kind_come_back_as_int(value):
    got = _check.integer("top_k", value, 1, 3)
    assert got == 3
    assert type(got) is int


def test_neighbours_in_one_buffer_do_not_overlap(xp):
    buffer = xp.zeros(24, xp.float32)
    _check.no_overlap("out", buffer[:12], x=buffer[12:], nothing=buffer[:0])
    _check.no_overlap("out", buffer[:0], x=buffer)


def test_interleaved_numpy_arrays_do_not_overlap():
    pair = np.zeros((8, 2), np.float32)
    _check.no_overlap("out", pair[:, 0], x=pair[:, 1])


@pytest.mark.parametrize(
    "take",
    [
        lambda a: a,
        lambda a: a[1:3],
        lambda a: a[::-1],
        lambda a: a[:, ::-2],
        lambda a: a.T[2:4],
        lambda a: a[2, 3:4],
        lambda a: a[::-1, ::-1],
    ],
)
def test_byte_bounds_hold_every_element(xp, take):
    base = xp.zeros((4, 6), xp.float32)
    start = _check.byte_bounds(base)[0]
    index = np.arange(24, dtype=np.int64).reshape(4, 6)  # element number = byte offset / 4
    expected = start + 4 * take(index).min(), start + 4 * take(index).max() + 4
    assert _check.byte_bounds(take(base)) == expected
