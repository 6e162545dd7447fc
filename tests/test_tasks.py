"""How a grouped product is cut into tasks: every output once, and the last tasks small."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cumoe.cpu import _tasks


def _cut(counts, most_rows, panels, workers, per_worker, products=_tasks._LAST_PRODUCTS):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    room = _tasks._most_tasks(int(offsets[-1]), len(counts), most_rows, panels, workers, per_worker)
    tasks, found = np.full((room + 1, 5), -1, np.int64), np.empty(2, np.int64)
    _tasks.cut(offsets, most_rows, panels, products, workers, per_worker, tasks, found)
    return offsets, tasks, found


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=12),
    st.integers(1, 24),
    st.one_of(st.integers(1, 60), st.integers(61, 1000)),
    st.sampled_from([1, _tasks._LAST_PRODUCTS // 9, _tasks._LAST_PRODUCTS]),
    st.integers(1, 9),
    st.sampled_from([1, 3, 8, 16]),
)
def test_tasks_cover_every_row_and_panel_once_in_the_room_made_for_them(
    counts, most_rows, panels, products, workers, per_worker
):
    offsets, tasks, found = _cut(counts, most_rows, panels, workers, per_worker, products)
    covered = np.zeros((offsets[-1], panels), np.int64)
    for expert, row, rows, panel, count in tasks[: found[0]]:
        assert offsets[expert] <= row and row + rows <= offsets[expert + 1]
        assert 1 <= rows <= most_rows and count >= 1
        covered[row : row + rows, panel : panel + count] += 1
    assert (covered == 1).all()
    assert found[0] < len(tasks) - 1, "one more than the last must have no rows"
    assert (tasks[found[0] :, 2] == 0).all()
    assert found[1] == max(tasks[: found[0], 2], default=0)


def test_the_last_block_of_each_worker_is_cut_finer_where_that_is_worth_it():
    products = _tasks._LAST_PRODUCTS // (64 * 4)
    _, tasks, found = _cut([64] * 8, 64, 16, 2, 4, products)
    sizes = [count for _, _, _, _, count in tasks[: found[0]]]
    assert sizes == [16] * 6 + [4] * 8, "two workers, four parts"
    _, tasks, found = _cut([63] * 8, 64, 16, 2, 4, products)
    assert [count for _, _, _, _, count in tasks[: found[0]]] == [16] * 8, "to begin a task costs too much"
    _, tasks, found = _cut([64] * 8, 64, 7, 2, 4)
    assert [count for _, _, _, _, count in tasks[: found[0]]] == [7] * 8, "to gather rows for one panel does, too"
