"""Layers on the GPU at sizes that the host cannot compute in a test: sampled tokens against the float64 law."""

import numpy as np
import pytest
from sides import gpu

import cumoe

# T, k, E, H, I, dtype: what is large about it
LAYERS = {
    "40000 tokens": (40_000, 8, 64, 1024, 768, "bfloat16"),
    "T*k*H beyond 2**31": (40_000, 8, 16, 7168, 256, "bfloat16"),
    "T*k*I beyond 2**31": (40_000, 8, 16, 256, 7168, "bfloat16"),
    "T*k*2I beyond 2**31 in float16": (33_000, 8, 9, 136, 8200, "float16"),
    "T*k*H beyond 2**31, odd": (40_001, 9, 16, 6001, 33, "bfloat16"),
    "float32": (20_000, 4, 16, 1000, 500, "float32"),
    "one expert": (5000, 1, 1, 2048, 1408, "bfloat16"),
    "one expert, few tokens": (33, 1, 1, 72, 40, "float16"),
    "1024 experts": (4096, 8, 1024, 256, 128, "bfloat16"),
    "1024 experts, few tokens": (5, 8, 1024, 256, 128, "bfloat16"),
    "every expert for every token": (300, 64, 64, 512, 256, "bfloat16"),
    "1024 experts, all of them": (20, 1024, 1024, 128, 64, "bfloat16"),
    "weights beyond 2**31": (64, 4, 1100, 2048, 1024, "bfloat16"),
    "a token of a wide layer": (1, 8, 256, 7168, 2048, "bfloat16"),
}


def device_bytes(num_tokens, top_k, num_experts, hidden_size, intermediate_size, dtype):
    """Everything that a test holds at once, with the numbers that the weights are drawn from."""
    item = np.dtype(dtype).itemsize
    weights = 3 * num_experts * hidden_size * intermediate_size * item
    return weights + num_tokens * (top_k + 3) * (hidden_size + intermediate_size) * item + (1 << 30)


def drawn(xp, shape, scale, dtype, seed):
    """Normal numbers on the device; each matrix is a window of its own into one pool of them."""
    rng = xp.random.RandomState(seed)
    count, length = (shape[0], int(np.prod(shape[1:]))) if len(shape) == 3 else (1, int(np.prod(shape)))
    pool = (rng.standard_normal(min(length, 1 << 25) + 4096, np.float32) * np.float32(scale)).astype(np.dtype(dtype))
    pool = pool.view(f"u{pool.itemsize}")  # which CuPy copies and repeats, whatever they mean
    out = xp.empty((count, length), pool.dtype)
    for row, start in enumerate(np.random.default_rng(seed).integers(0, 4096, count)):
        window = pool[int(start) :]
        out[row] = window[:length] if length <= len(window) else xp.resize(window, length)
    return out.reshape(shape).view(np.dtype(dtype))


def choices(xp, num_tokens, top_k, num_experts):
    """Distinct experts for each token, and their weights."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(min(num_tokens, 997))]).astype(np.int32)
    ids = np.resize(ids, (num_tokens, top_k))
    weights = rng.random((num_tokens, top_k), np.float32) + np.float32(0.1)
    return xp.asarray(weights / weights.sum(axis=1, keepdims=True)), xp.asarray(ids)


@pytest.mark.parametrize("name", LAYERS)
def test_sampled_tokens_equal_the_reference(name):
    xp = gpu()
    num_tokens, top_k, num_experts, hidden_size, intermediate_size, dtype = LAYERS[name]
    xp.get_default_memory_pool().free_all_blocks()
    if xp.cuda.Device().mem_info[0] < device_bytes(*LAYERS[name]):
        pytest.skip("the device has too little free memory")
    x = drawn(xp, (num_tokens, hidden_size), 1.0, dtype, 1)
    w1 = drawn(xp, (num_experts, 2 * intermediate_size, hidden_size), hidden_size**-0.5, dtype, 2)
    w2 = drawn(xp, (num_experts, hidden_size, intermediate_size), intermediate_size**-0.5, dtype, 3)
    weights, ids = choices(xp, num_tokens, top_k, num_experts)
    out = cumoe.fused_experts(x, w1, w2, weights, ids)
    sample = 3 if top_k > 100 else 8
    found = cumoe.verify(out, x, w1, w2, weights, ids, sample=sample)
    assert found.ok, str(found)
    assert found.rms_error < (2e-5 if dtype == "float32" else 2e-2)
    ends = xp.asarray([0, num_tokens - 1])  # the first and the last token, alone
    alone = cumoe.fused_experts(
        x.view(f"u{x.itemsize}")[ends].view(x.dtype), w1, w2, weights[ends], ids[ends].astype(np.int64)
    )
    assert cumoe.verify(alone, x.view(f"u{x.itemsize}")[ends].view(x.dtype), w1, w2, weights[ends], ids[ends]).ok
    assert alone.tobytes() == out.view(f"u{x.itemsize}")[ends].tobytes()
    xp.get_default_memory_pool().free_all_blocks()
