// grouped_gemm_fma.cu: each expert's rows of activations times its weights, in IEEE float32 on the ordinary cores.
//
//   out[r] = activation(((x[source(r)] * input_scale) @ weights[expert of r].T * factors + bias) * output_scale)
//   factors = row_factor[source(r)] * column_factor[expert of r, row of the weights]
//   PARTED: as in grouped_gemm_wgmma.cu
//
// Shapes     x (rows, K), weights (E, N, K), out (R, outputs), all float32; N = 2 * outputs if GATED, else outputs
// Work       one CTA a tile of `schedule` and block of columns; WARPS_M x WARPS_N warps. A warp is 8 x 4 lanes; a lane
//            has every 8th row and every 4th column of the warp's part. A ring of STAGES stages: copies run STAGES - 1
//            stages of K ahead of the arithmetic. Warps without rows or columns copy only.
// Numbers    one chain of fused multiply-adds for each sum, K ascending, whatever the tile: a row's bits do not depend
//            on the other rows. x * input_scale is rounded once
// Constants  those of grouped_gemm_tile.cuh; STAGES, MIN_CTAS; SCALED: there is an input_scale
// Launched   by _grouped_gemm_mma.py, which chooses them

#include "numbers.cuh"
#include "overlap.cuh"
#include "activation.cuh"
#include "memory.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X float32
#define BLOCK_ROWS 128
#define BLOCK_COLUMNS 128
#define WARPS_M 2
#define WARPS_N 4
#define STAGES 3
#define MIN_CTAS 2
#define COPY_X 16
#define COPY_W 16
#define GATED 1
#define SCALED 0
#define FACTORED 0
#define CODED 0
#define PARTED 0
#define RULE fp8
#define ALIKE 16
#define ACTIVATION silu
#endif

#include "vectors.cuh"
#include "small_floats.cuh"
#include "format_rules.cuh"
#include "spread_codes.cuh"
#include "coded_weights.cuh"
#include "grouped_gemm_tile.cuh"

constexpr int ROWS = BLOCK_ROWS / WARPS_M / 8, COLUMNS = BLOCK_COLUMNS / WARPS_N / 4; // of a lane

static_assert(ROWS * WARPS_M * 8 == BLOCK_ROWS && COLUMNS * WARPS_N * 4 == BLOCK_COLUMNS && COLUMNS % 4 == 0, "");

// The part of a tile that a warp multiplies, as one lane sees it.
struct Warp {
    using Sums = float[ROWS][COLUMNS];
    int row, column;    // first ones of the warp, in the tile
    int lane_m, lane_n; // the lane has rows row + lane_m + 8 i, columns column + lane_n + 4 j
    float factor[ROWS]; // if SCALED, of its rows
    PartScales<ROWS, COLUMNS> parts;

    __device__ __forceinline__ Warp(const Problem& p, const Tile& tile)
        : row(threadIdx.x / 32 % WARPS_M * ROWS * 8), column(threadIdx.x / 32 / WARPS_M * COLUMNS * 4),
          lane_m(threadIdx.x % 32 / 4), lane_n(threadIdx.x % 4),
          parts(p, tile, [&](int i) { return row + lane_m + i * 8; }, [&](int j) { return column + lane_n + j * 4; })
    {
        if (SCALED)
#pragma unroll
            for (int i = 0; i < ROWS; ++i) factor[i] = scale_at(p, p.input_scale, tile, row + lane_m + i * 8);
    }
    __device__ __forceinline__ void begin(uint32 rows, uint32 weights) {}
    __device__ __forceinline__ void end(Sums& sums, uint32 rows, uint32 weights) {}
    // Four of K at a time: rows of a tile run along K.
    __device__ __forceinline__ void multiply(Sums& sums, uint32 rows, uint32 weights)
    {
        const uint32 a_at = rows + (row + lane_m) * TILE_PITCH;
        const uint32 b_at = weights + (column + lane_n) * TILE_PITCH;
#pragma unroll 2
        for (int chunk = 0; chunk < 8; ++chunk) {
            float4 a[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                a[i] = load_floats(a_at + i * 8 * TILE_PITCH + ((chunk ^ lane_m) << 4));
                if (SCALED) a[i] = {a[i].x * factor[i], a[i].y * factor[i], a[i].z * factor[i], a[i].w * factor[i]};
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const float4 b = load_floats(b_at + j * 4 * TILE_PITCH + ((chunk ^ (lane_n + j % 2 * 4)) << 4));
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    sums[i][j] = __fmaf_rn(a[i].x, b.x, sums[i][j]);
                    sums[i][j] = __fmaf_rn(a[i].y, b.y, sums[i][j]);
                    sums[i][j] = __fmaf_rn(a[i].z, b.z, sums[i][j]);
                    sums[i][j] = __fmaf_rn(a[i].w, b.w, sums[i][j]);
                }
            }
        }
    }
    // The sums of the part that ends with the block of element k.
    __device__ __forceinline__ void add(Sums& total, Sums& sums, int k) const
    {
        float of_row[ROWS], of_column[COLUMNS];
        parts.load(k, of_row, of_column);
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) add_part(total[i][j], sums[i][j], of_row[i], of_column[j]);
    }
    // Sums -> results, in rows of STAGED_PITCH elements. Of 16 columns, j % 4 < 2 are the gates of j % 4 + 2.
    __device__ __forceinline__ void finish(const Problem& p, const Tile& tile, const Sums& sums, X* staged) const
    {
        float bias[COLUMNS] = {};
        if (p.bias)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) bias[j] = bias_at(p, tile, output(j), GATED ? j / 2 % 2 : 0);
        float of_column[COLUMNS]; // factors
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) of_column[j] = column_factor_at(p, tile, output(j), GATED ? j / 2 % 2 : 0);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const float scale = scale_at(p, p.output_scale, tile, row + lane_m + i * 8);
            const float of_row = row_factor_at(p, tile, row + lane_m + i * 8);
            X* line = staged + (row + lane_m + i * 8) * STAGED_PITCH;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                if (GATED && j % 4 >= 2) continue;
                const int up = GATED ? j + 2 : j;
                const float h = rounded_h(sums[i][j], of_row, of_column[j], bias[j], scale);
                const float u = GATED ? rounded_h(sums[i][up], of_row, of_column[up], bias[up], scale) : h;
                line[output(j)] = activations::ACTIVATION(h, u, p.alpha, p.beta, p.limit);
            }
        }
    }
    // Tile output that column j of this lane is for.
    __device__ __forceinline__ int output(int j) const
    {
        const int at = column + lane_n + j * 4;
        return GATED ? at / 16 * 8 + at % 8 : at;
    }
};

#include "grouped_gemm_loop.cuh"
