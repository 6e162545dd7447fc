// format_rules.cuh: rules of the quantisers, one number at a time: scale of a group, code of a number, number of a code.
//
//   scale_rules::RULE(low, high, limit)         -> the scale, or its code
//   encoders::RULE::prepare(scale, global)      -> p; code(x, p, zero) -> the code
//   decoders::RULE::prepare(scale, global)      -> p; number(code, p, zero) -> the number
//
// Names and rules are those of cpu/format_rules.py, the law is reference/formats.py: the same bits. So every operation is
// rounded to float32 by itself: products that an addition follows are __fmul_rn, which is never merged with it, and
// division is the exact one, or one with the same codes.

constexpr float SMALLEST_AMAX = 1e-10f;
constexpr float SMALLEST_FP8_SCALE = 1.0f / (448 * 512);
constexpr float ROUND = 12582912.0f; // 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low bits

// ---- scale of a group from its extremes; `limit` is a number that the rule may need ----

__device__ __forceinline__ float limit_of(const float* limits, int64 i) // null: there is none
{
    return limits == nullptr ? __uint_as_float(0x7F800000) : limits[i];
}

__device__ __forceinline__ float at_least(float x, float smallest) { return x > smallest ? x : smallest; }

namespace scale_rules
{

__device__ __forceinline__ float amax(float low, float high) { return -low > high ? -low : high; } // never -0

__device__ __forceinline__ float power_of_two(float s)
{
    return __uint_as_float((__float_as_uint(s) + 0x007FFFFF) & 0xFF800000);
}

// One for a tensor or a token; `limit` is scale_ub.
__device__ __forceinline__ float fp8(float low, float high, float limit)
{
    const float size = amax(low, high);
    return at_least((size > limit ? limit : size) / 448.0f, SMALLEST_FP8_SCALE);
}
__device__ __forceinline__ float fp8_ue8m0(float low, float high, float limit)
{
    return power_of_two(fp8(low, high, limit));
}

__device__ __forceinline__ float fp8_group(float low, float high, float limit)
{
    return at_least(amax(low, high), SMALLEST_AMAX) / 448.0f;
}
__device__ __forceinline__ float fp8_group_ue8m0(float low, float high, float limit)
{
    return power_of_two(fp8_group(low, high, limit));
}

__device__ __forceinline__ float int8(float low, float high, float limit)
{
    return at_least(amax(low, high), SMALLEST_AMAX) / 127.0f;
}

// Of int4 and uint8 `limit` is the smallest number of the stored dtype.
__device__ __forceinline__ float int4(float low, float high, float limit)
{
    return at_least(at_least(at_least(high, SMALLEST_AMAX) / 7.0f, low / -8.0f), limit);
}
__device__ __forceinline__ float uint8(float low, float high, float limit)
{
    return at_least(int8(low, high, limit), limit);
}

// (high - low) / most, halved so that it cannot overflow.
__device__ __forceinline__ float between(float low, float high, float half_of_most, float limit)
{
    const float half = __fsub_rn(__fmul_rn(high, 0.5f), __fmul_rn(low, 0.5f));
    return at_least(at_least(half, 0.5e-10f) / half_of_most, limit);
}
__device__ __forceinline__ float int4_zero_points(float low, float high, float limit)
{
    return between(low, high, 7.5f, limit);
}
__device__ __forceinline__ float uint8_zero_points(float low, float high, float limit)
{
    return between(low, high, 127.5f, limit);
}

// Codes of e8m0.
__device__ __forceinline__ uint32 mxfp4(float low, float high, float limit)
{
    const uint32 field = (__float_as_uint(amax(low, high)) + 0x200000) >> 23;
    return field > 2 ? field - 2 : 0;
}
__device__ __forceinline__ uint32 mxfp8(float low, float high, float limit)
{
    const uint32 field = (__float_as_uint(amax(low, high)) + 0x1FFFFF) >> 23; // 448 is 1.75 * 2**8
    return field > 8 ? field - 8 : 0;
}

// The code of e4m3; `limit` is the global scale.
__device__ __forceinline__ uint32 nvfp4(float low, float high, float limit)
{
    return e4m3(__fmul_rn(limit, amax(low, high)) / 6.0f);
}
__device__ __forceinline__ float nvfp4_global(float low, float high, float limit)
{
    return 2688.0f / at_least(amax(low, high), SMALLEST_AMAX);
}

} // namespace scale_rules

// ---- integers ----

// Within the two edges; 0 for NaN.
__device__ __forceinline__ float cut(float y, float low, float high)
{
    y = y != y ? 0.0f : y > high ? high : y;
    return y < low ? low : y;
}

__device__ __forceinline__ int nearest_integer(float y) // of 22 bits
{
    return __float_as_int(__fadd_rn(y, ROUND)) - __float_as_int(ROUND);
}

// The code of zero, 0..most, so that `low` is near code 0.
__device__ __forceinline__ uint32 zero_point(float low, float s, float most)
{
    return nearest_integer(cut(-low / s, 0.0f, most));
}

// ---- code of a number ----

// x / s for many x, in a third of the instructions. The quotient is the exact one from 2**-20 to 2**20; beyond, where
// every code is zero or the last one, its last bits may differ. With s brought to 1..2 nothing overflows or gets lost
// between: the remainder is exact, and a correctly rounded inverse takes a quotient next to the exact one to it
// (Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990).
struct Divisor {
    float factor, s, inverse;
};

struct DivideByScale {
    static __device__ __forceinline__ Divisor prepare(float s, float global_scale)
    {
        const uint32 field = __float_as_uint(s) >> 23 & 255;
        const float factor = from_e8m0(254 - min(field, 254u));
        s = __fmul_rn(s, factor);
        return {factor, s, 1.0f / s};
    }
};

__device__ __forceinline__ float operator/(float x, const Divisor& by)
{
    x = __fmul_rn(x, by.factor);
    const float close = __fmul_rn(x, by.inverse);
    float q = close;
#pragma unroll
    for (int i = 0; i < 2; ++i) q = __fmaf_rn(__fmaf_rn(-by.s, q, x), by.inverse, q);
    return fabsf(close) > 0x1p-20f && fabsf(close) < 0x1p20f ? q : close;
}

namespace encoders
{

struct fp8 : DivideByScale {
    static constexpr bool PACKED = false;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ uint32 code(float x, Divisor p, int zero) { return e4m3(x / p); }
};

struct fp8_static {
    static constexpr bool PACKED = false;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float prepare(float s, float global_scale) { return 1.0f / s; }
    static __device__ __forceinline__ uint32 code(float x, float p, int zero) { return e4m3(__fmul_rn(x, p)); }
};

enum Rounding { EVEN, AWAY, TRUNCATE };

template <Rounding ROUNDING>
struct Int8 : DivideByScale {
    static constexpr bool PACKED = false;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ uint32 code(float x, Divisor p, int zero)
    {
        const float y = cut(x / p, -128.0f, 127.0f);
        if (ROUNDING == EVEN) return nearest_integer(y);
        const int whole = (int)y;
        const float rest = ROUNDING == AWAY ? __fsub_rn(y, (float)whole) : 0.0f;
        return whole + (rest >= 0.5f) - (rest <= -0.5f);
    }
};
using int8_even = Int8<EVEN>;
using int8_away = Int8<AWAY>;
using int8_truncate = Int8<TRUNCATE>;

template <int BITS>
struct Unsigned : DivideByScale {
    static constexpr bool PACKED = BITS == 4;
    static constexpr int ZERO = 1 << (BITS - 1); // without zero points
    static __device__ __forceinline__ uint32 code(float x, Divisor p, int zero)
    {
        const int q = nearest_integer(cut(x / p, -(1 << BITS), 1 << BITS)) + zero;
        return min(max(q, 0), (1 << BITS) - 1);
    }
};
using int4 = Unsigned<4>;
using uint8 = Unsigned<8>;

template <bool FP4>
struct Mx {
    static constexpr bool PACKED = FP4;
    static constexpr int ZERO = 0;
    // 2**(127 - code), exactly; NaN stays NaN
    static __device__ __forceinline__ float prepare(uint32 code, float global_scale)
    {
        return from_e8m0(code == 255 ? 255 : 254 - code);
    }
    static __device__ __forceinline__ uint32 code(float x, float p, int zero)
    {
        return FP4 ? e2m1(__fmul_rn(x, p)) : e4m3(__fmul_rn(x, p));
    }
};
using mxfp4 = Mx<true>;
using mxfp8 = Mx<false>;

struct nvfp4 {
    static constexpr bool PACKED = true;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float prepare(uint32 code, float global_scale)
    {
        const float s = from_e4m3(code);
        return s == 0.0f ? 0.0f : global_scale / s;
    }
    static __device__ __forceinline__ uint32 code(float x, float p, int zero) { return e2m1(__fmul_rn(x, p)); }
};

} // namespace encoders

// ---- number of a code ----

struct ScaleItself {
    using Scale = float;
    static __device__ __forceinline__ float prepare(float s, float global_scale) { return s; }
};

namespace decoders
{

struct fp8 : ScaleItself {
    static constexpr bool PACKED = false;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float number(uint32 code, float p, int zero) { return from_e4m3(code) * p; }
};

struct int8 : ScaleItself {
    static constexpr bool PACKED = false;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float number(uint32 code, float p, int zero)
    {
        return (float)((int)(code << 24) >> 24) * p;
    }
};

template <int BITS>
struct Unsigned : ScaleItself {
    static constexpr bool PACKED = BITS == 4;
    static constexpr int ZERO = 1 << (BITS - 1);
    static __device__ __forceinline__ float number(uint32 code, float p, int zero)
    {
        return (float)((int)code - zero) * p;
    }
};
using int4 = Unsigned<4>;
using uint8 = Unsigned<8>;

template <bool FP4>
struct Mx {
    using Scale = unsigned char;
    static constexpr bool PACKED = FP4;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float prepare(uint32 code, float global_scale) { return from_e8m0(code); }
    static __device__ __forceinline__ float number(uint32 code, float p, int zero)
    {
        return (FP4 ? from_e2m1(code) : from_e4m3(code)) * p;
    }
};
using mxfp4 = Mx<true>;
using mxfp8 = Mx<false>;

struct nvfp4 {
    using Scale = unsigned char;
    static constexpr bool PACKED = true;
    static constexpr int ZERO = 0;
    static __device__ __forceinline__ float prepare(uint32 code, float global_scale)
    {
        return from_e4m3(code) / global_scale;
    }
    static __device__ __forceinline__ float number(uint32 code, float p, int zero) { return from_e2m1(code) * p; }
};

} // namespace decoders
