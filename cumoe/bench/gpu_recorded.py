"""
Times of other libraries on one NVIDIA H200, recorded under the protocol of this suite.

vLLM 0.25.1, its Triton kernels in bfloat16 with its tuned table for the H200 where it has one, and torch 2.11
`grouped_mm` in bfloat16 with torch's own sort, gather, activation and sum: the whole expert computation from given
`topk_weights` and `topk_ids` in one CUDA graph, 256 MB written before each replay, CUDA events, median of 20,
uniform random routing, checked against float32. The single operations are vLLM's C++ kernels, for the shape
qwen3-30b-a3b. They stand in for the libraries where those are not installed.
"""

DEVICE = "NVIDIA H200"  # as CuPy names it
VLLM, GROUPED_MM = "vLLM 0.25.1 Triton", "torch 2.11 grouped_mm"
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)

# shape -> library -> milliseconds for each of TOKENS
_LAYER_MS: dict[str, dict[str, tuple[float, ...]]] = {
    "mixtral-8x7b": {
        VLLM: (0.194, 0.586, 0.674, 0.758, 1.572, 5.179, 21.18),
        GROUPED_MM: (0.327, 1.138, 1.057, 1.055, 1.710, 5.407, 21.22),
    },
    "qwen3-30b-a3b": {
        VLLM: (0.042, 0.142, 0.306, 0.337, 0.397, 0.790, 2.621),
        GROUPED_MM: (0.094, 0.244, 0.481, 0.512, 0.662, 1.424, 4.799),
    },
    "qwen3-next": {
        VLLM: (0.041, 0.141, 0.539, 0.768, 0.842, 1.079, 2.865),
        GROUPED_MM: (0.096, 0.242, 0.843, 1.144, 1.321, 1.965, 5.813),
    },
    "dsv3-ep": {
        VLLM: (0.193, 0.578, 0.688, 0.829, 1.745, 6.578, 24.86),
        GROUPED_MM: (0.335, 0.989, 1.044, 1.098, 2.120, 6.865, 27.12),
    },
    "dsv3-tp8": {
        VLLM: (0.065, 0.203, 0.663, 0.741, 0.916, 1.439, 4.299),
    },
}

# shape -> T -> experts that the recorded routing hit, from the bytes that its fraction of the floor tells; where T is
# larger every draw hits nearly all, where it is 1 every draw hits k
_EXPERTS_HIT: dict[str, dict[int, int]] = {
    "mixtral-8x7b": {8: 7, 64: 8},
    "qwen3-30b-a3b": {8: 52, 64: 126},
    "qwen3-next": {8: 76, 64: 358},
    "dsv3-ep": {8: 27, 64: 32},
    "dsv3-tp8": {8: 59, 64: 221},
}

OPERATION_TOKENS = (1, 64, 1024, 16384)

# operation -> (what was timed, microseconds for each of OPERATION_TOKENS)
_OPERATIONS_US: dict[str, tuple[str, tuple[float, ...]]] = {
    "route": ("topk_softmax", (6.6, 7.9, 10.6, 44.0)),
    "sort": ("moe_align_block_size", (7.3, 7.5, 12.2, 83.0)),
    "align": ("moe_align_block_size", (7.3, 7.5, 12.2, 83.0)),
    "act": ("silu_and_mul", (4.5, 5.2, 14.1, 142.0)),
    "sum": ("moe_sum", (4.7, 5.6, 15.5, 145.0)),
    "unpermute": ("moe_sum", (4.7, 5.6, 15.5, 145.0)),
}


def best_layer(device: str, shape: str, dtype: str, num_tokens: int) -> tuple[str, float] | None:
    """Library and microseconds of the fastest one for a case, or None where nothing was recorded."""
    if device != DEVICE or dtype != "bfloat16" or num_tokens not in TOKENS or shape not in _LAYER_MS:
        return None
    times = {name: 1e3 * values[TOKENS.index(num_tokens)] for name, values in _LAYER_MS[shape].items()}
    name = min(times, key=lambda one: times[one])
    return name, times[name]


def experts_hit(shape: str, num_tokens: int) -> int | None:
    """How many experts the routing of a recorded case hit, where that varies from draw to draw."""
    return _EXPERTS_HIT.get(shape, {}).get(num_tokens)


def operation(device: str, shape: str, name: str, num_tokens: int) -> tuple[str, float] | None:
    """What was timed and its microseconds for one operation, or None where nothing was recorded."""
    if device != DEVICE or shape != "qwen3-30b-a3b" or num_tokens not in OPERATION_TOKENS or name not in _OPERATIONS_US:
        return None
    what, values = _OPERATIONS_US[name]
    return f"vLLM 0.25.1 {what}", values[OPERATION_TOKENS.index(num_tokens)]
