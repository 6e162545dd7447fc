"""Launches dense_route.cu: router weights as a dense table and as choices."""

from cumoe.rawkernels import _load, _rows


def topk_from_dense(router_weights, dtype, topk_weights, topk_ids):
    """As the twin in cumoe.cpu.dense_route, on the current stream."""
    _launch("topk_from_dense", dtype, topk_ids, (router_weights, topk_weights, topk_ids), router_weights.shape[1])


def dense_from_topk(topk_weights, topk_ids, dtype, out):
    """As the twin in cumoe.cpu.dense_route, on the current stream."""
    _launch("dense_from_topk", dtype, topk_ids, (topk_weights, topk_ids, out), out.shape[1])


def _launch(name, dtype, topk_ids, arrays, num_experts):
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return
    kernel = _load.kernel("dense_route.cu", name, **_constants(dtype, _rows.c_type(topk_ids)))
    kernel(_rows.blocks(num_tokens), _rows.BLOCK, *arrays, num_tokens, num_experts, top_k, overlap=True)


def variants(arch):
    """All that there are."""
    for dtype in ("bfloat16", "float16", "float32"):
        for ids in ("int", "int64"):
            for name in ("topk_from_dense", "dense_from_topk"):
                yield "dense_route.cu", name, _constants(dtype, ids)


def _constants(dtype, ids):
    return {"X": dtype, "ID": ids, "WARPS": _rows.WARPS}
