"""The tasks of a grouped product: which rows of which expert meet which panels of its weights, and who does them."""

import numba
import numpy as np

from cumoe.cpu import _cpus, _recorder, _region, _threads
from cumoe.cpu._frozen import Address, Each
from cumoe.cpu._jit import jit

_PER_THREAD = 16  # evens out what the threads do
_FEW_PER_THREAD = 8  # of few rows: what it costs to begin a task counts
_FEW_ROWS = 64  # of a task that is recorded
_LAST_PARTS = 4  # the last blocks of rows are cut finer, so that the threads end together
_LAST_PRODUCTS = 1 << 20  # of such a part: it takes much longer than to begin it, as do two panels than a gather


def run(worker, problem, offsets, most_rows, row_group, panels, panel_products, parts):
    """
    Let threads do the tasks of a product: `worker` (problem, tasks, address of a counter, the thread's scratch).

    Tasks have at most `most_rows` rows, and scratch for a multiple of `row_group`; `parts` (rows) are its shapes and
    dtypes. A row and one of the `panels` of an expert meet in `panel_products` multiplications.
    """
    recorder = _recorder.current()
    num_rows, experts = len(problem.out), len(offsets) - 1
    if recorder is not None:
        _record(recorder, worker, problem, offsets, most_rows, row_group, panels, panel_products, parts)
        return
    workers = numba.get_num_threads()
    wanted = workers, _PER_THREAD
    tasks = np.empty((_most_tasks(num_rows, experts, most_rows, panels, *wanted), 5), np.int64)
    found = np.empty(2, np.int64)
    cut(offsets, most_rows, panels, panel_products, *wanted, tasks, found)
    num_tasks, longest = found.tolist()
    if num_tasks == 0:
        return
    workers = min(workers, num_tasks)
    scratch = [np.empty((workers, *shape), dtype) for shape, dtype in parts(-(-longest // row_group) * row_group)]
    counter, arrivals = np.zeros((2, 8), np.int64)
    together = _cpus.is_of_use(workers, problem.out.size * problem.x.shape[1]) and _cpus.are_asleep()
    given = problem, tasks, Address(counter), *map(Each, scratch)
    _region.run(worker, given, workers, arrivals.ctypes.data if together else 0)
    _cpus.were_awake(workers)
    _threads.warn_if_slow()


def _record(recorder, worker, problem, offsets, most_rows, row_group, panels, panel_products, parts):
    num_rows = len(problem.out)
    recorder.products += problem.out.size * problem.x.shape[1]
    if num_rows <= _FEW_ROWS * _FEW_PER_THREAD * recorder.workers:
        most_rows = max(1, min(most_rows, _FEW_ROWS) // row_group) * row_group
    wanted = recorder.workers, _FEW_PER_THREAD
    tasks = recorder.take((_most_tasks(num_rows, len(offsets) - 1, most_rows, panels, *wanted), 5), np.int64)
    found = recorder.take((2,), np.int64)
    recorder.first(cut, offsets, most_rows, panels, panel_products, *wanted, tasks, found)
    room = -(-min(num_rows, most_rows) // row_group) * row_group
    scratch = [Each(recorder.take((recorder.workers, *shape), dtype)) for shape, dtype in parts(room)]
    recorder.all_threads(worker, problem, tasks, recorder.counter(), *scratch)


def _most_tasks(num_rows, experts, most_rows, panels, workers, per_worker):
    """Of so many rows, and one more where there may be none."""
    last = workers * min(panels, 2 * _LAST_PARTS * per_worker + 1)
    return 2 * workers * per_worker + min(num_rows, experts + num_rows // most_rows) + last + 1


@jit()
def cut(offsets, most_rows, panels, panel_products, workers, per_worker, tasks, found):
    """
    Fill `tasks` with (expert, first row, rows, first panel, panels), and `found` with their number and the most rows.

    There are about `per_worker` for each of the workers, of at most `most_rows`, and the last blocks of rows, one for
    each worker, in smaller ones, if that is worth it: a row and a panel meet in `panel_products` multiplications. What
    follows the tasks has no rows.
    """
    experts = offsets.size - 1
    blocks = longest = np.int64(0)
    for e in range(experts):
        blocks += (offsets[e + 1] - offsets[e] + most_rows - 1) // most_rows
    whole = max(1, min(panels, blocks * panels // (workers * per_worker)))
    n, left = np.int64(0), blocks
    for e in range(experts):
        count = offsets[e + 1] - offsets[e]
        pieces = (count + most_rows - 1) // most_rows
        row = offsets[e]
        for piece in range(pieces):
            rows = count // pieces + (1 if piece < count % pieces else 0)
            longest = max(longest, rows)
            part = whole // _LAST_PARTS
            is_worth_it = part > 1 and rows * part * panel_products >= _LAST_PRODUCTS
            group = part if left <= workers and is_worth_it else whole
            left -= 1
            for panel in range(0, panels, group):
                if n == tasks.shape[0]:  # only offsets that make no sense come here
                    break
                tasks[n, 0] = e
                tasks[n, 1] = row
                tasks[n, 2] = rows
                tasks[n, 3] = panel
                tasks[n, 4] = min(group, panels - panel)
                n += 1
            row += rows
    tasks[n:, 2] = 0
    found[0] = n
    found[1] = longest
