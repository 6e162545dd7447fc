"""Ragged matrix products as a function of their own."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array
from cumoe._kernel_choice import choose_kernel, rows_are_aligned

_DTYPES = ("float32", "float16", "bfloat16")


@_arrays.on_callers_stream
def grouped_gemm(
    a: Array,
    b: Array,
    group_offsets: Array,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """
    Multiply each group of rows by its own matrix: ``out[r] = b[g] @ a[r] + bias[g]``.

    Parameters
    ----------
    a : (M, K) array, float32, float16 or bfloat16
        Rows, one group after the other.
    b : (G, N, K) array
        One matrix per group, of the dtype of `a`; K is the inner axis.
    group_offsets : (G + 1,) array, int32 or int64
        Group g has the rows ``group_offsets[g] <= r < group_offsets[g + 1]``. Ascending, on the side
        of `a`.
    bias : (G, N) array, float32, float16 or bfloat16, optional
        Added in float32.
    out : (M, N) array, optional
        Written and returned if given; C-contiguous, must not share memory with the inputs.
    backend : str, optional
        Name of the kernel, as in `fused_experts`; default: the fastest.

    Returns
    -------
    out : (M, N) array, dtype of `a`
        Rows outside every group are zero, or as they were in a given `out`.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape that does not fit; offsets (of host arrays) that do not ascend within 0..M.
    NotImplementedError
        A `backend` that cannot run here.

    Notes
    -----
    Summed in float32 along K in one fixed order, rounded once: a row's bits depend on that row and its
    matrix only. Offsets of device arrays are not looked at, which would mean to wait.

    References
    ----------
    .. [1] DeepGEMM, ``m_grouped_gemm_nt_contiguous``; torch ``grouped_mm``; JAX ``ragged_dot``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> a = np.arange(6, dtype="float32").reshape(3, 2)
    >>> b = np.stack([np.eye(2), 10 * np.eye(2)]).astype("float32")
    >>> cumoe.grouped_gemm(a, b, np.array([0, 1, 3]))
    array([[ 0.,  1.],
           [20., 30.],
           [40., 50.]], dtype=float32)
    """
    side, (a, b, group_offsets, bias, out) = _arrays.enter(a=a, b=b, group_offsets=group_offsets, bias=bias, out=out)
    _check.ndim("a", a, "(M, K)", 2)
    _check.ndim("b", b, "(G, N, K)", 3)
    _check.dtype("a", a, _DTYPES)
    _check.same_dtype("b", b, "a", a)
    groups, n, k = b.shape
    m = len(a)
    _check.shape("a", a, "(M, K)", (m, k))
    if min(groups, n, k) < 1:
        raise ValueError(f"b must have G, N, K >= 1, got shape {tuple(b.shape)}")
    _check.dtype("group_offsets", group_offsets, ("int32", "int64"))
    _check.shape("group_offsets", group_offsets, "(G + 1,)", (groups + 1,))
    _check_offsets(group_offsets, m)
    if bias is not None:
        _check.shape("bias", bias, "(G, N)", (groups, n))
        _check.dtype("bias", bias, _DTYPES)
    xp, dtype = side.xp, a.dtype.name
    if out is None:
        out = xp.zeros((m, n), a.dtype)
    else:
        _check.output("out", out, "(M, N)", (m, n), dtype, a=a, b=b, bias=bias)
    if m == 0:
        return side.leave(out)
    a, b, offsets, bits = _arrays.bits(a), _arrays.bits(b), _offsets(group_offsets), _arrays.bits(out)
    kernel = choose_kernel(xp, backend, dtype, k, n, xp is np or rows_are_aligned(a, b, bits))
    room, permute = _arrays.room(xp, "grouped_gemm"), _arrays.room(xp, "permute")
    block_rows = room.block_rows(m, groups, k, n, dtype, 0, False, kernel)
    schedule = xp.empty(permute.schedule_size(m, groups, block_rows), np.int32)
    permute.list_tiles(offsets, schedule, block_rows)
    nothing, no_matrix = xp.empty(0, np.float32), xp.empty((0, 0), np.float32)
    room.grouped_gemm(
        a,
        xp.empty(0, np.int32),
        0,
        nothing,
        b,
        None,
        offsets,
        no_matrix if bias is None else _arrays.bits(bias.astype(np.float32, copy=False)),
        nothing,
        nothing,
        no_matrix,
        "",
        False,
        0.0,
        0.0,
        0.0,
        dtype,
        kernel,
        schedule,
        block_rows,
        False,
        no_matrix,
        bits,
    )
    return side.leave(out)


def _offsets(group_offsets: Array) -> Array:
    return _arrays.bits(group_offsets.astype(np.int64, copy=False))


def _check_offsets(offsets: Any, rows: int) -> None:
    """Refuse offsets that would reach outside the rows; device values are trusted, reading them would wait."""
    if not isinstance(offsets, np.ndarray):
        return
    values = offsets.astype(np.int64)
    bad = np.flatnonzero((values < 0) | (values > rows) | (np.diff(values, prepend=values[:1]) < 0))
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"group_offsets must ascend within 0..M = 0..{rows}, got {int(values[i])} at index {i}")
