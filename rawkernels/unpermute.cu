// unpermute.cu: rows of experts added up per token, in token order.
//
//   unpermute      out[t, h] = sum over j of topk_weights[t, j] * y[inv_permuted_idx[t, j], h]
//   weighted_sum   out[t, h] = sum over j of topk_weights[t, j] * x[t, j, h]
//
// Shapes     y (R, H) X, rows `row_stride` apart; x (T, k, H) X with any strides; inv_permuted_idx and topk_ids (T, k)
//            INDEX; topk_weights (T, k) float, if WEIGHTED; expert_map (E,) int; out (T, H) X. Strides in elements.
// Skipped    a row outside 0..num_rows-1, or not below *last_offset; an id below 0, or not in the map: never read
// Work       grid (T, parts); one thread owns WIDTH neighbouring outputs. Lane j of a warp finds out where row j lies
//            and tells the others, so that all rows of a token (TOGETHER at a time) are on their way at once
// Numbers    float32 sum from +0, j ascending, one rounding at the store: same bits on every run, for any grid
// Launched   by unpermute.py, which chooses BYTES so that every load is aligned, and whole warps

#include "numbers.cuh"
#include "overlap.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define INDEX int
#define WEIGHTED 0
#define TOGETHER 8
#define BYTES 16
#endif

constexpr int WIDTH = BYTES / sizeof(X);
constexpr int WARP = 32;
constexpr int MAX_THREADS = 256;
constexpr int64 SKIPPED = -0x7fffffffffffffff - 1; // no offset of an element

struct alignas(BYTES) Piece {
    X x[WIDTH];
};

// The store of a piece as one: left to itself the compiler of CUDA 13.0 takes it apart for sm_80 to sm_90.
__device__ __forceinline__ void put(X* at, const Piece& piece)
{
    if constexpr (BYTES == 16) {
        const uint4 word = *reinterpret_cast<const uint4*>(&piece);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x), "r"(word.y), "r"(word.z),
                     "r"(word.w)
                     : "memory");
    } else if constexpr (BYTES == 8) {
        const uint2 word = *reinterpret_cast<const uint2*>(&piece);
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word.x), "r"(word.y) : "memory");
    } else if constexpr (BYTES == 4) {
        asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(*reinterpret_cast<const uint32*>(&piece)) : "memory");
    } else {
        *reinterpret_cast<Piece*>(at) = piece;
    }
}

// Rows that `inv_permuted_idx` names.
struct PermutedRows {
    const INDEX* rows; // of this token
    int64 num_rows, row_stride;

    __device__ __forceinline__ int64 start(int j) const
    {
        const int64 row = rows[j];
        return row >= 0 && row < num_rows ? row * row_stride : SKIPPED;
    }
};

// The choices of a token where they lie.
struct Choices {
    const INDEX* ids; // of this token, or null
    const int* expert_map;
    int64 num_experts, token_start, choice_stride;

    __device__ __forceinline__ int64 start(int j) const
    {
        int64 expert = ids ? (int64)ids[j] : 0;
        if (ids && expert_map) expert = expert >= 0 && expert < num_experts ? expert_map[expert] : -1;
        return expert >= 0 ? token_start + j * choice_stride : SKIPPED;
    }
};

// Add the rows of a token in WIDTH columns from `column` on. Without any row they become zero, or stay as they are if
// `keep`. Called by whole warps; a thread with `column` >= `columns` helps to find the rows.
template <typename Rows>
__device__ __forceinline__ void add_up(const X* x, const Rows& rows, const float* weights, int top_k,
                                       int64 column_stride, int64 column, int64 columns, bool keep, X* out)
{
    const int lane = threadIdx.x % WARP;
    const bool owns = column < columns;
    float sum[WIDTH] = {};
    bool any = false;
    for (int base = 0; base < top_k; base += WARP) {
        int64 my_start = SKIPPED;
        float my_weight = 1.0f;
        if (base + lane < top_k) {
            my_start = rows.start(base + lane);
            if (WEIGHTED) my_weight = weights[base + lane];
        }
        const uint32 found = __ballot_sync(~0u, my_start != SKIPPED);
        any |= found != 0;
        for (int first = 0; first < min(WARP, top_k - base); first += TOGETHER) {
            Piece piece[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const int64 start = __shfl_sync(~0u, my_start, first + j);
                if (owns && found >> (first + j) & 1)
                    piece[j] = *reinterpret_cast<const Piece*>(x + start + column * column_stride);
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const float weight = WEIGHTED ? __shfl_sync(~0u, my_weight, first + j) : 1.0f;
                if (!(found >> (first + j) & 1)) continue;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) sum[i] += WEIGHTED ? weight * load(piece[j].x[i]) : load(piece[j].x[i]);
            }
        }
    }
    if (!owns || (keep && !any)) return;
    Piece result;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) result.x[i] = store<X>(sum[i]);
    put(out + column, result);
}

// First column of a thread in its block's first, second, ... range of columns; a block has more than one range only
// where there are more than a grid has blocks.
struct Columns {
    int64 first, step;

    __device__ __forceinline__ Columns()
        : first((int64)blockIdx.y * blockDim.x * WIDTH), step((int64)gridDim.y * blockDim.x * WIDTH)
    {
    }
};

extern "C" __global__ __launch_bounds__(MAX_THREADS)
void unpermute(const X* y, const INDEX* inv_permuted_idx, const float* topk_weights, const int64* last_offset, X* out,
               int64 num_rows, int64 row_stride, int64 columns, int top_k)
{
    wait_for_previous();
    let_next_start();
    if (last_offset) num_rows = min(num_rows, *last_offset);
    const int64 token = blockIdx.x, first_pair = token * top_k;
    const PermutedRows rows{inv_permuted_idx + first_pair, num_rows, row_stride};
    const Columns range;
    for (int64 first = range.first; first < columns; first += range.step)
        add_up(y, rows, topk_weights + first_pair, top_k, 1, first + threadIdx.x * WIDTH, columns, false,
               out + token * columns);
}

extern "C" __global__ __launch_bounds__(MAX_THREADS)
void weighted_sum(const X* x, const INDEX* topk_ids, const int* expert_map, const float* topk_weights, X* out,
                  int64 num_experts, int64 token_stride, int64 choice_stride, int64 column_stride, int64 columns,
                  int top_k, int keep)
{
    wait_for_previous();
    let_next_start();
    const int64 token = blockIdx.x, first_pair = token * top_k;
    const Choices choices{topk_ids ? topk_ids + first_pair : nullptr, expert_map, num_experts, token * token_stride,
                          choice_stride};
    const Columns range;
    for (int64 first = range.first; first < columns; first += range.step)
        add_up(x, choices, topk_weights + first_pair, top_k, column_stride, first + threadIdx.x * WIDTH, columns,
               keep != 0, out + token * columns);
}
