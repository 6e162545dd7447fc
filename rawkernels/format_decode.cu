// format_decode.cu: codes of a small format to numbers.
//
//   out[l, n, k] = number(codes[l, n, k], prepare(scale of its group, global_scale[l]), zero point of its group)
//
// Shapes     as in format_encode.cu, with codes in the place of its out, and out (L, N, K) X
// Work       one thread a piece; decode_experts: those matrices only that have rows by expert_first_token_offset (L + 1,),
//            as one line of pieces, of which every thread takes each gridDim.x * BLOCK-th
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
constexpr int RESIDENT = 4; // blocks of decode_experts that a multiprocessor has room for, and gets

__device__ __forceinline__ void decode_piece(const uint8* codes, const S* scale, const uint8* zero_points,
                                             const float* global_scale, X* out, int64 piece, const Groups& groups)
{
    uint8 bytes[BYTES];
    load_piece(codes + piece * BYTES, bytes);
    const Place place = place_of(piece, groups);
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

extern "C" __global__ __launch_bounds__(BLOCK)
void decode(const uint8* codes, const S* scale, const uint8* zero_points, const float* global_scale, X* out,
            int64 num_pieces, int64 num_rows, int64 row_pieces, int64 rows, int64 pieces, int64 down, int64 across)
{
    wait_for_previous();
    let_next_start();
    const int64 piece = (int64)blockIdx.x * BLOCK + threadIdx.x;
    if (piece >= num_pieces) return;
    decode_piece(codes, scale, zero_points, global_scale, out, piece,
                 {num_rows, row_pieces, rows, pieces, down, across});
}

// `num_pieces` and the groups are those of one matrix.
extern "C" __global__ __launch_bounds__(BLOCK, RESIDENT) void decode_experts(
    const uint8* codes, const S* scale, const uint8* zero_points, const float* global_scale,
    const int64* expert_first_token_offset, X* out, int num_experts, int64 num_pieces, int64 num_rows, int64 row_pieces,
    int64 rows, int64 pieces, int64 down, int64 across)
{
    wait_for_previous();
    let_next_start();
    const Groups groups{num_rows, row_pieces, rows, pieces, down, across};
    const int lane = threadIdx.x % 32;
    int64 piece = (int64)blockIdx.x * BLOCK + threadIdx.x; // from the first piece of the expert in work
    for (int first = 0; first < num_experts; first += 32) {
        const int e = first + lane;
        const int64* offset = expert_first_token_offset + e;
        uint32 used = __ballot_sync(~0u, e < num_experts && offset[0] < offset[1]);
        for (; used != 0; used &= used - 1, piece -= num_pieces) {
            const int64 expert = first + __ffs(used) - 1, group = expert * down * across, before = expert * num_pieces;
            for (; piece < num_pieces; piece += (int64)gridDim.x * BLOCK)
                decode_piece(codes + before * BYTES, scale + group, zero_points ? zero_points + group : nullptr,
                             global_scale + expert, out + before * WIDTH, piece, groups);
        }
    }
}
