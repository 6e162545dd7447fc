"""Launches unpermute.cu: the rows that belong to a token added up, back in token order."""

from cumoe.rawkernels import _load

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_INDEX = {"int32": "int", "int64": "int64", "uint32": "uint32"}
_MOST_THREADS, _LEAST_THREADS, _WARP = 256, 64, 32
_MOST_PARTS = 65_535
_MOST_TOGETHER = 10  # rows on their way at once: 16 bytes of each in registers


def unpermute(y, topk_weights, inv_permuted_idx, out, dtype, expert_first_token_offset=None):
    """
    Write ``out`` (T, H) from the rows of ``y`` (R, >= H), whose inner axis is contiguous.

    `topk_weights` is float32 (T, k), or None to add the rows unweighted. `inv_permuted_idx` (T, k) is
    int32 or int64; a choice whose row is outside 0..R-1, or at or after the last of
    `expert_first_token_offset`, is skipped. `dtype` names what the bits of `y` and `out` mean: float32,
    bfloat16 or float16.
    """
    if out.size == 0:
        return
    constants = _constants(dtype, inv_permuted_idx.dtype.name, topk_weights is not None, inv_permuted_idx.shape[1])
    constants["BYTES"] = _width(out, y.data.ptr, y.strides[0])
    grid, threads = _grid(out, constants["BYTES"])
    _load.kernel("unpermute.cu", "unpermute", **constants)(
        grid,
        threads,
        y,
        inv_permuted_idx,
        topk_weights,
        None if expert_first_token_offset is None else expert_first_token_offset[-1:],
        out,
        y.shape[0],
        y.strides[0] // y.itemsize,
        out.shape[1],
        inv_permuted_idx.shape[1],
        overlap=True,
    )


def weighted_sum(x, topk_weights, topk_ids, expert_map, out, dtype, keep):
    """
    Write ``out`` (T, H), the sum over the choices of ``x`` (T, k, H), which may have any strides.

    `topk_weights` is float32 (T, k), or None for ones. With `topk_ids` (T, k), a choice is skipped whose
    id is < 0 or, where `expert_map` (E,) has entries, outside 0..E-1 or mapped below 0. A token without
    any choice left becomes 0, or keeps what `out` holds if `keep`.
    """
    if out.size == 0:
        return
    index = "int32" if topk_ids is None else topk_ids.dtype.name
    constants = _constants(dtype, index, topk_weights is not None, x.shape[1])
    strides = tuple(stride // x.itemsize for stride in x.strides)
    if strides[2] == 1 or x.shape[2] == 1:
        constants["BYTES"] = _width(out, x.data.ptr, *x.strides[:2])
    else:
        constants["BYTES"] = x.itemsize
    grid, threads = _grid(out, constants["BYTES"])
    _load.kernel("unpermute.cu", "weighted_sum", **constants)(
        grid,
        threads,
        x,
        topk_ids,
        expert_map if expert_map.size else None,
        topk_weights,
        out,
        expert_map.size,
        *strides,
        out.shape[1],
        x.shape[1],
        int(keep),
        overlap=True,
    )


def variants(arch):
    """The kernels of a layer's last step, and of sums with weights, for rows that allow wide loads."""
    for dtype in _ITEMSIZE:
        for top_k in (1, 2, 4, 6, 8, 10):
            yield "unpermute.cu", "unpermute", _constants(dtype, "int32", False, top_k) | {"BYTES": 16}
        yield "unpermute.cu", "weighted_sum", _constants(dtype, "int32", False, 2) | {"BYTES": 16}
        yield "unpermute.cu", "weighted_sum", _constants(dtype, "int32", True, 8) | {"BYTES": 16}


def _constants(dtype, index, weighted, top_k):
    together = max(1, top_k) if top_k <= _MOST_TOGETHER else 8  # beyond: a divisor of the warp, see the kernel
    return {"X": dtype, "INDEX": _INDEX[index], "WEIGHTED": int(weighted), "TOGETHER": together}


def _width(out, *others):
    """Bytes of a load: the most that divides every address and stride of `out`, and each number of `others`."""
    width = 16
    for number in (out.data.ptr, out.shape[1] * out.itemsize, *others):
        while number % width:
            width //= 2
    return width


def _grid(out, width):
    """Grid (tokens, parts) and threads of a block: whole warps, small blocks where there are few tokens."""
    import cupy as cp

    num_tokens, columns = out.shape
    pieces = columns * out.itemsize // width
    wanted = 2 * _load.multiprocessors(cp.cuda.runtime.getDevice())
    threads = _MOST_THREADS
    while threads > _LEAST_THREADS and num_tokens * -(-pieces // threads) < wanted:
        threads //= 2
    parts = min(_MOST_PARTS, -(-pieces // threads))
    threads = min(_MOST_THREADS, -(-pieces // (_WARP * parts)) * _WARP)
    return (num_tokens, parts), threads
