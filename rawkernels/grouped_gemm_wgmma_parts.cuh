// grouped_gemm_wgmma_parts.cuh: sums of grouped_gemm_wgmma.cu whose scales change along K. Included by that file only.
//
//   d[m, n] = sum over parts of K of ((weights[m, part] @ rows[n, part]) * scale of the weights) * factor of the row
//
// A part is PART_BLOCKS blocks of K, fewer at the end. Scales and factors may be those of several parts. The sums of a part
// stand beside those of all in registers, so that there is one M block only. Each warpgroup brings the factors of all
// tokens for itself, into two places in turn: the warps that load have no time to wait for memory.

constexpr int PART = PART_BLOCKS * BLOCK_K;
constexpr int FACTORS = (COLUMNS + 15) / 16 * 16 * 4; // bytes of one place

// Where the factor of a token lies: of 16 tokens, those four that one thread multiplies are neighbours.
__device__ __forceinline__ int factor_place(int token)
{
    return (token & ~15) | (token % 8 / 2 * 4) | (token / 8 % 2 * 2) | token % 2;
}

// Factors of the tokens that a thread brings for its warpgroup, four at a time: those of other rows are far away.
struct PartFactors {
    static constexpr int TOKENS = PARTED ? (COLUMNS + 127) / 128 : 1;
    const float* factors; // (rows, parts), of which each row begins at a multiple of 16 bytes
    uint32 from[TOKENS], place, other;
    float4 held[TOKENS];
    int at, last, left, whole; // the factor in use; how many elements of K it has left, and has

    // `first` is the first place of this warpgroup; `announced` says where the factors of the n-th unit begin.
    __device__ __forceinline__ PartFactors(const Announced& announced, const Problem& p, int n, uint32 first, int group)
    {
        if (!PARTED) return;
        meet(group); // all have read what the unit before left in the first place: of an odd number of parts its last
        factors = p.row_factor, at = 0, last = p.parts - 4, left = whole = p.part;
        place = first, other = first + FACTORS;
        barrier_wait(announced.detailed(n), announced.parity(n));
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
            from[i] = load_word(announced.factors_of(n) + min((int)threadIdx.x % 128 + i * 128, COLUMNS - 1) * 4);
        ask();
    }
    __device__ __forceinline__ void ask()
    {
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) held[i] = __ldg((const float4*)(factors + from[i] + at));
    }
    // Those of the next part, for the whole warpgroup: what has been stored is there behind `meet`.
    __device__ __forceinline__ uint32 store()
    {
        const uint32 to = place;
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            const int token = threadIdx.x % 128 + i * 128;
            const float4 of = held[i];
            const float now = at % 4 < 2 ? (at % 2 ? of.y : of.x) : (at % 2 ? of.w : of.z);
            if (token < COLUMNS) store_shared(to + factor_place(token) * 4, __float_as_uint(now));
        }
        place = other, other = to;
        left -= PART;
        if (left == 0) {
            left = whole;
            if (++at % 4 == 0) at = min(at, last), ask();
        }
        return to;
    }
    static __device__ __forceinline__ void meet(int group)
    {
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    }
};

// Scales of the two weight rows that this thread multiplies, of the part in work and of the next one.
struct PartScales {
    const Rule::Scale* scale; // of the expert
    int places[2];            // where the groups of each row begin
    int at, last, left, whole;
    Rule::Scale next[2];

    __device__ __forceinline__ PartScales(const Problem& p, const Unit& unit, const Scales& s, int group)
    {
        if (PARTED != 2) return;
        scale = s.scale + (int64)unit.expert * s.down * s.across;
        at = 0, last = s.across - 1, left = whole = s.group_columns;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32 row = ((group * 4 + threadIdx.x % 128 / 32) * 2 + i) * 8 + threadIdx.x % 32 / 4;
            places[i] = (uint32)weight_row_of(p, unit, row) / (uint32)s.group_rows * s.across;
        }
        ask();
    }
    __device__ __forceinline__ void ask()
    {
#pragma unroll
        for (int i = 0; i < 2; ++i) next[i] = __ldg(scale + places[i] + at);
    }
    // Those of the next part.
    __device__ __forceinline__ void take(float (&to)[2])
    {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[i] = PARTED == 2 ? Rule::prepare(next[i], 1.0f) : 1.0f;
        if (PARTED != 2) return;
        left -= PART;
        if (left == 0) at = min(at + 1, last), left = whole;
        ask();
    }
};

// d += the next part, which is BLOCKS blocks.
template <int N, int BLOCKS>
__device__ __forceinline__ void add_part(float (&d)[COLUMNS / 2], Ring& ring, PartScales& scales,
                                         PartFactors& of_tokens, int group)
{
    const bool first_lane = threadIdx.x % 32 == 0;
    float of_row[2], sums[N / 2];
    scales.take(of_row);
    const uint32 factors = of_tokens.store() + threadIdx.x % 4 * 16;
    uint32 empty = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        barrier_wait(ring.full(), ring.parity);
        shared_writes_visible();
        const uint64 m = matrix_descriptor(ring.buffer()) + (uint64)(group * 512); // descriptors count 16 bytes
        const uint64 n = matrix_descriptor(ring.buffer() + TOKENS_AT);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
            Wgmma<N>::multiply(sums, m + step * 2, n + step * 2, b > 0 || step > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (b > 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (first_lane) barrier_arrive(empty);
        }
        empty = ring.empty();
        ring.next();
    }
    PartFactors::meet(group);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (first_lane) barrier_arrive(empty);
#pragma unroll
    for (int i = 0; i < N / 2; i += 8) { // sixteen tokens, of which this thread has four
        const uint4 four = load_chunk(factors + i * 8);
        const float factor[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                                 __uint_as_float(four.w)};
#pragma unroll
        for (int j = 0; j < min(8, N / 2 - i); ++j)
            d[i + j] = __fmaf_rn(__fmul_rn(sums[i + j], of_row[j / 2 % 2]), factor[j / 4 * 2 + j % 2], d[i + j]);
    }
}

// d = weights @ rows.T of a unit, its first N tokens, in parts.
template <int N>
__device__ __forceinline__ void multiply_parts(float (&d)[M_BLOCKS][COLUMNS / 2], Ring& ring, PartScales& scales,
                                               PartFactors& factors, int k_blocks, int group)
{
    static_assert(M_BLOCKS == 1, "");
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[0][i] = 0.0f;
    int k = 0;
#pragma unroll 1
    for (; k + PART_BLOCKS <= k_blocks; k += PART_BLOCKS) add_part<N, PART_BLOCKS>(d[0], ring, scales, factors, group);
    if (k < k_blocks) add_part<N, 1>(d[0], ring, scales, factors, group);
}
