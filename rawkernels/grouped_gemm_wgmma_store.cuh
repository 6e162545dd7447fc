// grouped_gemm_wgmma_store.cuh: from sums in registers to rounded outputs in memory. Included by
// grouped_gemm_wgmma.cu only.
//
// Of an m64nN product, thread l of warp w holds d[4i], d[4i+1]: row 16w + l/4, columns 8i + 2(l%4) + {0, 1}, and
// d[4i+2], d[4i+3]: the same columns of row + 8. One M block: 8 gate rows, then their 8 up rows (or 16 outputs). Two:
// block 0 has the first 8 of each 16 rows, block 1 the others; so a warp holds 32 neighbours, gates in block 0 and ups
// in block 1. It puts their bits in order in its own part of shared memory (stmatrix); from there they leave in
// 16-byte pieces, 16 to 64 bytes of a token at once, and no warp waits for another.

// ---- arithmetic ----

// Column of the bias and of the factors that belongs to output `column`: its gate (or only) row of the weights, and its up row.
__device__ __forceinline__ int gate_row(const Problem& p, int column) { return p.interleaved ? 2 * column : column; }
__device__ __forceinline__ int up_row(const Problem& p, int column)
{
    return p.interleaved ? 2 * column + 1 : p.outputs + column;
}
// Row of the weights that row r of a tile is, or one that exists: 8 gate rows lie before the 8 up rows of their outputs.
__device__ __forceinline__ int weight_row_of(const Problem& p, const Unit& unit, uint32 r)
{
    const int output = min(unit.block * TILE_OUTPUTS + (int)(GATED ? r / 16 * 8 + r % 8 : r), p.outputs - 1);
    return !GATED ? output : r / 8 % 2 ? up_row(p, output) : gate_row(p, output);
}
__device__ __forceinline__ float bias_at(const Problem& p, int expert, int row, int column)
{
    const int64 width = GATED ? 2 * p.outputs : p.outputs;
    return BIASED && column < p.outputs ? p.bias[expert * width + row] : 0.0f;
}

__device__ __forceinline__ float factor_at(const Problem& p, int expert, int row, int column)
{
    if (!FACTORED || !p.column_factor || column >= p.outputs) return 1.0f;
    return p.column_factor[(int64)expert * p.factor_columns + (p.factor_columns == 1 ? 0 : row)];
}

// What the sums of two tokens are multiplied by.
struct OfTokens {
    float factor[2], scale[2];
};

// (sum * factors + bias) * scale of the sums of two tokens, rounded: two h in one register.
__device__ __forceinline__ uint32 rounded_pair(const float* sum, float factor, float bias, const OfTokens& of)
{
    float x = sum[0], y = sum[1];
    if (FACTORED) // a product of its own, never merged with the addition
        x = __fmul_rn(x, __fmul_rn(of.factor[0], factor)), y = __fmul_rn(y, __fmul_rn(of.factor[1], factor));
    if (BIASED) x += bias, y += bias;
    if (SCALED) x *= of.scale[0], y *= of.scale[1];
    return store_pair<X>(x, y);
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

constexpr int WARP_OUTPUTS = (GATED ? 8 : 16) * M_BLOCKS;
constexpr int CHUNKS = WARP_OUTPUTS / 8;               // 16-byte pieces of a token
constexpr int EIGHTS = COLUMNS % 16 == 0 ? 2 : 1;      // times eight tokens are stored at a time
constexpr int STAGING = EIGHTS * 8 * WARP_OUTPUTS * 2; // bytes of a warp

__device__ __forceinline__ int first_output(const Unit& unit, int group)
{
    return unit.block * TILE_OUTPUTS + (group * 4 + threadIdx.x % 128 / 32) * WARP_OUTPUTS;
}

struct OfRows {
    float gate[CHUNKS], up[CHUNKS]; // of the output that this lane holds of each eight; without a gate: `gate`
};

template <typename At>
__device__ __forceinline__ OfRows load_of_rows(const Problem& p, const Unit& unit, int group, At at)
{
    OfRows of;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int column = first_output(unit, group) + c * 8 + threadIdx.x % 32 / 4;
        of.gate[c] = at(p, unit.expert, GATED ? gate_row(p, column) : column, column);
        of.up[c] = GATED ? at(p, unit.expert, up_row(p, column), column) : 0.0f;
    }
    return of;
}
__device__ __forceinline__ OfRows load_biases(const Problem& p, const Unit& unit, int group)
{
    return load_of_rows(p, unit, group, bias_at);
}
__device__ __forceinline__ OfRows load_factors(const Problem& p, const Unit& unit, int group)
{
    return load_of_rows(p, unit, group, factor_at);
}

// Sums of eight tokens from `column` on: the gates of the `c`-th eight outputs of this warp, and their ups.
__device__ __forceinline__ const float* gates(const float (&d)[M_BLOCKS][COLUMNS / 2], int c, int column)
{
    return GATED ? &d[0][column / 2 + c * 2] : &d[c % M_BLOCKS][column / 2 + c / M_BLOCKS * 2];
}
__device__ __forceinline__ const float* ups(const float (&d)[M_BLOCKS][COLUMNS / 2], int c, int column)
{
    return &d[M_BLOCKS - 1][column / 2 + (M_BLOCKS == 1 ? 2 : c * 2)];
}

// Where chunk `chunk` of staged token `token` lies: eight neighbours in a column of chunks fall into different banks.
__device__ __forceinline__ uint32 staged(int token, int chunk)
{
    return token * (WARP_OUTPUTS * 2) + ((chunk ^ (token * CHUNKS / 8 & CHUNKS - 1)) << 4);
}

// What is read back of some tokens leaves while the next are worked out; if FACTORED at once, which takes fewer
// registers: the factors need them.
__device__ __forceinline__ void store_tile(const float (&d)[M_BLOCKS][COLUMNS / 2], const Problem& p, const OfRows& b,
                                           const OfRows& f, const Unit& unit, uint32 staging, uint32 scales,
                                           uint32 factors, int group)
{
    constexpr int STEP = EIGHTS * 8, EIGHT = 8 * WARP_OUTPUTS * 2; // tokens, and bytes of eight of them
    const int lane = threadIdx.x % 32, token = min(lane / CHUNKS, 7), chunk = lane % CHUNKS; // this lane's piece
    const uint32 to = staging + staged(lane % 8, lane / 8 % CHUNKS), from = staging + staged(token, chunk);
    const int column = first_output(unit, group) + chunk * 8;
    const int left = column < p.outputs && lane < 8 * CHUNKS ? unit.left - token : 0;
    const int64 eight = (int64)8 * p.outputs;
    X* out = p.out + (int64)(unit.row + token) * p.outputs + column;
    uint4 piece[EIGHTS];
    OfTokens of[EIGHTS] = {};
    const auto load_of_tokens = [&](int first) {
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
            const int at = (first + e * 8) * 4 + lane % 4 * 8;
            if (SCALED) load_shared(scales + at, of[e].scale[0], of[e].scale[1]);
            of[e].factor[0] = of[e].factor[1] = 1.0f;
            if (FACTORED && !PARTED) load_shared(factors + at, of[e].factor[0], of[e].factor[1]);
        }
    };
    const auto leave = [&](int first) { // those from token `first` on
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e, out += eight)
            if (first + e * 8 < left) store_global(out, piece[e]);
    };
    load_of_tokens(0);
    int done = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS; i += STEP) {
        if (i >= unit.left) break;
        uint32 bits[EIGHTS][CHUNKS];
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const uint32 gate = rounded_pair(gates(d, c, i + e * 8), f.gate[c], b.gate[c], of[e]);
                bits[e][c] =
                    activated_pair(p, gate, GATED ? rounded_pair(ups(d, c, i + e * 8), f.up[c], b.up[c], of[e]) : gate);
            }
        if (!FACTORED && i > 0) leave(i - STEP);
        __syncwarp(); // all have read what was there
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
            if constexpr (CHUNKS == 4)
                store_transposed(to + e * EIGHT, bits[e][0], bits[e][1], bits[e][2], bits[e][3]);
            else if constexpr (CHUNKS == 2)
                store_transposed(to + e * EIGHT, bits[e][0], bits[e][1]);
            else
                store_transposed(to + e * EIGHT, bits[e][0]);
        if (i + STEP < COLUMNS) load_of_tokens(i + STEP);
        __syncwarp();
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) piece[e] = load_chunk(from + e * EIGHT);
        if (FACTORED) leave(i);
        done = i;
    }
    if (!FACTORED) leave(done);
}
