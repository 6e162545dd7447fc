"""
A few rows or many times one panel of weights: the pieces of K, and which weights are asked for meanwhile.

Compiled by itself, once for every loop over tasks that ends in another epilogue, and called by its address.
"""

import functools

from numba import types

from cumoe.cpu import _indirect
from cumoe.cpu._jit import jit


@functools.cache
def multiplier(kernel):
    """Where the machine code of `_multiply_panel` begins: it is compiled by itself, once for all loops over tasks."""
    multiply = jit(
        inner=True,
        tile=kernel.tile,
        max_rows=kernel.max_rows,
        row_group=kernel.row_group,
        item_bytes=2 if kernel.row_dtype == "bfloat16" else 4,
        side_bytes=kernel.columns // 2 * 4,
        k_step=kernel.k_step,
        ahead_bytes=kernel.ahead_bytes,
        fetches_next=kernel.fetches_next,
    )(_multiply_panel)
    return _indirect.address_for(multiply, (types.int64,) * 8 + (types.boolean,))


# ---- the template; jit(...) gives the names below their values ----

max_rows = row_group = item_bytes = side_bytes = k_step = ahead_bytes = 0
fetches_next = False
tile = None


def _multiply_panel(rows, room, row_block, panel, panel_bytes, k_padded, steps_per_pass, sums, more):
    """
    ``sums[:, :rows] = row_block @ panel``, a piece of K at a time so that the piece of the panel stays in cache.

    The operands are addresses; each half of `sums` has `room` rows. With `more`, the weights that follow this piece in
    memory are asked for meanwhile, each row block its share.
    """
    steps = k_padded // k_step
    step_bytes = panel_bytes // steps
    group_bytes = row_group * k_padded * item_bytes
    blocks = (rows + max_rows - 1) // max_rows
    share = (step_bytes + blocks - 1) // blocks
    if blocks == 1:  # no block comes back to the piece: read it in one go
        steps_per_pass = steps
    for step in range(0, steps, steps_per_pass):
        count = min(steps_per_pass, steps - step)
        piece = panel + step * step_bytes
        first_row = 0
        for block in range(blocks):
            if row_group == 1:  # blocks of almost one size
                block_rows = rows // blocks + (1 if block < rows % blocks else 0)
            else:
                block_rows = min(max_rows, rows - first_row)
            ahead, asked = piece, 0  # the piece is in the cache: asking for it costs nothing
            if more and (blocks == 1 or fetches_next):
                # one block of rows reads this piece as it comes from memory; several leave time to fetch the next
                ahead += ahead_bytes if blocks == 1 else count * (step_bytes + block * share)
                asked = share
            tile(
                block_rows,
                row_block + first_row // row_group * group_bytes + step * (group_bytes // steps),
                group_bytes,
                piece,
                count,
                sums + first_row * side_bytes,
                room * side_bytes,
                step,
                ahead,
                asked,
                0,
                0,
                0,
                0,
            )
            first_row += block_rows
