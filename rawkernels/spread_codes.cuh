// spread_codes.cuh: sixteen neighbouring codes to float32 in few instructions, before their scale is multiplied in.
//
//   Spread<Rule>::numbers(words, out)      code i is out[i] - origin(zero): the number of format_rules.cuh over its scale
//
// Whole numbers are put behind the exponent of 2**23 by one byte permutation each, where conversions take four times as
// long; e2m1 by way of float16, whose low byte is zero for all of its numbers.

template <typename Rule>
struct Spread;

constexpr uint32 TWO_23 = 0x4B000000; // 2**23, whose last bit counts ones

// Byte `i` of a word, above 2**23.
__device__ __forceinline__ float above_two_23(uint32 word, int i)
{
    return __uint_as_float(__byte_perm(word, TWO_23, 0x7440 + i));
}

struct WholeNumbers {
    static __device__ __forceinline__ float origin(int zero) { return __uint_as_float(TWO_23 + zero); }
};

template <>
struct Spread<decoders::uint8> : WholeNumbers {
    static __device__ __forceinline__ void numbers(const uint32 (&words)[4], float (&out)[16])
    {
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = above_two_23(words[i / 4], i % 4);
    }
};

template <>
struct Spread<decoders::int8> {
    static __device__ __forceinline__ float origin(int zero) { return __uint_as_float(TWO_23 + 128); }
    static __device__ __forceinline__ void numbers(const uint32 (&words)[4], float (&out)[16])
    {
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = above_two_23(words[i / 4] ^ 0x80808080, i % 4);
    }
};

template <>
struct Spread<decoders::int4> : WholeNumbers {
    static __device__ __forceinline__ void numbers(const uint32 (&words)[4], float (&out)[16])
    {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32 word = words[i / 8];
            out[i] = above_two_23((i % 2 ? word >> 4 : word) & 0x0F0F0F0F, i % 8 / 2);
        }
    }
};

struct Floats {
    static __device__ __forceinline__ float origin(int zero) { return 0.0f; }
    static __device__ __forceinline__ void halves(uint32 pair, float* out)
    {
        out[0] = load_low<float16>(pair);
        out[1] = load_high<float16>(pair);
    }
};

struct Bytes : Floats {
    static __device__ __forceinline__ void numbers(const uint32 (&words)[4], float (&out)[16])
    {
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            const uint32 codes = words[i / 4] >> i % 4 * 8;
#if __CUDA_ARCH__ >= 890
            uint32 pair;
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((uint16)codes));
            halves(pair, out + i);
#else
            out[i] = from_e4m3(codes & 255);
            out[i + 1] = from_e4m3(codes >> 8 & 255);
#endif
        }
    }
};

struct Nibbles : Floats {
    static __device__ __forceinline__ void numbers(const uint32 (&words)[4], float (&out)[16])
    {
#pragma unroll
        for (int i = 0; i < 16; i += 4) { // four codes, one a byte: the high bytes of what they are in float16
            const uint32 codes = words[i / 8] >> i % 8 / 4 * 16;
            const uint32 twice = __byte_perm(codes, 0, 0x1100);
            const uint32 signs = (twice << 4 & 0x00800080) | (twice & 0x80008000);
            const uint32 high = __byte_perm(0x3E3C3800, 0x46444240, codes & 0x7777) | signs;
            halves(__byte_perm(high, 0, 0x1404), out + i);
            halves(__byte_perm(high, 0, 0x3424), out + i + 2);
        }
    }
};

template <>
struct Spread<decoders::fp8> : Bytes {};
template <>
struct Spread<decoders::mxfp8> : Bytes {};
template <>
struct Spread<decoders::mxfp4> : Nibbles {};
template <>
struct Spread<decoders::nvfp4> : Nibbles {};
