"""
Ragged matrix products: each expert's rows of activations times that expert's weights.

Work is cut into tasks (expert, up to 256 of its rows, some panels of its weights) that the threads take
one after the other from a shared counter, so that uneven routing and a busy core cost little. A task
writes outputs that no other task touches, and its sums run along K in one fixed order: the result does
not depend on the number of threads, on how rows are cut, or on the other rows.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from cumoe.cpu import (
    _amx,
    _indirect,
    _intrinsics,
    _tasks,
    coded_gemm,
    coded_panels,
    decoded_panel,
    microkernel,
    pack,
    panel_gemm,
)
from cumoe.cpu._jit import jit
from cumoe.cpu.epilogue import edge_size, epilogue, put_rows

_MAX_ROWS = 256  # of a task: enough products per weight to be bound by arithmetic
_MAX_ROWS_BYTES = 4 << 20  # of the gathered block of a task
_PANEL_BYTES = 128 << 10  # of a panel between two passes over the rows: it stays in the L2 cache


def grouped_gemm(
    x,
    permuted_idx,
    top_k,
    input_scale,
    weights,
    weight_format,
    expert_first_token_offset,
    bias,
    output_scale,
    row_factor,
    column_factor,
    activation,
    interleaved,
    alpha,
    beta,
    limit,
    dtype,
    kernel,
    schedule,
    block_rows,
    ahead,
    expanded,
    out,
):
    """
    ``out[r] = activation(((x[source(r)] * input_scale) @ weights[expert of r].T * factors + bias) * output_scale)``.

    Row r belongs to expert e where ``offset[e] <= r < offset[e + 1]`` and reads
    ``x[permuted_idx[r] // top_k]``, or ``x[r]`` if `top_k` is 0. The scales (T*k,) are indexed by pair,
    which is ``permuted_idx[r]``, or r if that is empty. Empty arrays mean: not there. `weights` is
    (E, N, K) or packed (`pack.panel_shape`), `activation` "" or a name of `act.SCALAR`;
    `dtype` names what the bits of `x`, `weights` and `out` mean; `x` is int8 where `takes_bytes` says so.

    With a `weight_format`, `weights` are codes, not packed, and the operand is what `formats.decode` makes of them.
    The factors are ``row_factor[source(r)] * column_factor[expert of r, row of the weights]``; `row_factor` is (rows
    of x,), `column_factor` (E, N), or (E, 1) for one that all rows of a matrix share. With ``weight_format.row_cols``
    `row_factor` is (rows of x, groups): it meets the sums of the groups, with the scales of the weights.

    Rows outside every expert are neither read nor written. The GPU side needs `schedule` and what lies around it.
    """
    kern, f = microkernel.choose(dtype, kernel), weight_format
    gated = bool(activation) and not activation.endswith("_no_mul")
    outputs = out.shape[1]
    order = pack.row_order(2 * outputs if gated else outputs, gated, interleaved)
    side = kern.columns // 2 if gated else kern.columns
    panels = -(-outputs // side)
    k = x.shape[1]
    made = None if f is None else coded_panels.layout(f, k, kern.name)
    in_parts = made is not None and made.in_parts
    k_padded = made.k_padded(k) if made else -(-k // kern.k_step) * kern.k_step
    row_dtype = np.uint16 if kern.row_dtype == "bfloat16" else np.float32
    row_bytes = coded_gemm.row_bytes(made, k, kern) if made else k_padded * row_dtype().itemsize
    most_rows = max(kern.max_rows, min(_MAX_ROWS, _MAX_ROWS_BYTES // row_bytes))
    most_rows = most_rows // kern.max_rows * kern.max_rows

    packed, coded = weights.ndim == 5 or (f is not None and f.panels is not None), f is not None
    rows_of_weights = decoded_panel.rows_of(weights, f, made is not None, out.itemsize)
    of_codes = decoded_panel.arguments(f)
    problem = _Problem(
        coded_gemm.multiplier(made, kern) if made else panel_gemm.multiplier(kern),
        coded_gemm.packer(made, f.rule, rows_of_weights, *of_codes[:2]) if made and not packed else 0,
        made.panel_bytes(k) if made else k_padded * kern.columns * out.itemsize,
        made.group if made else 0,
        x,
        permuted_idx,
        top_k,
        input_scale,
        weights if weights.ndim == 5 else _NO_PANELS[out.itemsize],
        rows_of_weights,
        *of_codes,
        bias,
        output_scale,
        _NO_FACTORS[0] if in_parts else row_factor,
        row_factor if in_parts else _NO_FACTORS[1],
        column_factor,
        *order[:3],
        side,
        k_padded,
        max(1, _PANEL_BYTES // kern.panel_step_bytes),
        np.float32(alpha),
        np.float32(beta),
        np.float32(limit),
        out,
    )
    panel_size = 0 if packed else -(-made.panel_bytes(k) // out.itemsize) if made else k_padded * kern.columns
    numbers = (1, coded_gemm.spread_bytes(made) // out.itemsize) if made else (kern.columns if coded else 0, k)

    def parts(rows):
        yield (-(-rows * row_bytes // row_dtype().itemsize),), row_dtype
        yield (1, *numbers), out.dtype
        yield (panel_size,), out.dtype
        yield (2, rows, kern.columns // 2), np.float32
        yield (rows * kern.columns,), out.dtype
        yield (edge_size(rows, kern.columns),), np.float32

    if made:
        worker = coded_gemm.worker(made, kern, dtype, activation)
    else:
        worker = _worker(kern, dtype, activation, decoded_panel.names(f))
    offsets, products = expert_first_token_offset, k_padded * kern.columns
    _tasks.run(worker, problem, offsets, most_rows, kern.row_group, panels, products, parts)


def expands(num_pairs, num_experts):
    """Whether codes become numbers once for all tiles: never, panels are decoded in the cache."""
    return False


def scales_parts(weight_format, row_cols, kernel):
    """Whether sums of parts of `row_cols` elements can meet factors of rows."""
    made = coded_panels.layout(weight_format, row_cols, kernel)
    return made is not None and made.group == row_cols


def takes_bytes(weight_format, k, kernel):
    """Whether rows of integers come as int8."""
    made = coded_panels.layout(weight_format, k, kernel)
    return made is not None and made.is_integer


def block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel):
    """Rows of a block in the list that `permute` makes; 0: this side needs no list."""
    return 0


def explain(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel, gated):
    """Lines that say which tiles a call uses and why; tasks are cut when the rows are known, so none."""
    return ()


class _Problem(NamedTuple):
    """What every task of a call shares."""

    multiply: int  # address of the code that multiplies rows with a panel
    pack: int  # and of that which packs a panel of codes, or 0
    panel_bytes: int
    group: int  # columns of a group of the codes, or 0
    x: Any
    permuted_idx: Any
    top_k: int
    input_scale: Any
    panels: Any  # packed weights, or empty
    weights: Any  # plain weights or codes, or empty
    scale: Any  # of the codes: decoded_panel.arguments
    zero_points: Any
    global_scale: Any
    group_rows: int
    group_cols: int
    bias: Any
    output_scale: Any
    row_factor: Any
    part_factor: Any  # by row of x and group, or empty
    column_factor: Any
    first_gate: int  # of a weight row: pack.row_order
    first_up: int
    distance: int
    side: int  # outputs of a panel
    k_padded: int
    steps_per_pass: int
    alpha: Any
    beta: Any
    limit: Any
    out: Any


_NO_FACTORS = np.empty(0, np.float32), np.empty((0, 0), np.float32)
_NO_PANELS = {size: np.empty((0, 0, 0, 0, 0), dtype) for size, dtype in ((4, "float32"), (2, "uint16"))}


@functools.cache
def _worker(kernel, dtype, activation, coded):
    """The compiled loop of one thread over tasks; `coded` is `decoded_panel.names`."""
    return jit(
        inner=True,
        pack_rows=pack.pack_rows(kernel, dtype),
        pack_panel=decoded_panel.pack_decoded(kernel, dtype, *coded) if coded else _pack_plain(kernel),
        finish=epilogue(activation, dtype, kernel.columns // 2, kernel.lanes),
        release=_amx.release if kernel.name == "amx" else _nothing,
    )(_work)


@functools.cache
def _pack_plain(kernel):
    return jit(inner=True, pack_one=pack.pack_panel(kernel))(_pack_plain_panel)


@jit(inner=True)
def _nothing():
    """The other kernels hold nothing to release."""


# ---- templates; jit(...) gives the names below their values ----

pack_one = pack_rows = pack_panel = finish = release = None


def _pack_plain_panel(problem, expert, panel, decoded, target):
    p = problem
    pack_one(p.weights, expert, panel, p.first_gate, p.first_up, p.distance, p.out.shape[1], target)


def _work(problem, tasks, counter, row_block, decoded, panel_block, sums, codes, edges):
    """Take tasks until none is left."""
    p = problem
    outputs = p.out.shape[1]
    room, rest = sums.shape[1], (p.panel_bytes, p.k_padded, p.steps_per_pass, sums.ctypes.data, p.panels.size > 0)
    while True:
        task = _intrinsics.next_task(counter)
        if task >= tasks.shape[0] or tasks[task, 2] == 0:
            break
        expert, row0, rows, first_panel = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
        pack_rows(p.x, p.permuted_idx, p.top_k, p.input_scale, row0, rows, p.k_padded, row_block)
        put_rows(p, edges, room, row0, rows)
        for panel in range(first_panel, first_panel + tasks[task, 4]):
            if p.panels.size:
                panel_address = np.int64(p.panels.ctypes.data) + (expert * p.panels.shape[1] + panel) * p.panel_bytes
            else:
                pack_panel(p, expert, panel, decoded, panel_block)
                panel_address = np.int64(panel_block.ctypes.data)
            _indirect.call(p.multiply, (rows, room, row_block.ctypes.data, panel_address, *rest))
            width = min(p.side, outputs - panel * p.side)
            finish(p, sums, codes, edges, expert, row0, rows, panel * p.side, width)
    release()
