// format_decode.cu: codes of a small format to numbers.
//
//   out[l, n, k] = number(codes[l, n, k], prepare(scale of its group, global_scale[l]), zero point of its group)
//
// Shapes     as in format_encode.cu, with codes in the place of its out, and out (L, N, K) X
// Work       one thread a piece
// Numbers    float32, every operation rounded (format_rules.cuh), and the result once more to X
// Constants  X element type; S dtype of the scales, uint8 for codes; RULE of decoders; WIDTH elements of a piece, even
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

using Rule = decoders::RULE;
constexpr int BYTES = Rule::PACKED ? WIDTH / 2 : WIDTH;

extern "C" __global__ __launch_bounds__(BLOCK)
void decode(const uint8* codes, const S* scale, const uint8* zero_points, const float* global_scale, X* out,
            int64 num_pieces, int64 num_rows, int64 row_pieces, int64 rows, int64 pieces, int64 down, int64 across)
{
    wait_for_previous();
    let_next_start();
    const int64 piece = (int64)blockIdx.x * BLOCK + threadIdx.x;
    if (piece >= num_pieces) return;
    uint8 bytes[BYTES];
    load_piece(codes + piece * BYTES, bytes);
    const Place place = place_of(piece, {num_rows, row_pieces, rows, pieces, down, across});
    const float p = Rule::prepare(stored(scale[place.group]), global_scale[place.matrix]);
    const int zero = Rule::ZERO != 0 && zero_points != nullptr ? zero_points[place.group] : Rule::ZERO;

    X numbers[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const uint32 code = !Rule::PACKED ? bytes[i] : i % 2 == 0 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4;
        numbers[i] = store<X>(Rule::number(code, p, zero));
    }
    store_piece(out + piece * WIDTH, numbers);
}
