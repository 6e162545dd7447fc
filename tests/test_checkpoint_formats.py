"""GPTQ, AWQ and pack-quantized weights: against packing by hand, the same numbers of all three, and the way back."""

import re

import checkpoint_words as by_hand
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import assert_equal, back, bits, on

import cumoe

CHECKPOINTS = st.sampled_from(["gptq", "gptq_v2"])


def parts(quantized):
    """The arrays of an operand as NumPy bits."""
    return [None if part is None else bits(back(part)) for part in (*quantized[:2], *quantized[4:])]


def assert_same(one, other):
    """The same scheme, groups and bits of all parts."""
    assert one[2:4] == other[2:4]
    for left, right in zip(parts(one), parts(other), strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert_equal([left], [right])


def assert_stands_for(quantized, expected):
    np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), expected)


def there(xp, arrays):
    return [on(xp, array) for array in arrays]


def read_only(array):
    array.flags.writeable = False
    return array


@given(weight=by_hand.weights(), checkpoint_format=CHECKPOINTS, symmetric=st.booleans())
def test_gptq_by_hand_and_back(xp, weight, checkpoint_format, symmetric):
    qweight, scales, qzeros = there(xp, by_hand.gptq(weight, checkpoint_format == "gptq"))
    options = {"checkpoint_format": checkpoint_format}
    given_zeros = None if symmetric else qzeros
    quantized = cumoe.from_gptq(qweight, scales, given_zeros, bits=weight.bits, **options)
    assert quantized.scheme == {4: "int4", 8: "uint8"}[weight.bits]
    assert quantized.group_shape == (1, weight.group)
    assert (quantized.zero_points is None) == symmetric
    assert_stands_for(quantized, by_hand.numbers(weight, None if symmetric else weight.zeros))
    written = cumoe.to_gptq(quantized, **options)
    assert_equal([bits(back(one)) for one in written[:2]], [bits(back(one)) for one in (qweight, scales)])
    assert written[2] is None if symmetric else (back(written[2]) == back(qzeros)).all()
    assert_same(cumoe.from_gptq(*written, bits=weight.bits, **options), quantized)


@given(weight=by_hand.weights(bits=(4,)), symmetric=st.booleans())
def test_awq_by_hand_and_back(xp, weight, symmetric):
    qweight, scales, qzeros = there(xp, by_hand.awq(weight))
    quantized = cumoe.from_awq(qweight, scales, None if symmetric else qzeros)
    assert (quantized.scheme, quantized.group_shape) == ("int4", (1, weight.group))
    assert_stands_for(quantized, by_hand.numbers(weight, None if symmetric else weight.zeros))
    written = cumoe.to_awq(quantized)
    assert_equal([bits(back(one)) for one in written[:2]], [bits(back(one)) for one in (qweight, scales)])
    assert written[2] is None if symmetric else (back(written[2]) == back(qzeros)).all()
    assert_same(cumoe.from_awq(*written), quantized)


@given(weight=by_hand.weights(columns=(2, 8, 14)), symmetric=st.booleans())
def test_packed_by_hand_and_back(xp, weight, symmetric):
    packed, scale, zeros = there(xp, by_hand.compressed_tensors(weight))
    quantized = cumoe.from_compressed_tensors_packed(packed, scale, None if symmetric else zeros, bits=weight.bits)
    assert quantized.group_shape == (1, weight.group)
    assert_stands_for(quantized, by_hand.numbers(weight, None if symmetric else weight.zeros))
    written = cumoe.to_compressed_tensors_packed(quantized)
    assert_equal([bits(back(one)) for one in written[:2]], [bits(back(one)) for one in (packed, scale)])
    assert written[2] is None if symmetric else (back(written[2]) == back(zeros)).all()


@given(weight=by_hand.weights(bits=(4,)))
def test_three_packings_of_a_weight_are_one_operand(xp, weight):
    read = [
        cumoe.from_gptq(*there(xp, by_hand.gptq(weight))),
        cumoe.from_gptq(*there(xp, by_hand.gptq(weight, False)), checkpoint_format="gptq_v2"),
        cumoe.from_awq(*there(xp, by_hand.awq(weight))),
        cumoe.from_compressed_tensors_packed(*there(xp, by_hand.compressed_tensors(weight))),
    ]
    numbers = [back(cumoe.dequantize(one)) for one in read]
    for one, dense in zip(read[1:], numbers[1:], strict=True):
        assert_same(one, read[0])
        assert (dense.view(np.uint32) == numbers[0].view(np.uint32)).all()


@given(weight=by_hand.weights(bits=(8,)))
def test_two_packings_of_bytes_are_one_operand(xp, weight):
    gptq = cumoe.from_gptq(*there(xp, by_hand.gptq(weight)), bits=8)
    assert_same(cumoe.from_compressed_tensors_packed(*there(xp, by_hand.compressed_tensors(weight)), bits=8), gptq)


@given(seed=st.integers(0, 99), zero_points=st.booleans())
@pytest.mark.parametrize("scheme", ["int4", "uint8"])
def test_what_quantize_gives_goes_through_every_format(xp, scheme, seed, zero_points):
    x = np.random.default_rng(seed).standard_normal((3, 16, 64), np.float32)
    quantized = cumoe.quantize(on(xp, x), scheme, (1, 32), zero_points=zero_points)
    width = {"int4": 4, "uint8": 8}[scheme]
    assert_same(cumoe.from_gptq(*cumoe.to_gptq(quantized), bits=width), quantized)
    assert_same(
        cumoe.from_compressed_tensors_packed(*cumoe.to_compressed_tensors_packed(quantized), bits=width), quantized
    )
    if scheme == "int4":
        assert_same(cumoe.from_awq(*cumoe.to_awq(quantized)), quantized)


@pytest.mark.parametrize(
    ("width", "numbers", "words"),
    [
        (4, [-8, -7, -6, -5, -4, -3, -2, -1], [1985229328]),
        (4, [-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, -8, -8, -8, -8], [1985229328, 52137]),
        (8, [1, 2, 3, 4, -128, -127, -126, -125], [-2071756159, 50462976]),
    ],
)
def test_packed_words_that_the_tests_of_compressed_tensors_have(xp, width, numbers, words):
    values = cumoe.from_compressed_tensors_packed(
        on(xp, np.array([words], np.int32)), on(xp, np.ones((1, 1), np.float32)), bits=width
    ).values
    codes = cumoe.unpack_int4(values) if width == 4 else values
    assert (back(codes)[0].astype(int) - 2 ** (width - 1)).tolist() == numbers


def test_awq_words_that_the_converter_of_vllm_reverses():
    """Its order of places is [0, 4, 1, 5, 2, 6, 3, 7]; here each code is its own column."""
    values = cumoe.from_awq(np.full((32, 1), 0x75316420, np.int32), np.ones((1, 8), np.float32)).values
    assert cumoe.unpack_int4(values)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_symmetric_gptq_checkpoints_store_seven(xp):
    qweight, scales = np.full((4, 8), 0x12345678, np.int32), np.ones((1, 8), np.float32)
    stored = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32}
    for name, pattern in stored.items():
        arrays = there(xp, (qweight, scales, np.full((1, 1), pattern, np.int32)))
        quantized = cumoe.from_gptq(*arrays, checkpoint_format=name)
        assert (back(quantized.zero_points) == 0x88).all()
        symmetric = cumoe.from_gptq(*arrays[:2])
        np.testing.assert_array_equal(back(cumoe.dequantize(quantized)), back(cumoe.dequantize(symmetric)))


@pytest.mark.parametrize("width", [4, 8])
def test_a_zero_of_gptq_counts_modulo_its_bits(xp, width):
    words = np.full((1, width), -1, np.int32)
    arrays = (np.zeros((width, 32), np.int32), np.ones((1, 32), np.float32), words)
    quantized = cumoe.from_gptq(*there(xp, arrays), bits=width)
    assert not back(quantized.zero_points).any()
    assert (back(cumoe.to_gptq(quantized)[2]) == words).all()


def test_a_row_that_is_one_group(xp):
    """Groups that no kernel has are read and written all the same; `halve_groups` makes them smaller."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (8, 32), dtype=np.int32)
    quantized = cumoe.from_compressed_tensors_packed(*there(xp, (words, np.ones((8, 1), np.float32))))
    assert quantized.group_shape == (1, 256)
    assert (back(cumoe.to_compressed_tensors_packed(quantized)[0]) == words).all()
    halved = cumoe.halve_groups(quantized, 128)
    assert halved.group_shape == (1, 128)
    codes = back(cumoe.unpack_int4(quantized.values)).astype(np.float32)
    np.testing.assert_array_equal(back(cumoe.dequantize(halved)), codes - 8)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_trivial_order_of_groups(xp, dtype):
    qweight, scales = np.zeros((2, 8, 8), np.int32), np.ones((2, 2, 8), np.float32)
    order = np.broadcast_to(np.arange(64, dtype=dtype) // 32, (2, 64))
    read = cumoe.from_gptq(*there(xp, (qweight, scales)), g_idx=on(xp, order))
    assert read.group_shape == (1, 32)
    packed = there(xp, (np.zeros((2, 8, 8), np.int32), np.ones((2, 8, 2), np.float32)))
    assert cumoe.from_compressed_tensors_packed(*packed, weight_g_idx=on(xp, order)).group_shape == (1, 32)
    wrong = on(xp, np.ascontiguousarray(order[:, ::-1]))
    for call, name in (
        (lambda: cumoe.from_gptq(*there(xp, (qweight, scales)), g_idx=wrong), "g_idx"),
        (lambda: cumoe.from_compressed_tensors_packed(*packed, weight_g_idx=wrong), "weight_g_idx"),
    ):
        with pytest.raises(NotImplementedError, match=rf"^{name} must give k // 32 for column k.*act-order"):
            call()


@given(weight=by_hand.weights(bits=(4,)))
def test_strided_and_read_only_tensors_are_read_alike(weight):
    readers = (
        (cumoe.from_gptq, by_hand.gptq(weight)),
        (cumoe.from_awq, by_hand.awq(weight)),
        (cumoe.from_compressed_tensors_packed, by_hand.compressed_tensors(weight)),
    )
    for reader, arrays in readers:
        strided = [np.repeat(array, 2, axis=-1)[..., ::2] for array in arrays]
        plain = reader(*arrays)
        assert_same(reader(*strided), plain)
        locked = reader(*(read_only(array.copy()) for array in arrays))
        assert_same(locked, plain)
        assert_same(reader(*(np.asarray(array, order="F") for array in arrays)), plain)


def test_a_read_only_file_is_not_lent_for_writing():
    """Parts without a copy keep the flag: a write would go to a mapped file, or crash."""
    packed = read_only(np.zeros((8, 4), np.int32))
    scale = read_only(np.ones((8, 1), np.float32))
    quantized = cumoe.from_compressed_tensors_packed(packed, scale)
    assert np.shares_memory(quantized.values, packed) and not quantized.values.flags.writeable
    assert quantized.scale is scale


def test_unaligned_codes_become_aligned_words():
    values = np.zeros(129, np.uint8)[1:].reshape(8, 16)
    quantized = cumoe.Quantized(values, np.ones((8, 1), np.float32), "int4", cumoe.GroupShape(1, 32))
    assert cumoe.to_compressed_tensors_packed(quantized)[0].flags.aligned


def test_torch_goes_in_and_comes_out():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-(2**31), 2**31, shape, dtype=np.int32) for shape in ((2, 4, 16), (2, 1, 2))]
    qweight, qzeros = map(torch.from_numpy, arrays)
    scales = torch.ones(2, 1, 16, dtype=torch.bfloat16)
    quantized = cumoe.from_gptq(qweight, scales, qzeros)
    assert {type(part) for part in (quantized.values, quantized.scale, quantized.zero_points)} == {torch.Tensor}
    assert quantized.scale.dtype == torch.bfloat16
    written = cumoe.to_gptq(quantized)
    assert all(torch.equal(one, other) for one, other in zip(written, (qweight, scales, qzeros), strict=True))


WORDS, SCALES = np.zeros((4, 8), np.int32), np.ones((1, 8), np.float32)
ROWS, COLUMN = np.zeros((8, 4), np.int32), np.ones((8, 1), np.float32)
INT4 = cumoe.from_gptq(WORDS, SCALES)
ODD = INT4._replace(values=np.zeros((8, 18), np.uint8), group_shape=cumoe.GroupShape(1, 36))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cumoe.from_gptq(WORDS.view(np.uint32), SCALES), TypeError, "qweight must be int32, got uint32"),
        (lambda: cumoe.from_gptq(WORDS, SCALES, bits=3), ValueError, "bits must be 4 or 8, got 3"),
        (
            lambda: cumoe.from_gptq(WORDS, SCALES, checkpoint_format="marlin"),
            ValueError,
            "checkpoint_format must be gptq or gptq_v2, got 'marlin'",
        ),
        (
            lambda: cumoe.from_gptq(WORDS, np.ones((3, 8), np.float32)),
            ValueError,
            "scales must have a divisor of K = 32 groups along axis -2, got 3",
        ),
        (
            lambda: cumoe.from_gptq(WORDS, np.ones((1, 9), np.float32)),
            ValueError,
            "scales must have shape (..., K / g, N) = (1, 8), got (1, 9)",
        ),
        (
            lambda: cumoe.from_gptq(WORDS, SCALES, np.zeros((1, 2), np.int32)),
            ValueError,
            "qzeros must have shape (..., K / g, N / 8) = (1, 1), got (1, 2)",
        ),
        (
            lambda: cumoe.from_gptq(WORDS[:, :6], SCALES[:, :6], np.zeros((1, 1), np.int32)),
            ValueError,
            "qzeros must have N a multiple of 8, got 6",
        ),
        (
            lambda: cumoe.from_gptq(WORDS, SCALES, g_idx=np.zeros(8, np.int32)),
            ValueError,
            "g_idx must have shape (..., K) = (32,), got (8,)",
        ),
        (
            lambda: cumoe.from_awq(WORDS[0], SCALES),
            ValueError,
            "qweight must have at least 2 axes (..., K, N / 8), got shape (8,)",
        ),
        (
            lambda: cumoe.from_awq(WORDS[:3, :1], SCALES),
            ValueError,
            "qweight must have an even K, got shape (3, 1)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_packed(ROWS, SCALES),
            ValueError,
            "weight_scale must have shape (..., N, K / g) = (8, 8), got (1, 8)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_packed(ROWS, COLUMN, np.zeros((2, 1), np.int32)),
            ValueError,
            "weight_zero_point must have shape (..., ceil(N / 8), K / g) = (1, 1), got (2, 1)",
        ),
        (
            lambda: cumoe.from_compressed_tensors_packed(ROWS[:5], COLUMN[:5], np.zeros((1, 1), np.int32)),
            ValueError,
            "weight_zero_point must have N a multiple of 2, got 5",
        ),
        (lambda: cumoe.to_gptq(WORDS), TypeError, "quantized must be a Quantized, got ndarray"),
        (
            lambda: cumoe.to_gptq(INT4._replace(scheme="mxfp4")),
            ValueError,
            "scheme must be int4 or uint8, got 'mxfp4'",
        ),
        (lambda: cumoe.to_awq(INT4._replace(scheme="uint8")), ValueError, "scheme must be int4, got 'uint8'"),
        (lambda: cumoe.to_gptq(INT4._replace(scale=None)), TypeError, "scale must be an array, got None"),
        (
            lambda: cumoe.to_gptq(INT4._replace(zero_points=np.zeros((8, 1), np.uint8))),
            ValueError,
            "zero_points must have shape (..., N/2, Kb) = (4, 1), got (8, 1)",
        ),
        (lambda: cumoe.to_gptq(ODD), ValueError, "values must have K a multiple of 8, got 36"),
        (
            lambda: cumoe.to_gptq(INT4._replace(values=np.zeros((8, 20), np.uint8), scale=np.ones((8, 2), np.float32))),
            ValueError,
            "group_shape must be (1, g), g a divisor of K = 40, got (1, 32)",
        ),
        (
            lambda: cumoe.to_awq(INT4._replace(values=INT4.values[:4], scale=INT4.scale[:4])),
            ValueError,
            "values must have N a multiple of 8, got 4",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
