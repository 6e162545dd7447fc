// grouped_gemm_wgmma_store.cuh: from sums in registers to rounded outputs in memory. Included by
// grouped_gemm_wgmma.cu only.
//
// Of an m64nN product, thread l of warp w holds d[4i], d[4i+1]: row 16w + l/4, columns 8i + 2(l%4) + {0, 1}, and
// d[4i+2], d[4i+3]: the same columns of row + 8. The bits are first put in order in shared memory (stmatrix), then
// leave in 16-byte pieces: 128 bytes of a row at once.

// ---- arithmetic ----

// Column of the bias that belongs to output `column`: its gate (or only) row of the weights, and its up row.
__device__ __forceinline__ int gate_row(const Problem& p, int column) { return p.interleaved ? 2 * column : column; }
__device__ __forceinline__ int up_row(const Problem& p, int column)
{
    return p.interleaved ? 2 * column + 1 : p.outputs + column;
}
__device__ __forceinline__ float bias_at(const Problem& p, int expert, int row, int column)
{
    const int64 width = GATED ? 2 * p.outputs : p.outputs;
    return BIASED && column < p.outputs ? p.bias[expert * width + row] : 0.0f;
}

__device__ __forceinline__ float scale_at(const Problem& p, int row)
{
    return SCALED ? p.output_scale[p.permuted_idx ? p.permuted_idx[row] : row] : 1.0f;
}

// (sum + bias) * scale of two sums, rounded: two h in one register.
__device__ __forceinline__ uint32 rounded_pair(float sum0, float sum1, float bias0, float bias1, float scale0,
                                               float scale1)
{
    if (BIASED) sum0 += bias0, sum1 += bias1;
    if (SCALED) sum0 *= scale0, sum1 *= scale1;
    return store_pair<X>(sum0, sum1);
}

// Two outputs in one register, from two pairs of h (without a gate: from one).
__device__ __forceinline__ uint32 activated_pair(const Problem& p, uint32 gate, uint32 up)
{
#if ACTIVATED
    const float limit = LIMITED ? p.limit : __int_as_float(0x7F800000); // infinity: the clamps fold away
    return store_pair<X>(activations::ACTIVATION(load_low<X>(gate), load_low<X>(up), p.alpha, p.beta, limit),
                         activations::ACTIVATION(load_high<X>(gate), load_high<X>(up), p.alpha, p.beta, limit));
#else
    return gate;
#endif
}

// ---- storing ----

// Tokens stored at a time; twin of Tile.staged.
constexpr int STAGED_TOKENS = COLUMNS <= 56       ? COLUMNS
                              : COLUMNS % 64 == 0 ? 64
                              : COLUMNS % 56 == 0 ? 56
                              : COLUMNS % 48 == 0 ? 48
                                                  : 32;
constexpr int GROUP_OUTPUTS = (GATED ? 32 : 64) * M_BLOCKS;
constexpr int STAGING = STAGED_TOKENS * GROUP_OUTPUTS * 2; // bytes of a warpgroup
constexpr int CHUNKS = GROUP_OUTPUTS / 8;                  // 16-byte pieces of a staged token
constexpr int SCALE_BYTES = COLUMNS * 4;

struct Extras {
    float bias[M_BLOCKS][2];
    float scale[(COLUMNS + 127) / 128]; // of tokens thread, thread + 128
};

__device__ __forceinline__ int first_output(const Unit& unit, int group)
{
    return unit.block * TILE_OUTPUTS + group * GROUP_OUTPUTS;
}

__device__ __forceinline__ Extras load_extras(const Problem& p, const Unit& unit, int group)
{
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    Extras e;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; ++i) {
        const int column = first_output(unit, group) + i * (GATED ? 32 : 64) + warp * (GATED ? 8 : 16) + lane / 4;
        e.bias[i][0] = bias_at(p, unit.expert, GATED ? gate_row(p, column) : column, column);
        e.bias[i][1] = GATED ? bias_at(p, unit.expert, up_row(p, column), column)
                             : bias_at(p, unit.expert, column + 8, column + 8);
    }
    for (int i = 0; i < (COLUMNS + 127) / 128; ++i)
        e.scale[i] = scale_at(p, unit.row + min((int)threadIdx.x % 128 + i * 128, unit.left - 1));
    return e;
}

// Where chunk `chunk` of staged token `token` lies; neighbours in a column of chunks fall into different banks.
__device__ __forceinline__ uint32 staged(int token, int chunk)
{
    constexpr int SPREAD = CHUNKS >= 8 ? 8 : CHUNKS;
    const int turn = SPREAD == 8 ? token & 7 : (token * CHUNKS / 8) & (SPREAD - 1);
    return token * (GROUP_OUTPUTS * 2) + ((chunk ^ turn) << 4);
}

__device__ __forceinline__ void store_tile(const float (&d)[M_BLOCKS][COLUMNS / 2], const Problem& p, const Extras& e,
                                           const Unit& unit, uint32 staging, uint32 scales, int group)
{
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int column0 = first_output(unit, group);
    if (SCALED)
        for (int i = 0; i < (COLUMNS + 127) / 128; ++i)
            if (thread + i * 128 < COLUMNS) store_shared(scales + (thread + i * 128) * 4, e.scale[i]);
#pragma unroll
    for (int part = 0; part < COLUMNS / STAGED_TOKENS; ++part) {
        const int token0 = part * STAGED_TOKENS;
        if (token0 >= unit.left) break;
        warpgroup_sync(1 + group); // the staging area is free, the scales are there
#pragma unroll
        for (int i = 0; i < STAGED_TOKENS / 8; ++i) {
            const int g = part * (STAGED_TOKENS / 8) + i, token = i * 8 + lane % 8;
            float s0 = 1.0f, s1 = 1.0f;
            if (SCALED) load_shared(scales + (g * 8 + lane % 4 * 2) * 4, s0, s1);
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
                const float* sum = &d[m][g * 4];
                const float b0 = e.bias[m][0], b1 = e.bias[m][1];
                const uint32 low = rounded_pair(sum[0], sum[1], b0, b0, s0, s1);
                const uint32 high = rounded_pair(sum[2], sum[3], b1, b1, s0, s1);
                if (GATED)
                    store_transposed(staging + staged(token, m * 4 + warp), activated_pair(p, low, high));
                else
                    store_transposed(staging + staged(token, m * 8 + warp * 2 + lane / 8 % 2),
                                     activated_pair(p, low, low), activated_pair(p, high, high));
            }
        }
        warpgroup_sync(1 + group);
#pragma unroll
        for (int i = 0; i < (STAGED_TOKENS * CHUNKS + 127) / 128; ++i) {
            const int piece = thread + i * 128, token = piece / CHUNKS, chunk = piece % CHUNKS;
            const int column = column0 + chunk * 8;
            if (piece < STAGED_TOKENS * CHUNKS && token0 + token < unit.left && column < p.outputs)
                *(uint4*)(p.out + (int64)(unit.row + token0 + token) * p.outputs + column) =
                    load_chunk(staging + staged(token, chunk));
        }
    }
}
