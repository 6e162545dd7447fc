// mma.cuh: 16 x 8 products of one warp on tensor cores, float32 sums (mma.sync, sm_80 and later).
//
// One step is 32 bytes of K: 16 elements of 16 bits, or 8 of float32, which are rounded to tf32 (10 bits of mantissa,
// to nearest, ties away from zero). Lane l, with g = l / 4 and q = l % 4, holds
//   a[0], a[2]  row g, bytes 4q.. of the first and the second 16 bytes of K;  a[1], a[3]  row g + 8
//   b[0], b[1]  column g, the same bytes
//   sums        row g, columns 2q, 2q + 1;  row g + 8, the same columns
// which is how load_matrices (memory.cuh) hands out tiles whose rows run along K.

template <typename T>
struct Fragment;

template <>
struct Fragment<bfloat16> {
    static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2])
    {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    // Elements as the tensor core takes them.
    static __device__ __forceinline__ uint32 ready(uint32 bits) { return bits; }
    // Elements times `factor`, each product rounded to the dtype.
    static __device__ __forceinline__ uint32 scaled(uint32 bits, float factor)
    {
        return store_pair<bfloat16>(load(bfloat16{(uint16)bits}) * factor,
                                    load(bfloat16{(uint16)(bits >> 16)}) * factor);
    }
};

template <>
struct Fragment<float16> {
    static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2])
    {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    static __device__ __forceinline__ uint32 ready(uint32 bits) { return bits; }
    static __device__ __forceinline__ uint32 scaled(uint32 bits, float factor)
    {
        return store_pair<float16>(load(float16{(uint16)bits}) * factor, load(float16{(uint16)(bits >> 16)}) * factor);
    }
};

template <>
struct Fragment<float32> {
    static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2])
    {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    static __device__ __forceinline__ uint32 ready(uint32 bits)
    {
        uint32 y;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(bits)));
        return y;
    }
    static __device__ __forceinline__ uint32 scaled(uint32 bits, float factor)
    {
        return __float_as_uint(__uint_as_float(bits) * factor);
    }
};
