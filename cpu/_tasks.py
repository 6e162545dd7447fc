"""The tasks of a grouped product: which rows of which expert meet which panels of its weights."""

import numpy as np

from cumoe.cpu._jit import jit


@jit()
def cut(offsets, most_rows, panels, wanted):
    """
    (expert, first row, rows, first panel, panels) of every task, and the most rows of one.

    There are about `wanted` of them, of at most `most_rows`.
    """
    experts = offsets.size - 1
    blocks = longest = 0
    for e in range(experts):
        blocks += (offsets[e + 1] - offsets[e] + most_rows - 1) // most_rows
    group = max(1, min(panels, blocks * panels // wanted))
    per_block = (panels + group - 1) // group
    tasks = np.empty((blocks * per_block, 5), np.int64)
    n = 0
    for e in range(experts):
        count = offsets[e + 1] - offsets[e]
        pieces = (count + most_rows - 1) // most_rows
        row = offsets[e]
        for piece in range(pieces):
            rows = count // pieces + (1 if piece < count % pieces else 0)
            longest = max(longest, rows)
            for panel in range(0, panels, group):
                tasks[n, 0] = e
                tasks[n, 1] = row
                tasks[n, 2] = rows
                tasks[n, 3] = panel
                tasks[n, 4] = min(group, panels - panel)
                n += 1
            row += rows
    return tasks, longest
