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
    return p.output_scale ? p.output_scale[p.permuted_idx ? p.permuted_idx[row] : row] : 1.0f;
}

// h = (sum + bias) * scale, rounded; then the activation, for the caller to round.
__device__ __forceinline__ float finished(const Problem& p, float sum, float bias, float scale)
{
    const float h = (sum + bias) * scale;
#if ACTIVATED && !GATED
    const float r = rounded<X>(h);
    return activations::ACTIVATION(r, r, p.alpha, p.beta, p.limit);
#else
    return h;
#endif
}
#if GATED
__device__ __forceinline__ float gated(const Problem& p, float gate, float up, float gate_bias, float up_bias, float scale)
{
    return activations::ACTIVATION(rounded<X>((gate + gate_bias) * scale), rounded<X>((up + up_bias) * scale), p.alpha,
                                   p.beta, p.limit);
}
#endif

#if SWAPPED
// ---- tokens are the columns of d ----

constexpr int STAGED_TOKENS = COLUMNS < 64 ? COLUMNS : COLUMNS % 64 ? 32 : 64; // stored at a time
constexpr int GROUP_OUTPUTS = (GATED ? 32 : 64) * M_BLOCKS;
constexpr int STAGING = STAGED_TOKENS * GROUP_OUTPUTS * 2; // bytes of a warpgroup
constexpr int CHUNKS = GROUP_OUTPUTS / 8;                  // 16-byte pieces of a staged token
constexpr bool SCALES_EARLY = COLUMNS <= 32;               // few enough for registers

struct Extras {
    float bias[M_BLOCKS][2];
    float scale[SCALES_EARLY ? COLUMNS / 4 : 1];
};

__device__ __forceinline__ int first_output(const Unit& unit, int group)
{
    return unit.block * TILE_OUTPUTS + (PINGPONG ? 0 : group) * GROUP_OUTPUTS;
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
    if (SCALES_EARLY)
#pragma unroll
        for (int i = 0; i < COLUMNS / 4; ++i)
            e.scale[i] = scale_at(p, unit.row + min(i / 2 * 8 + lane % 4 * 2 + i % 2, unit.left - 1));
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
                                           const Unit& unit, uint32 staging, int group)
{
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int column0 = first_output(unit, group);
#pragma unroll
    for (int part = 0; part < COLUMNS / STAGED_TOKENS; ++part) {
        const int token0 = part * STAGED_TOKENS;
        if (token0 >= unit.left) break;
        warpgroup_sync(1 + group); // the staging area is free
#pragma unroll
        for (int i = 0; i < STAGED_TOKENS / 8; ++i) {
            const int g = part * (STAGED_TOKENS / 8) + i;
            float s[2];
#pragma unroll
            for (int t = 0; t < 2; ++t)
                s[t] = SCALES_EARLY ? e.scale[g * 2 + t]
                                    : scale_at(p, unit.row + min(g * 8 + lane % 4 * 2 + t, unit.left - 1));
#pragma unroll
            for (int m = 0; m < M_BLOCKS; ++m) {
                const float* sum = &d[m][g * 4];
                const float b0 = e.bias[m][0], b1 = e.bias[m][1];
                const int token = i * 8 + lane % 8;
#if GATED
                store_transposed(staging + staged(token, m * 4 + warp),
                                 store_pair<X>(gated(p, sum[0], sum[2], b0, b1, s[0]), gated(p, sum[1], sum[3], b0, b1, s[1])));
#else
                store_transposed(staging + staged(token, m * 8 + warp * 2 + lane / 8 % 2),
                                 store_pair<X>(finished(p, sum[0], b0, s[0]), finished(p, sum[1], b0, s[1])),
                                 store_pair<X>(finished(p, sum[2], b1, s[0]), finished(p, sum[3], b1, s[1])));
#endif
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

#else
// ---- tokens are the rows of d: boxes of 64 x 64 outputs, stored by the copy engine ----

constexpr int BOXES = 2; // in turn: one is filled while the other leaves
constexpr int STAGING = BOXES * 8192;

struct Extras {
    float scale[M_BLOCKS][2];
};

__device__ __forceinline__ Extras load_extras(const Problem& p, const Unit& unit, int group)
{
    Extras e;
#pragma unroll
    for (int i = 0; i < M_BLOCKS * 2; ++i) {
        const int row = ((PINGPONG ? 0 : group) * M_BLOCKS + i / 2) * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        e.scale[i / 2][i % 2] = scale_at(p, unit.row + min(row + i % 2 * 8, unit.left - 1));
    }
    return e;
}

// Two outputs of one row: columns `column`, + 1, whose sums are at[0], at[1] (and of the up rows at[4], at[5]).
__device__ __forceinline__ uint32 outputs_of(const Problem& p, const float* at, int expert, int column, float scale)
{
    float v[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const float b = bias_at(p, expert, GATED ? gate_row(p, column + c) : column + c, column + c);
#if GATED
        v[c] = gated(p, at[c], at[4 + c], b, bias_at(p, expert, up_row(p, column + c), column + c), scale);
#else
        v[c] = finished(p, at[c], b, scale);
#endif
    }
    return store_pair<X>(v[0], v[1]);
}

__device__ __forceinline__ void store_tile(const float (&d)[M_BLOCKS][COLUMNS / 2], const Problem& p, const Extras& e,
                                           const Unit& unit, uint32 staging, int group)
{
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int staged_row = warp * 16 + lane % 16;
    int box = 0;
#pragma unroll
    for (int m = 0; m < M_BLOCKS; ++m) {
        const int row0 = ((PINGPONG ? 0 : group) * M_BLOCKS + m) * 64, left = unit.left - row0;
        if (left <= 0) break;
#pragma unroll
        for (int b = 0; b < TILE_OUTPUTS / 64; ++b, ++box) {
            const int column0 = unit.block * TILE_OUTPUTS + b * 64;
            const uint32 area = staging + (box % BOXES) * 8192;
            if (thread == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BOXES - 1) : "memory");
            warpgroup_sync(1 + group);
#pragma unroll
            for (int j = 0; j < 4; ++j) { // 16 columns at a time: four 8 x 8 matrices
                uint32 v[4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int i = b * 8 + j * 2 + h, column = unit.block * TILE_OUTPUTS + i * 8 + lane % 4 * 2;
                    const float* at = &d[m][i * (GATED ? 8 : 4)];
                    v[h * 2] = outputs_of(p, at, unit.expert, column, e.scale[m][0]);
                    v[h * 2 + 1] = outputs_of(p, at + 2, unit.expert, column, e.scale[m][1]);
                }
                const int chunk = (j * 2 + lane / 16) ^ (staged_row & 7);
                store_matrices(area + staged_row * 128 + (chunk << 4), v[0], v[1], v[2], v[3]);
            }
            if (left >= 64) shared_writes_visible();
            warpgroup_sync(1 + group);
            // a group for every box, empty or not: wait_group counts groups
            if (thread == 0) {
                if (left >= 64) store_box(p.out_map, area, column0, unit.row + row0);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
            if (left < 64) { // the rows below are another expert's
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = thread / 8 + i * 16, column = column0 + thread % 8 * 8;
                    if (row < left && column < p.outputs)
                        *(uint4*)(p.out + (int64)(unit.row + row0 + row) * p.outputs + column) =
                            load_chunk(area + row * 128 + ((thread % 8 ^ (row & 7)) << 4));
                }
                warpgroup_sync(1 + group);
            }
        }
    }
}
#endif
