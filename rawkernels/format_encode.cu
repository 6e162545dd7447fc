// format_encode.cu: numbers to codes of a small format, by scales that are known.
//
//   out[l, n, k] = code(x[l, n, k], prepare(scale of its group, global_scale[l]), zero point of its group)
//
// Shapes     x (L, N, K) X, out (L, N, K) bytes, or (L, N, K/2) with the even k in the low four bits; scale (L, Nb, Kb)
//            S, zero_points (L, Nb, Kb) bytes or null, global_scale (L,) float; groups as in format_pieces.cuh
// Work       one thread a piece
// Numbers    float32, every operation rounded (format_rules.cuh)
// Constants  X element type; S dtype of the scales, uint8 for codes; RULE of encoders; WIDTH elements of a piece, even
//            where two share a byte; ALIGNED bytes of an address
// Launched   by formats.py

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define S float32
#define RULE fp8
#define WIDTH 16
#define ALIGNED 16
#define BLOCK 256
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "vectors.cuh"
#include "small_floats.cuh"
#include "format_rules.cuh"
#include "format_pieces.cuh"

using Rule = encoders::RULE;
constexpr int BYTES = Rule::PACKED ? WIDTH / 2 : WIDTH;

extern "C" __global__ __launch_bounds__(BLOCK)
void encode(const X* x, const S* scale, const uint8* zero_points, const float* global_scale, uint8* out,
            int64 num_pieces, int64 num_rows, int64 row_pieces, int64 rows, int64 pieces, int64 down, int64 across)
{
    wait_for_previous();
    let_next_start();
    const int64 piece = (int64)blockIdx.x * BLOCK + threadIdx.x;
    if (piece >= num_pieces) return;
    X given[WIDTH];
    load_piece(x + piece * WIDTH, given);
    const Place place = place_of(piece, {num_rows, row_pieces, rows, pieces, down, across});
    const auto p = Rule::prepare(stored(scale[place.group]), global_scale[place.matrix]);
    const int zero = Rule::ZERO != 0 && zero_points != nullptr ? zero_points[place.group] : Rule::ZERO;

    uint8 bytes[BYTES];
#pragma unroll
    for (int i = 0; i < BYTES; ++i) {
        if constexpr (Rule::PACKED) {
            const uint32 even = Rule::code(load(given[2 * i]), p, zero),
                         odd = Rule::code(load(given[2 * i + 1]), p, zero);
            bytes[i] = even | odd << 4;
        } else {
            bytes[i] = Rule::code(load(given[i]), p, zero);
        }
    }
    store_piece(out + piece * BYTES, bytes);
}
