// small_floats.cuh: floats of 8 and 4 bits as numbers, and back: nearest, ties to even, the largest beyond.
//
//   e4m3(float) -> code, e2m1(float) -> code      from_e4m3(code), from_e2m1(code), from_e8m0(code) -> float
//
// Codes are the low bits of a uint32. NaN is 0x7F in e4m3, 0 in e2m1, which has none, 255 in e8m0.

// The nearest code of a float of 1 + EXPONENT + MANTISSA bits, ties to even, the largest beyond; NaN becomes NAN_CODE.
template <int EXPONENT, int MANTISSA, uint32 LARGEST, uint32 NAN_CODE>
__device__ __forceinline__ uint32 small_float(float x)
{
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, DROPPED = 23 - MANTISSA;
    constexpr uint32 SMALLEST_NORMAL = (uint32)(128 - BIAS) << 23; // 2**(1 - BIAS)
    const uint32 u = __float_as_uint(x), sign = u >> 31 << (EXPONENT + MANTISSA);
    uint32 size = u & 0x7FFFFFFF;
    const bool is_nan = size > 0x7F800000;
    size = size < LARGEST ? size : LARGEST;
    const uint32 rebased = size - ((uint32)(127 - BIAS) << 23), odd = rebased >> DROPPED & 1;
    const uint32 normal = (rebased + ((1u << (DROPPED - 1)) - 1) + odd) >> DROPPED;
    // the step of subnormals is that of float32 at 2**(24 - BIAS - MANTISSA): the addition rounds
    constexpr uint32 SAME_STEP = (uint32)(151 - BIAS - MANTISSA) << 23;
    const float shifted = __fadd_rn(__uint_as_float(size), __uint_as_float(SAME_STEP));
    const uint32 code = sign | (size < SMALLEST_NORMAL ? __float_as_uint(shifted) - SAME_STEP : normal);
    return is_nan ? NAN_CODE : code;
}

__device__ __forceinline__ uint32 e4m3(float x)
{
#if __CUDA_ARCH__ >= 890
    uint16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return pair;
#else
    return small_float<4, 3, 0x43E00000, 0x7F>(x);
#endif
}

__device__ __forceinline__ uint32 e2m1(float x) { return small_float<2, 1, 0x40C00000, 0>(x); }

// In the place of float32's exponent and mantissa the bits stand for the number over 2**(127 - bias), subnormals too.
__device__ __forceinline__ float from_e4m3(uint32 code)
{
    const float y = __uint_as_float((code & 0x80) << 24 | (code & 0x7F) << 20) * 0x1p120f;
    return (code & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000) : y;
}

__device__ __forceinline__ float from_e2m1(uint32 code)
{
    return __uint_as_float((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
}

__device__ __forceinline__ float from_e8m0(uint32 code)
{
    return __uint_as_float(code == 0 ? 0x00400000 : code == 255 ? 0x7FC00000 : code << 23);
}
