// act.cu: gated activations of whole arrays; as fast as memory gives and takes.
//
//   out[r, i] = act(g, u)
//
// Shapes     out (R, I) X; x (R, 2I) X with g = x[r, i], u = x[r, I + i] (HALVES) or g = x[r, 2i], u = x[r, 2i + 1]
//            (ALTERNATING), or x (R, I) with g alone (ALONE)
// Work       a piece is BYTES of a row of out; a thread has piece blockIdx.x * BLOCK + threadIdx.x, then every piece
//            `stride` further
// Numbers    float32, one rounding at the store
// Constants  X element type; LAYOUT 0 HALVES, 1 ALTERNATING, 2 ALONE; BYTES 16, 8, 4 or 2, which divides I and every
//            address; ACTIVATION
// Launched   by act.py, which hands ALONE over as one row

#include "numbers.cuh"
#include "overlap.cuh"
#include "activation.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define LAYOUT 0
#define BYTES 16
#define BLOCK 256
#define ACTIVATION silu
#endif

constexpr int COUNT = BYTES / sizeof(X); // elements of a piece

struct __align__(BYTES) Piece {
    X at[COUNT];
};

extern "C" __global__
__launch_bounds__(BLOCK)
void moe_activation(const Piece* x, Piece* out, int64 pieces, int64 pieces_a_row, int64 stride, int64 rows_a_stride,
                    float alpha, float beta, float limit)
{
    wait_for_previous();
    let_next_start();
    const uint32 start = blockIdx.x * BLOCK + threadIdx.x; // less than `stride`, which has 32 bits
    const int64 rest = stride - rows_a_stride * pieces_a_row;
    int64 row = start < pieces_a_row ? 0 : start / (uint32)pieces_a_row, column = start - row * pieces_a_row;
    for (int64 piece = start; piece < pieces; piece += stride) {
        const Piece *first = x + piece, *second = first;
        if (LAYOUT == 0) first += row * pieces_a_row, second = first + pieces_a_row;
        if (LAYOUT == 1) first += piece, second = first + 1;
        const Piece a = *first, b = *second;
        Piece y;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const X g = LAYOUT != 1 ? a.at[i] : 2 * i < COUNT ? a.at[2 * i % COUNT] : b.at[2 * i % COUNT];
            const X u = LAYOUT != 1         ? b.at[i]
                        : 2 * i + 1 < COUNT ? a.at[(2 * i + 1) % COUNT]
                                            : b.at[(2 * i + 1) % COUNT];
            y.at[i] = store<X>(activations::ACTIVATION(load(g), load(u), alpha, beta, limit));
        }
        out[piece] = y;
        row += rows_a_stride;
        column += rest;
        if (column >= pieces_a_row) column -= pieces_a_row, ++row;
    }
}
