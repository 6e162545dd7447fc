// logits.cuh: one token's row of router logits in the registers of a warp, each read once.
//
// Shapes     COUNT logits a lane, NEAR neighbours in one load of up to 16 bytes; Row of best.cuh says which ones
// Constants  X element type; a row starts at a multiple of NEAR * sizeof(X) bytes and NEAR divides its length

// Read a row; what lies behind its end is -inf, which adds nothing to any sum.
template <int COUNT, int NEAR>
__device__ __forceinline__ void load_row(const X* row, int num_elements, float (&x)[COUNT])
{
#pragma unroll
    for (int c = 0; c < COUNT; c += NEAR) {
        const int first = Row<uint64, COUNT, NEAR>::element(c);
        const bool inside = first < num_elements;
        Neighbours<X, NEAR> neighbours;
        if (inside) neighbours.word = *(const decltype(neighbours.word)*)(row + first);
#pragma unroll
        for (int i = 0; i < NEAR; ++i) x[c + i] = inside ? load(neighbours.elements[i]) : -infinite();
    }
}

// The greatest logit, or NaN where no softmax exists: a NaN, a +inf, or nothing but -inf.
template <int COUNT>
__device__ __forceinline__ float softmax_top(const float (&x)[COUNT])
{
    uint32 top = 0;
    bool poisoned = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const uint32 size = grown(x[i]);
        top = size > top ? size : top;
        poisoned |= !(x[i] < infinite());
    }
    top = warp_max(top);
    poisoned = __any_sync(WARP, poisoned) || top <= GROWN_MINUS_INFINITY;
    return __uint_as_float(poisoned ? 0x7FC00000 : top & SIGN ? top ^ SIGN : ~top);
}

// Sum of exp(x - top), 0 where no softmax exists: the same bits in every lane.
template <int COUNT>
__device__ __forceinline__ float softmax_total(const float (&x)[COUNT], float top)
{
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) total += score<SOFTMAX>(x[i], top);
    return warp_sum(total);
}

// Both again for a row of any length, which is read once more for each.
__device__ __forceinline__ float softmax_top_long(const X* row, int num_experts)
{
    float x[1] = {-infinite()};
    bool poisoned = false;
    for (int64 e = threadIdx.x % 32; e < num_experts; e += 32) {
        const float logit = load(row[e]);
        poisoned |= !(logit < infinite());
        x[0] = logit > x[0] ? logit : x[0];
    }
    x[0] = poisoned ? infinite() : x[0];
    return softmax_top(x);
}

__device__ __forceinline__ float softmax_total_long(const X* row, int num_experts, float top)
{
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64 e = threadIdx.x % 32; e < num_experts; e += 128) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (e + 32 * i < num_experts) sums[i] += score<SOFTMAX>(load(row[e + 32 * i]), top);
        }
    }
    return warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
