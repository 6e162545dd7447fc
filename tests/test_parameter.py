"""Arrays that carry attributes."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

from cumoe import Parameter


@pytest.fixture
def weight():
    return Parameter(np.arange(6, dtype=np.float32).reshape(2, 3), weight_loader=len, is_transposed=True)


def test_memory_is_shared():
    array = np.zeros((2, 3), ml_dtypes.bfloat16)
    weight = Parameter(array, weight_loader=len)
    weight[0, 1] = 2
    assert array[0, 1] == 2 and np.shares_memory(array, weight)
    assert isinstance(weight, np.ndarray) and weight.dtype == ml_dtypes.bfloat16 and weight.weight_loader is len
    assert not hasattr(array, "weight_loader")


@pytest.mark.parametrize(
    "derive",
    [
        lambda w: w[1:],
        lambda w: w.T,
        lambda w: w.reshape(-1),
        lambda w: w.view(np.uint32),
        lambda w: w.copy(),
        lambda w: w.astype(np.float64),
        copy.copy,
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
    ],
)
def test_views_and_copies_keep_the_attributes(weight, derive):
    derived = derive(weight)
    assert type(derived) is Parameter
    assert derived.weight_loader is len and derived.is_transposed is True
    assert sorted(derived.astype(np.float64).ravel()) == sorted(np.asarray(derive(np.asarray(weight))).ravel())


def test_a_copy_has_attributes_of_its_own(weight):
    other = weight.copy()
    other.is_transposed = False
    assert weight.is_transposed is True


@pytest.mark.parametrize("compute", [lambda w: w + 1, lambda w: w @ w.T, lambda w: w == 0, np.exp, lambda w: w.sum(0)])
def test_arithmetic_gives_plain_arrays(weight, compute):
    result = compute(weight)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, compute(np.asarray(weight)))


def test_sums_are_numbers(weight):
    assert type(weight.sum()) is np.float32 and type(np.add.reduce(weight, axis=None)) is np.float32


def test_writing_in_place_keeps_the_parameter(weight):
    before = weight
    weight += 1
    weight[...] *= 2
    assert weight is before and weight.weight_loader is len
    np.testing.assert_array_equal(weight, 2 * (np.arange(6).reshape(2, 3) + 1))
