"""What the bulk copy engine of sm_90 is told about arrays, with no GPU: a box read here in NumPy, as it reads it."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from cumoe.rawkernels import _tensor_maps

TILE = 64  # rows of weights


@pytest.fixture
def told(monkeypatch):
    """The last map that was asked for: address, sizes, strides, box, bytes of an element."""
    maps = []
    monkeypatch.setattr(_tensor_maps, "_encode", lambda *named: maps.append(named))
    return maps


def seen(array, told):
    """The array as the map shows it, the innermost axis last, and the box in the same order."""
    address, sizes, strides, box, itemsize = told[-1]
    assert itemsize == array.itemsize
    assert address == array.ctypes.data
    assert len(sizes) == len(box) == len(strides) + 1 <= 5
    assert all(0 < step < 2**40 and step % 16 == 0 for step in strides)
    assert all(1 <= extent <= 256 for extent in box)
    return as_strided(array, sizes[::-1], (*strides[::-1], array.itemsize)), box[::-1]


def order_of(n, gated, interleaved):
    """Rows of the weights as tiles have them: 8 gates, the 8 ups of the same outputs, and so on."""
    rows = np.arange(n)
    if not gated:
        return rows
    gates, ups = (rows[0::2], rows[1::2]) if interleaved else (rows[: n // 2], rows[n // 2 :])
    return np.stack([gates.reshape(-1, 8), ups.reshape(-1, 8)], 1).reshape(-1)


VIEWS = {
    "in one piece": lambda wide: wide[:, :48, :72].copy(),
    "apart": lambda wide: wide[::2, 1:49, 8:80],
    "one expert": lambda wide: wide[:1, :48, :72],
    "one expert, a step of two bytes": lambda wide: as_strided(wide, (1, 48, 72), (2, *wide.strides[1:])),
    "one expert, a step back": lambda wide: wide[::-1][:1, :48, :72],
    "short rows": lambda wide: wide[:, :48, :24],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("gated", "interleaved"), [(False, False), (True, False), (True, True)])
def test_boxes_of_weights_are_tiles(told, view, gated, interleaved):
    weights = VIEWS[view](np.arange(5 * 50 * 80, dtype=np.uint16).reshape(5, 50, 80))
    e, n, k = weights.shape
    _tensor_maps.weights_map(weights.ctypes.data, weights.shape, weights.strides[:2], gated, interleaved, TILE)
    array, box = seen(weights, told)
    assert box == (1, TILE // (16 if gated else 8), 2 if gated else 1, 8, 64)
    # blocks of a box that lie outside are zeros, so that all the blocks in a row are the rows of all tiles
    np.testing.assert_array_equal(array.reshape(e, n, k), weights[:, order_of(n, gated, interleaved)])


@pytest.mark.parametrize(("rule", "width"), [("fp8", 64), ("nvfp4", 32)])
@pytest.mark.parametrize(("gated", "interleaved"), [(False, False), (True, False), (True, True)])
def test_boxes_of_codes_have_as_many_of_them(told, rule, width, gated, interleaved):
    codes = np.arange(5 * 48 * 80).astype(np.uint8).reshape(5, 48, 80)
    _tensor_maps.weights_map(codes.ctypes.data, codes.shape, codes.strides[:2], gated, interleaved, TILE, rule)
    array, box = seen(codes, told)
    assert box == (1, TILE // (16 if gated else 8), 2 if gated else 1, 8, width)
    np.testing.assert_array_equal(array.reshape(codes.shape), codes[:, order_of(48, gated, interleaved)])


def test_boxes_of_rows(told):
    rows = np.arange(7 * 40, dtype=np.uint16).reshape(7, 40)
    _tensor_maps.rows_map(rows.ctypes.data, *rows.shape, 96)
    array, box = seen(rows, told)
    assert box == (96, 64)  # 128 bytes, as of numbers above
    np.testing.assert_array_equal(array, rows)
