"""
Random numbers, and a read of all memory, on the GPU: two plain kernels that need no library beside CuPy.

    normal      out[i] of a normal distribution; the bits depend on the seed and i alone
    read_sum    the sum of all 32-bit words of an array, modulo 2**64: reads everything once, as fast as memory gives it
"""

import functools
from typing import Any

import numpy as np

from cumoe.bench.shapes import DTYPES, Shape

_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8

SOURCE = r"""
typedef unsigned int uint32;
typedef unsigned long long uint64;

// SplitMix64: consecutive counters give words without visible relation.
__device__ __forceinline__ uint64 mixed(uint64 x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

__device__ __forceinline__ void put(void* out, long long i, float x, int kind)
{
    if (kind == 0) {
        ((float*)out)[i] = x;
    } else {
        unsigned short code;
        if (kind == 1)
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(code) : "f"(x));
        else
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(code) : "f"(x));
        ((unsigned short*)out)[i] = code;
    }
}

// Box and Muller: two words make two normal numbers, at 2p and 2p + 1.
extern "C" __global__ void normal(void* out, long long count, float scale, uint64 seed, int kind)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    const uint64 key = mixed(seed);
    for (long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x; 2 * p < count; p += step) {
        const uint64 word = mixed(key ^ mixed((uint64)p));
        const float u = ((float)(uint32)(word >> 40) + 0.5f) * 5.9604644775390625e-8f;
        const float angle = (float)(uint32)(word & 0xFFFFFFull) * 3.7450704e-7f;
        const float radius = scale * sqrtf(-2.0f * logf(u));
        put(out, 2 * p, radius * cosf(angle), kind);
        if (2 * p + 1 < count) put(out, 2 * p + 1, radius * sinf(angle), kind);
    }
}

// Four independent loads a thread are under way at a time.
extern "C" __global__ __launch_bounds__(256, 4) void read_sum(const uint4* data, long long count, uint64* total)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    uint64 sum = 0;
#pragma unroll 1
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 words[4];
        for (int n = 0; n < 4; ++n)
            words[n] = i + n * step < count ? data[i + n * step] : uint4{0, 0, 0, 0};
        for (int n = 0; n < 4; ++n)
            sum += (uint64)words[n].x + words[n].y + words[n].z + words[n].w;
    }
    for (int other = 16; other > 0; other /= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
    if (threadIdx.x % 32 == 0) atomicAdd(total, sum);
}

extern "C" __global__ void nothing() {}
"""


@functools.cache
def _function(name: str) -> Any:
    import cupy as cp

    return cp.RawModule(code=SOURCE).get_function(name)


@functools.cache
def _blocks() -> int:
    import cupy as cp

    return _BLOCKS_PER_MULTIPROCESSOR * int(cp.cuda.Device().attributes["MultiProcessorCount"])


def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0, seed: int = 0) -> Any:
    """Draw a CuPy array of `dtype`, normal with deviation `scale`."""
    import cupy as cp

    stored = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    out = cp.empty(shape, stored)
    if out.size:
        arguments = (out, np.int64(out.size), np.float32(scale), np.uint64(seed), np.int32(_KINDS[dtype]))
        _function("normal")((_blocks(),), (_THREADS,), arguments)
    return out.view(DTYPES[dtype])


def weights(shape: Shape, dtype: str, seed: int = 0) -> tuple[Any, Any]:
    """Draw ``w1`` (E, 2I, H) and ``w2`` (E, H, I), normal with variance ``1 / H`` and ``1 / I``."""
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size
    w1 = normal((E, 2 * I, H), dtype, H**-0.5, 3 * seed)
    return w1, normal((E, H, I), dtype, I**-0.5, 3 * seed + 1)


def tokens(shape: Shape, num_tokens: int, dtype: str, seed: int = 0) -> Any:
    """Draw hidden states (T, H) of unit variance."""
    return normal((num_tokens, shape.hidden_size), dtype, 1.0, 3 * seed + 2)


def read_sum(words: Any, total: Any) -> None:
    """Add the sum of `words` (uint32, a multiple of 4 of them) to `total` (uint64, one)."""
    _function("read_sum")((_blocks(),), (_THREADS,), (words, np.int64(words.size // 4), total))


def nothing() -> None:
    """Launch a kernel that does nothing."""
    _function("nothing")((1,), (32,), ())
