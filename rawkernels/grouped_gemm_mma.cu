// grouped_gemm_mma.cu: each expert's rows of activations times its weights, on the tensor cores of any CUDA GPU from
// sm_80 on (mma.sync, cp.async). X = float32 multiplies in tf32.
//
//   out[r] = activation(((x[source(r)] * input_scale) @ weights[expert of r].T * factors + bias) * output_scale)
//   factors = row_factor[source(r)] * column_factor[expert of r, row of the weights]
//   PARTED: as in grouped_gemm_wgmma.cu
//
// Shapes     x (rows, K) X, weights (E, N, K) X, out (R, outputs) X; N = 2 * outputs if GATED, else outputs
// Work       one CTA a tile of `schedule` and block of columns; WARPS_M x WARPS_N warps, each with its part of the
//            sums. A ring of STAGES stages: copies run STAGES - 1 stages of K ahead of the arithmetic, fragments one
//            step of 32 bytes ahead. Warps without rows or columns copy only.
// Numbers    float32 sums, K ascending, whatever the tile: a row's bits do not depend on the other rows.
//            x * input_scale, h and act(h) are rounded once each
// Constants  those of grouped_gemm_tile.cuh; STAGES, MIN_CTAS; SCALED: there is an input_scale
// Launched   by _grouped_gemm_mma.py, which chooses them

#include "numbers.cuh"
#include "overlap.cuh"
#include "activation.cuh"
#include "memory.cuh"
#include "mma.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define BLOCK_ROWS 128
#define BLOCK_COLUMNS 128
#define WARPS_M 2
#define WARPS_N 2
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

constexpr int M_STEPS = BLOCK_ROWS / WARPS_M / 16, N_STEPS = BLOCK_COLUMNS / WARPS_N / 8; // products of a warp
constexpr int K_STEPS = TILE_PITCH / 32;

static_assert(M_STEPS * WARPS_M * 16 == BLOCK_ROWS && N_STEPS * WARPS_N * 8 == BLOCK_COLUMNS && N_STEPS % 2 == 0, "");

struct Fragments {
    uint32 a[M_STEPS][4], b[N_STEPS][2];
};

// The part of a tile that a warp multiplies.
struct Warp {
    using Sums = float[M_STEPS][N_STEPS][4];

    int row, column; // first ones, in the tile
    uint32 a_at, b_at, a_turn, b_turn;
    float factor[M_STEPS][2]; // if SCALED, of the rows of this lane's fragments
    Fragments f[2];           // one is multiplied while the other is loaded
    PartScales<M_STEPS * 2, N_STEPS * 2> parts;

    __device__ __forceinline__ Warp(const Problem& p, const Tile& tile)
        : row(threadIdx.x / 32 % WARPS_M * M_STEPS * 16), column(threadIdx.x / 32 / WARPS_M * N_STEPS * 8),
          parts(
              p, tile, [&](int i) { return row + i * 8 + threadIdx.x % 32 / 4; },
              [&](int j) { return column + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; })
    {
        const int lane = threadIdx.x % 32;
        a_at = (row + lane % 16) * TILE_PITCH;
        a_turn = (lane / 16 ^ lane % 8) << 4;
        b_at = (column + lane / 16 * 8 + lane % 8) * TILE_PITCH;
        b_turn = (lane / 8 % 2 ^ lane % 8) << 4;
        if (SCALED)
#pragma unroll
            for (int i = 0; i < M_STEPS * 2; ++i)
                factor[i / 2][i % 2] = scale_at(p, p.input_scale, tile, row + i * 8 + lane / 4);
    }
    __device__ __forceinline__ void begin(uint32 rows, uint32 weights) { load(0, rows, weights, 0); }
    // All steps of a stage but the last, whose fragments end up loaded: the stage may be filled anew.
    __device__ __forceinline__ void multiply(Sums& sums, uint32 rows, uint32 weights)
    {
#pragma unroll
        for (int step = 0; step < K_STEPS - 1; ++step) {
            load((step + 1) % 2, rows, weights, step + 1);
            multiply_step(sums, step % 2);
        }
    }
    __device__ __forceinline__ void end(Sums& sums, uint32 rows, uint32 weights)
    {
        load(0, rows, weights, 0);
        multiply_step(sums, (K_STEPS - 1) % 2);
    }
    __device__ __forceinline__ void load(int which, uint32 rows, uint32 weights, int step)
    {
        Fragments& to = f[which];
#pragma unroll
        for (int m = 0; m < M_STEPS; ++m)
            load_matrices(to.a[m][0], to.a[m][1], to.a[m][2], to.a[m][3],
                          rows + a_at + (a_turn ^ step << 5) + m * 16 * TILE_PITCH);
#pragma unroll
        for (int n = 0; n < N_STEPS; n += 2)
            load_matrices(to.b[n][0], to.b[n][1], to.b[n + 1][0], to.b[n + 1][1],
                          weights + b_at + (b_turn ^ step << 5) + n * 8 * TILE_PITCH);
    }
    __device__ __forceinline__ void multiply_step(Sums& sums, int which)
    {
        Fragments& of = f[which];
#pragma unroll
        for (int m = 0; m < M_STEPS; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (SCALED) of.a[m][i] = Fragment<X>::scaled(of.a[m][i], factor[m][i % 2]);
                of.a[m][i] = Fragment<X>::ready(of.a[m][i]);
            }
#pragma unroll
        for (int n = 0; n < N_STEPS; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) of.b[n][i] = Fragment<X>::ready(of.b[n][i]);
#pragma unroll
        for (int m = 0; m < M_STEPS; ++m)
#pragma unroll
            for (int n = 0; n < N_STEPS; ++n) Fragment<X>::multiply(sums[m][n], of.a[m], of.b[n]);
    }
    // The sums of the part that ends with the block of element k.
    __device__ __forceinline__ void add(Sums& total, Sums& sums, int k) const
    {
        float of_row[M_STEPS * 2], of_column[N_STEPS * 2];
        parts.load(k, of_row, of_column);
#pragma unroll
        for (int m = 0; m < M_STEPS; ++m)
#pragma unroll
            for (int n = 0; n < N_STEPS; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    add_part(total[m][n][i], sums[m][n][i], of_row[m * 2 + i / 2], of_column[n * 2 + i % 2]);
    }
    // Sums -> results, in rows of STAGED_PITCH elements.
    __device__ __forceinline__ void finish(const Problem& p, const Tile& tile, const Sums& sums, X* staged) const
    {
        const int lane = threadIdx.x % 32, first = row + lane / 4;
        constexpr int GROUP = GATED ? 2 : 1; // 8-column products that make 8 outputs
        float scale[M_STEPS * 2];
#pragma unroll
        for (int m = 0; m < M_STEPS * 2; ++m) scale[m] = scale_at(p, p.output_scale, tile, first + m * 8);
        float bias[N_STEPS][2] = {}; // of each product's columns
        if (p.bias)
#pragma unroll
            for (int n = 0; n < N_STEPS; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    bias[n][c] = bias_at(p, tile, (column / 8 + n) / GROUP * 8 + lane % 4 * 2 + c, GATED ? n % 2 : 0);
        float of_row[M_STEPS * 2], of_column[N_STEPS][2]; // factors
#pragma unroll
        for (int m = 0; m < M_STEPS * 2; ++m) of_row[m] = row_factor_at(p, tile, first + m * 8);
#pragma unroll
        for (int i = 0; i < N_STEPS * 2; ++i) {
            const int n = i / 2, at = (column / 8 + n) / GROUP * 8 + lane % 4 * 2 + i % 2;
            of_column[n][i % 2] = column_factor_at(p, tile, at, GATED ? n % 2 : 0);
        }
#pragma unroll
        for (int n = 0; n < N_STEPS; n += GROUP) {
            const int at = (column / 8 + n) / GROUP * 8 + lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < M_STEPS * 2; ++m) {
                float v[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int up = n + GROUP - 1;
                    const auto value = [&](int n) {
                        const float sum = sums[m / 2][n][m % 2 * 2 + c];
                        return rounded_h(sum, of_row[m], of_column[n][c], bias[n][c], scale[m]);
                    };
                    const float h = value(n), u = GATED ? value(up) : h;
                    v[c] = activations::ACTIVATION(h, u, p.alpha, p.beta, p.limit);
                }
                stage_pair(staged + (first + m * 8) * STAGED_PITCH + at, v[0], v[1]);
            }
        }
    }
};

#include "grouped_gemm_loop.cuh"
