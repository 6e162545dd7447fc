// grouped_gemm_tile.cuh: what the grouped products other than wgmma share: which tile a CTA does, how operands come into
// shared memory, how results leave. Included by grouped_gemm_mma.cu and grouped_gemm_fma.cu only.
//
// A stage holds 128 bytes of K of BLOCK_ROWS rows of activations, then of BLOCK_COLUMNS rows of weights, laid out as
// memory.cuh says. If GATED, 8 gate rows lie before the 8 up rows of the same outputs, again and again, so that the
// thread that has column c of the tile has column c + 8 too.
// If CODED, the weights of a stage are codes in rows of CODES_PITCH, and two buffers of numbers lie behind the stages.
// Constants  X element type, BLOCK_ROWS, BLOCK_COLUMNS (a multiple of 16), WARPS_M x WARPS_N, GATED, ACTIVATION
//            FACTORED: there is a row_factor or a column_factor; CODED, with those of coded_weights.cuh
//            PARTED: sums of parts of K meet row_factor (rows, parts) and, 2, scales that are not in the weights
//            COPY_X, COPY_W bytes of a copy (16, 8, 4, 2, and 1 of codes), which divide every address and row

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int ELEMENT = sizeof(X), CHUNK = 16 / ELEMENT, BLOCK_K = TILE_PITCH / ELEMENT; // bytes; elements
constexpr int NUMBERS = BLOCK_COLUMNS * TILE_PITCH;                                      // weights of a stage
constexpr int CODES_PITCH = CODED ? BLOCK_K / PIECE * PIECE_BYTES : TILE_PITCH;
constexpr int WEIGHTS_AT = BLOCK_ROWS * TILE_PITCH, STAGE = WEIGHTS_AT + BLOCK_COLUMNS * CODES_PITCH;
constexpr int TILE_OUTPUTS = GATED ? BLOCK_COLUMNS / 2 : BLOCK_COLUMNS;
constexpr int ROWS_A_PASS = THREADS / 8; // eight threads copy the 128 bytes of a row
constexpr int X_PASSES = (BLOCK_ROWS + ROWS_A_PASS - 1) / ROWS_A_PASS;
constexpr int W_CHUNKS = CODES_PITCH / 16, W_ROWS_A_PASS = THREADS / W_CHUNKS; // likewise of the weights
constexpr int W_PASSES = (BLOCK_COLUMNS + W_ROWS_A_PASS - 1) / W_ROWS_A_PASS;
constexpr int TILES_TOGETHER = 16; // tiles that use each block of weights while it is in the L2 cache
// results wait in shared memory in rows of this many elements: 8 extra ones spread them over the banks
constexpr int STAGED_PITCH = TILE_OUTPUTS + 8;

static_assert(ROWS_A_PASS % 16 == 0 && W_ROWS_A_PASS % 16 == 0, "a pass covers whole groups of 16 rows");

struct Problem {
    const int4* schedule;       // {count, 0, 0, 0}, then {expert, first row, rows, 0} of each tile
    const int* permuted_idx;    // row -> pair; null: row r is pair r
    const float* input_scale;   // by pair, or null
    const float* bias;          // (E, weight rows), or null
    const float* output_scale;  // by pair, or null
    const float* row_factor;    // by row of x, or null; if PARTED by row and part
    const float* column_factor; // (E, factor_columns): weight rows or 1; or null
    const uint8* x;
    const uint8* weights;
    Scales scales;       // of codes
    int part, row_parts; // if PARTED: elements of a part of a row, and parts
    X* out;
    int64 x_stride, expert_stride, weight_stride; // bytes
    int top_k, interleaved, K, outputs;           // top_k 0: row r of x is row r
    int factor_columns;
    int most_tiles, parts, column_blocks; // a tile of the schedule is cut into `parts` of BLOCK_ROWS
    int wide_stores;                      // rows of out begin at multiples of 16 bytes
    float alpha, beta, limit;
};

// What one CTA computes: `rows` rows from `row` on, outputs from `column` on. rows = 0: nothing.
struct Tile {
    int expert, row, rows, column;
};

// Column blocks are the outer loop within TILES_TOGETHER tiles, so that CTAs that run together share weights. The
// number of tiles is read beside the tile, not before it: that would cost a trip to memory. Both are read around the L1
// cache: a CTA that has not waited yet must not find the list of an earlier call there.
__device__ __forceinline__ Tile find_tile(const Problem& p)
{
    const int together = TILES_TOGETHER * p.column_blocks, group = blockIdx.x / together;
    const int within = blockIdx.x - group * together,
              height = min(TILES_TOGETHER, p.most_tiles - group * TILES_TOGETHER);
    const int block = within / height, index = group * TILES_TOGETHER + within - block * height;
    const int4 entry = __ldcg(p.schedule + 1 + index / p.parts); // beyond the last tile: anything
    const int skipped = index % p.parts * BLOCK_ROWS;
    const int rows = index / p.parts < __ldcg(&p.schedule[0].x) ? entry.z - skipped : 0;
    return {entry.x, entry.y + skipped, max(0, min(BLOCK_ROWS, rows)), block * TILE_OUTPUTS};
}

// Row of the weights (and of the bias) that makes the gate, or the up, of output i.
__device__ __forceinline__ int weight_row(const Problem& p, int i, int up)
{
    return p.interleaved ? 2 * i + up : i + up * p.outputs;
}

// Row of the weights that column c of a tile is: a gate (c / 8 even) or an up of output c / 16 * 8 + c % 8, or output c.
__device__ __forceinline__ int weight_row_of(const Problem& p, const Tile& tile, int c)
{
    const int output = tile.column + (GATED ? c / 16 * 8 + c % 8 : c);
    return weight_row(p, min(output, p.outputs - 1), GATED ? c / 8 % 2 : 0);
}

// One 16-byte chunk; of its bytes the first `left` exist, the others become zero.
template <int BYTES, bool ONCE>
__device__ __forceinline__ void copy_chunk(uint32 to, const uint8* from, int left)
{
    if constexpr (BYTES == 16 && ONCE) {
        copy_async_once(to, from, left > 0 ? 16 : 0);
    } else if constexpr (BYTES >= 4) {
#pragma unroll
        for (int i = 0; i < 16 / BYTES; ++i)
            copy_async<BYTES>(to + i * BYTES, from + i * BYTES, left > i * BYTES ? BYTES : 0);
    } else { // no asynchronous copy is that small
        using Part = typename Word<BYTES>::Type;
        uint32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; i += BYTES)
            if (i < left) words[i / 4] |= (uint32) * (const Part*)(from + i) << i % 4 * 8;
        store_words(to, words);
    }
}

// Where this thread puts its chunk of the first row that it copies, within the rows of a tile.
__device__ __forceinline__ uint32 first_place()
{
    const int row = threadIdx.x / 8;
    return kept(row * TILE_PITCH + ((threadIdx.x % 8 ^ row & 7) << 4));
}

// The rows of activations that this thread copies: chunk threadIdx.x % 8 of rows threadIdx.x / 8 + i * ROWS_A_PASS.
struct RowCopies {
    const uint8* from[X_PASSES];
    uint32 place;
    int passes, left; // rows that exist; bytes of K from this thread's chunk on

    __device__ __forceinline__ RowCopies(const Problem& p, const Tile& tile)
    {
        const int first = threadIdx.x / 8;
        place = first_place();
        passes = (tile.rows - first + ROWS_A_PASS - 1) / ROWS_A_PASS;
        left = p.K * ELEMENT - threadIdx.x % 8 * 16;
        int row[X_PASSES]; // beyond the tile: its last row again, for an address that exists
#pragma unroll
        for (int i = 0; i < X_PASSES; ++i) row[i] = tile.row + min(first + i * ROWS_A_PASS, tile.rows - 1);
        if (p.top_k) {
            if (p.permuted_idx)
#pragma unroll
                for (int i = 0; i < X_PASSES; ++i) row[i] = p.permuted_idx[row[i]];
#pragma unroll
            for (int i = 0; i < X_PASSES; ++i) row[i] = (uint32)row[i] / (uint32)p.top_k;
        }
#pragma unroll
        for (int i = 0; i < X_PASSES; ++i) from[i] = p.x + row[i] * p.x_stride + threadIdx.x % 8 * 16;
    }
    // Block k of K, 128 bytes, into the stage at `to`.
    __device__ __forceinline__ void copy(uint32 to, int k) const
    {
        const int row = threadIdx.x / 8;
        const int exist = left - k * TILE_PITCH;
#pragma unroll
        for (int i = 0; i < X_PASSES; ++i)
            if (BLOCK_ROWS % ROWS_A_PASS == 0 || row + i * ROWS_A_PASS < BLOCK_ROWS)
                copy_chunk<COPY_X, false>(to + place + i * ROWS_A_PASS * TILE_PITCH, from[i] + (uint32)k * TILE_PITCH,
                                          i < passes ? exist : 0);
    }
};

// The same of the weights, or of their codes.
struct WeightCopies {
    const uint8* from;
    int64 step; // bytes from one pass to the next
    uint32 place;
    int passes, left;

    __device__ __forceinline__ WeightCopies(const Problem& p, const Tile& tile)
    {
        constexpr int OUTPUTS_A_PASS = GATED ? W_ROWS_A_PASS / 2 : W_ROWS_A_PASS;
        const int first = threadIdx.x / W_CHUNKS, chunk = threadIdx.x % W_CHUNKS, up = GATED ? first / 8 % 2 : 0;
        const int output = tile.column + (GATED ? first / 16 * 8 + first % 8 : first);
        place = CODED ? WEIGHTS_AT + first * CODES_PITCH + chunk * 16 : first_place() + WEIGHTS_AT;
        passes = (p.outputs - output + OUTPUTS_A_PASS - 1) / OUTPUTS_A_PASS;
        left = (CODED ? p.K * PIECE_BYTES / PIECE : p.K * ELEMENT) - chunk * 16;
        from =
            kept(p.weights + tile.expert * p.expert_stride + weight_row(p, output, up) * p.weight_stride + chunk * 16);
        step = (GATED && p.interleaved ? 2 : 1) * OUTPUTS_A_PASS * p.weight_stride;
    }
    __device__ __forceinline__ void copy(uint32 to, int k) const
    {
        const int exist = left - k * CODES_PITCH;
#pragma unroll
        for (int i = 0; i < W_PASSES; ++i)
            if (BLOCK_COLUMNS % W_ROWS_A_PASS == 0 || threadIdx.x / W_CHUNKS + i * W_ROWS_A_PASS < BLOCK_COLUMNS)
                copy_chunk<COPY_W, true>(to + place + i * W_ROWS_A_PASS * CODES_PITCH,
                                         from + i * step + (uint32)k * CODES_PITCH, i < passes ? exist : 0);
    }
};

// ---- results ----

// Bias of tile output `column`, where there is one.
__device__ __forceinline__ float bias_at(const Problem& p, const Tile& tile, int column, int up)
{
    const int output = tile.column + column;
    if (output >= p.outputs) return 0.0f;
    return p.bias[(int64)tile.expert * (GATED ? 2 * p.outputs : p.outputs) + weight_row(p, output, up)];
}

// Scale of tile row `row`, 1 where there is none.
__device__ __forceinline__ float scale_at(const Problem& p, const float* scale, const Tile& tile, int row)
{
    if (!scale || row >= tile.rows) return 1.0f;
    return scale[p.permuted_idx ? p.permuted_idx[tile.row + row] : tile.row + row];
}

// Row of x that tile row `row` reads.
__device__ __forceinline__ int source_row(const Problem& p, const Tile& tile, int row)
{
    const int at = tile.row + row;
    return p.top_k ? (uint32)(p.permuted_idx ? p.permuted_idx[at] : at) / (uint32)p.top_k : at;
}

// Factor of the row of x that tile row `row` reads, and of the weights of tile output `column`; 1 where there is none.
__device__ __forceinline__ float row_factor_at(const Problem& p, const Tile& tile, int row)
{
    if (!FACTORED || PARTED || !p.row_factor || row >= tile.rows) return 1.0f;
    return p.row_factor[source_row(p, tile, row)];
}
__device__ __forceinline__ float column_factor_at(const Problem& p, const Tile& tile, int column, int up)
{
    const int output = tile.column + column;
    if (!FACTORED || !p.column_factor || output >= p.outputs) return 1.0f;
    const int row = p.factor_columns == 1 ? 0 : weight_row(p, output, up);
    return p.column_factor[(int64)tile.expert * p.factor_columns + row];
}

// What the sums of a part of K are multiplied by: ROWS rows and COLUMNS columns of a tile, as one thread has them.
template <int ROWS, int COLUMNS>
struct PartScales {
    const float* factors[ROWS]; // of the parts of each row
    const Rule::Scale* scales;  // of the expert
    int groups[COLUMNS];        // where those of each column begin
    int part, group_columns;

    template <typename RowOf, typename ColumnOf>
    __device__ __forceinline__ PartScales(const Problem& p, const Tile& tile, RowOf row_of, ColumnOf column_of)
    {
        if (!PARTED) return;
        part = p.part, group_columns = p.scales.group_columns;
        scales = p.scales.scale + (int64)tile.expert * p.scales.down * p.scales.across;
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            factors[i] = p.row_factor + (int64)source_row(p, tile, min(row_of(i), tile.rows - 1)) * p.row_parts;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
            groups[j] = weight_row_of(p, tile, column_of(j)) / p.scales.group_rows * p.scales.across;
    }
    // Whether the part ends with the element before k.
    __device__ __forceinline__ bool ends(int k, int K) const { return PARTED && (k >= K || k % part == 0); }
    __device__ __forceinline__ void load(int k, float (&row)[ROWS], float (&column)[COLUMNS]) const
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) row[i] = __ldg(factors[i] + (uint32)k / (uint32)part);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
            column[j] =
                PARTED == 2 ? Rule::prepare(__ldg(scales + groups[j] + (uint32)k / (uint32)group_columns), 1.0f) : 1.0f;
    }
};

// The total with the sums of one more part, which begin anew.
__device__ __forceinline__ void add_part(float& total, float& sum, float row, float column)
{
    total = __fmaf_rn(__fmul_rn(sum, column), row, total);
    sum = 0.0f;
}

// h before the activation; `row` and `column` are factors, if FACTORED.
__device__ __forceinline__ float rounded_h(float sum, float row, float column, float bias, float scale)
{
    if (FACTORED) sum = __fmul_rn(sum, __fmul_rn(row, column)); // never merged with the addition
    return rounded<X>((sum + bias) * scale);
}

__device__ __forceinline__ void stage_pair(float32* to, float low, float high) { *(float2*)to = {low, high}; }
template <typename T>
__device__ __forceinline__ void stage_pair(T* to, float low, float high)
{
    *(uint32*)to = store_pair<T>(low, high);
}

// From shared memory to memory, in pieces of 16 bytes where that is aligned.
__device__ __forceinline__ void store_tile(const Problem& p, const Tile& tile, const X* staged)
{
    constexpr int CHUNKS = TILE_OUTPUTS / CHUNK;
    for (int i = threadIdx.x; i < tile.rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * CHUNK, left = p.outputs - tile.column - column;
        const X* from = staged + row * STAGED_PITCH + column;
        X* to = p.out + (int64)(tile.row + row) * p.outputs + tile.column + column;
        if (p.wide_stores && left >= CHUNK)
            *(uint4*)to = *(const uint4*)from;
        else
#pragma unroll 1
            for (int j = 0; j < min(left, CHUNK); ++j) to[j] = from[j];
    }
}
