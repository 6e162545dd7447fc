// numbers.cuh: 16- and 32-bit floats as numbers, and back with one rounding to nearest, ties to even.
//
//   load(code) -> float      store<X>(float) -> code
//
// Kernels see bit patterns: float32 is float, float16 and bfloat16 are types of two bytes that hold bits.
// Constants  X  element type of a kernel: float32, float16 or bfloat16, the names below

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

using float32 = float;
struct float16 {
    uint16 bits;
};
struct bfloat16 {
    uint16 bits;
};

__device__ __forceinline__ float load(float32 x) { return x; }
__device__ __forceinline__ float load(bfloat16 x) { return __uint_as_float((uint32)x.bits << 16); }
__device__ __forceinline__ float load(float16 x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T>
struct Store;
template <>
struct Store<float32> {
    static __device__ __forceinline__ float32 of(float x) { return x; }
};
template <>
struct Store<float16> {
    static __device__ __forceinline__ float16 of(float x)
    {
        float16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};
template <>
struct Store<bfloat16> {
    static __device__ __forceinline__ bfloat16 of(float x)
    {
        bfloat16 y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};
template <typename T>
__device__ __forceinline__ T store(float x)
{
    return Store<T>::of(x);
}

// What a number becomes when it is stored as T and read again.
template <typename T>
__device__ __forceinline__ float rounded(float x)
{
    return load(store<T>(x));
}

// Two numbers in one register, the first in the low half.
template <typename T>
struct Pair;
template <>
struct Pair<float16> {
    static __device__ __forceinline__ uint32 of(float low, float high)
    {
        uint32 y;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};
template <>
struct Pair<bfloat16> {
    static __device__ __forceinline__ uint32 of(float low, float high)
    {
        uint32 y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};
template <typename T>
__device__ __forceinline__ uint32 store_pair(float low, float high)
{
    return Pair<T>::of(low, high);
}

// The number in the low half of a register, and the one in the high half.
template <typename T>
__device__ __forceinline__ float load_low(uint32 pair)
{
    return load(T{(uint16)pair});
}
template <typename T>
__device__ __forceinline__ float load_high(uint32 pair)
{
    return load(T{(uint16)(pair >> 16)});
}
template <>
__device__ __forceinline__ float load_high<bfloat16>(uint32 pair)
{
    return __uint_as_float(pair & 0xFFFF0000);
}
