"""
The same layer by ggml, the library of llama.cpp, in four-bit formats of its own.

Its formats have blocks of 32 numbers, or of 256 with scales within scales, and tokens are rounded to eight bits inside.
The weights are quantised by ggml from the numbers that the codes of cumoe stand for, so a result is held against the
layer of ggml's own numbers. Buffers are of the type that packs rows for vector instructions, as llama.cpp's are.
"""

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe.bench import schemes
from cumoe.bench.peers import Array, Layer, Peer

_GRAPH_BYTES = 1 << 20  # descriptions of tensors and operations, not their numbers


def _type(name: str) -> Any:
    import ggml

    return getattr(ggml, f"GGML_TYPE_{name.upper()}")


def _load() -> str:
    try:
        import ggml  # noqa: F401
    except (ImportError, OSError, RuntimeError) as problem:
        return f"ggml does not load: {problem}"
    return "" if _packing_buffer() else "this ggml packs no weights for this CPU"


def _packing_buffer() -> Any:
    """The type of buffer that packs weights for this CPU, or None."""
    import ggml

    device = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    found = extra(device)
    names = {}
    for i in range(16):
        if not found[i]:
            break
        names[ggml.ggml_backend_buft_name(found[i])] = found[i]
    return names.get(b"CPU_REPACK")


def _quantised(w: Any, name: str) -> Array:
    """Bytes (E, N, row) of ggml's format."""
    import ggml

    numbers, kind = schemes.numbers(w), _type(name)
    experts, rows, columns = numbers.shape
    block = ggml.ggml_blck_size(kind)
    if columns % block:
        raise ValueError(f"H and I must be multiples of {block}, got {columns}")
    out = np.empty((experts, rows, ggml.ggml_row_size(kind, columns)), np.uint8)
    for e in range(experts):
        one = np.ascontiguousarray(numbers[e], np.float32)
        source = one.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(kind, source, ctypes.c_void_p(out[e].ctypes.data), 0, rows, columns, None)
    return out


class _Numbers:
    """What the bytes of ggml's format stand for, one expert at a time."""

    def __init__(self, quantised: Array, shape: tuple[int, int, int], name: str) -> None:
        self._quantised, self.shape, self._name = quantised, shape, name

    def __getitem__(self, expert: int) -> Array:
        import ggml

        out = np.empty(self.shape[1:], np.float32)
        decode = ggml.ggml_get_type_traits(_type(self._name)).contents.to_float
        target = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        decode(ctypes.c_void_p(self._quantised[expert].ctypes.data), target, out.size)
        return out


class _GgmlLayer:
    """The layer with its weights packed once, and a graph for each number of tokens that comes."""

    def __init__(self, w1: Any, w2: Any, name: str) -> None:
        import ggml

        shapes = schemes.numbers(w1).shape, schemes.numbers(w2).shape
        quantised = [_quantised(w, name) for w in (w1, w2)]
        self.numbers = tuple(_Numbers(one, shape, name) for one, shape in zip(quantised, shapes, strict=True))
        self._backend = ggml.ggml_backend_cpu_init()
        context = _context()
        self._weights = [ggml.ggml_new_tensor_3d(context, _type(name), k, n, e) for e, n, k in shapes]
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, _packing_buffer())
        self._graphs: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._owned = [(ggml.ggml_backend_buffer_free, buffer), (ggml.ggml_free, context)]
        weakref.finalize(self, _release, self._owned, self._backend)
        for tensor, one in zip(self._weights, quantised, strict=True):
            ggml.ggml_backend_tensor_set(tensor, ctypes.c_void_p(one.ctypes.data), 0, one.nbytes)

    def __call__(self, hidden_states: Array, topk_weights: Array, topk_ids: Array) -> Array:
        import ggml
        import numba

        num_tokens, top_k = topk_ids.shape
        if (num_tokens, top_k) not in self._graphs:
            self._graphs[num_tokens, top_k] = self._graph(num_tokens, top_k, hidden_states.shape[1])
        graph, out, *inputs = self._graphs[num_tokens, top_k]
        given = hidden_states.astype(np.float32), topk_weights, topk_ids
        for tensor, array in zip(inputs, given, strict=True):
            ggml.ggml_backend_tensor_set(tensor, ctypes.c_void_p(array.ctypes.data), 0, array.nbytes)
        ggml.ggml_backend_cpu_set_n_threads(self._backend, numba.get_num_threads())
        if ggml.ggml_backend_graph_compute(self._backend, graph) != ggml.GGML_STATUS_SUCCESS:
            raise RuntimeError("ggml did not compute its graph")
        result = np.empty(hidden_states.shape, np.float32)
        ggml.ggml_backend_tensor_get(out, ctypes.c_void_p(result.ctypes.data), 0, result.nbytes)
        return result.astype(hidden_states.dtype)

    def _graph(self, num_tokens: int, top_k: int, hidden: int) -> tuple[Any, ...]:
        """The operations of llama.cpp's experts, with their buffers: graph, result, inputs."""
        import ggml

        context = _context()
        x = ggml.ggml_new_tensor_3d(context, ggml.GGML_TYPE_F32, hidden, 1, num_tokens)
        factors = ggml.ggml_new_tensor_3d(context, ggml.GGML_TYPE_F32, 1, top_k, num_tokens)
        ids = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_I32, top_k, num_tokens)
        for tensor in (x, factors, ids):
            ggml.ggml_set_input(tensor)
        w1, w2 = self._weights
        h = ggml.ggml_swiglu(context, ggml.ggml_mul_mat_id(context, w1, x, ids))
        y = ggml.ggml_mul(context, ggml.ggml_mul_mat_id(context, w2, h, ids), factors)
        strides = y.contents.nb
        parts = (ggml.ggml_view_2d(context, y, hidden, num_tokens, strides[2], j * strides[1]) for j in range(top_k))
        out = functools.reduce(functools.partial(ggml.ggml_add, context), parts)
        if top_k == 1:
            out = ggml.ggml_cont(context, out)
        ggml.ggml_set_output(out)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        allocator = ggml.ggml_gallocr_new(ggml.ggml_backend_get_default_buffer_type(self._backend))
        self._owned += [(ggml.ggml_gallocr_free, allocator), (ggml.ggml_free, context)]
        if not ggml.ggml_gallocr_alloc_graph(allocator, graph):
            raise MemoryError("ggml has no memory for its graph")
        return graph, out, x, factors, ids


def _context() -> Any:
    import ggml

    return ggml.ggml_init(ggml.ggml_init_params(mem_size=_GRAPH_BYTES, mem_buffer=None, no_alloc=True))


def _release(owned: list[tuple[Callable[[Any], None], Any]], backend: Any) -> None:
    import ggml

    for free, thing in owned:
        free(thing)
    ggml.ggml_backend_free(backend)


def _maker(name: str) -> Callable[[Any, Any], Layer]:
    return lambda w1, w2: _GgmlLayer(w1, w2, name)


def _copied_twice(scheme: str) -> float:
    return 2.4  # packed, and as the check reads them; up to 4.5 bits a number


PEERS: tuple[Peer, ...] = tuple(
    Peer(
        f"ggml {name}",
        f"MUL_MAT_ID of ggml on {name} weights, tokens in eight bits",
        ("ggml", "numba"),
        ("int4 w4a8", "int4 w4a16"),
        _maker(name),
        _copied_twice,
        load=_load,
        rounds_activations=True,
    )
    for name in ("q4_0", "q4_K")
)
