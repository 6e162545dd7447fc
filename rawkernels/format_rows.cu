// format_rows.cu: rows of activations as what their codes in a small format are worth, read and written once.
//
//   s = SCALE(largest |x| of the group), code = CODE(x[r, k] by s), numbers[r, k] = worth of the code, times s; or
//   factor[r, group] = s, and then numbers[r, k] without it
//
// Shapes     x and numbers (R, K) X, which may be the same; groups of group_cols elements of a row, fewer at its end.
//            scale (1,) float, of all groups if GIVEN; global_scale (1,) or (R,) float, or null; factor (R, groups
//            or more) float or null
// Work       TEAM threads a group, of one warp or a block. A thread has every TEAM-th piece of WIDTH elements: it keeps the
//            first ones in registers, and the others of a long row it reads again
// Numbers    float32, every operation rounded (format_rules.cuh), and the result once more to X; NaN is not the largest
// Constants  X element type; SCHEME of decoders, SCALE of scale_rules, CODE of encoders; GIVEN 0 or 1; WIDTH elements of a
//            piece; ALIGNED bytes of an address; TEAM a power of two, up to 32 or BLOCK
// Launched   by formats.py

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define SCHEME fp8
#define SCALE fp8
#define CODE fp8
#define GIVEN 0
#define WIDTH 8
#define ALIGNED 16
#define TEAM 256
#define BLOCK 256
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "vectors.cuh"
#include "small_floats.cuh"
#include "format_rules.cuh"
#include "format_pieces.cuh"
#include "teams.cuh"

using Encoder = encoders::CODE;
using Decoder = decoders::SCHEME;
constexpr int KEPT = GIVEN || TEAM < 32 ? 1 : 4; // pieces in registers while the largest is sought
constexpr bool MAY_BE_LONG = GIVEN || TEAM > 32; // formats.py gives other teams no more than they keep

__device__ __forceinline__ float larger(float largest, const X (&given)[WIDTH])
{
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) largest = fmaxf(largest, fabsf(load(given[i])));
    return largest;
}

// The scale of a group in which nothing is larger, or its code.
__device__ __forceinline__ auto scale_of(const float* scale, float largest, float limit)
{
    if constexpr (GIVEN)
        return *scale;
    else
        return scale_rules::SCALE(0.0f, largest, limit);
}

template <typename P>
__device__ __forceinline__ void quantise(X* numbers, const X (&given)[WIDTH], P by, float worth)
{
    X written[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
        written[i] = store<X>(Decoder::number(Encoder::code(load(given[i]), by, 0), worth, 0));
    store_piece(numbers, written);
}

// Of a row, `across` groups and `row_pieces`; of a group, `pieces`. `is_by_row`: each row has its own global scale.
// `stride` factors of a row, of which `groups_a_row` are filled: rows of whole groups are given as more rows of one each.
extern "C" __global__ __launch_bounds__(BLOCK)
void quantise_rows(const X* x, const float* scale, const float* global_scale, X* numbers, float* factor,
                   int64 num_groups, int64 across, int64 row_pieces, uint32 pieces, int is_by_row, int64 groups_a_row,
                   int64 stride)
{
    wait_for_previous();
    let_next_start();
    const int64 group = (int64)blockIdx.x * (BLOCK / TEAM) + threadIdx.x / TEAM;
    const bool is_there = group < num_groups;
    const int64 row = quotient(is_there ? group : 0, across), before = (group - row * across) * pieces;
    const uint32 count = !is_there ? 0 : before + pieces < row_pieces ? pieces : row_pieces - before;
    const uint32 thread = threadIdx.x % TEAM;
    x += (row * row_pieces + before) * WIDTH;
    numbers += (row * row_pieces + before) * WIDTH;

    X kept[KEPT][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (thread + i * TEAM < count) load_piece(x + (int64)(thread + i * TEAM) * WIDTH, kept[i]);
    float largest = 0.0f;
    if constexpr (!GIVEN) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) largest = larger(largest, kept[i]);
#pragma unroll 1
        for (uint32 piece = thread + KEPT * TEAM; MAY_BE_LONG && piece < count; piece += TEAM) {
            X again[WIDTH];
            load_piece(x + (int64)piece * WIDTH, again);
            largest = larger(largest, again);
        }
        uint32 bits[1] = {__float_as_uint(largest)}; // as integers they grow with their size
        largest_of_team(bits);
        largest = __uint_as_float(bits[0]);
    }
    if (!is_there) return;

    const float limit = limit_of(global_scale, is_by_row ? row : 0);
    const auto s = scale_of(scale, largest, limit);
    const auto by = Encoder::prepare(s, limit);
    const float worth = factor == nullptr ? Decoder::prepare(s, 1.0f) : 1.0f;
    if (factor != nullptr && thread == 0) {
        const int64 of_row = quotient(group, groups_a_row);
        factor[of_row * stride + group - of_row * groups_a_row] = s;
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (thread + i * TEAM < count) quantise(numbers + (int64)(thread + i * TEAM) * WIDTH, kept[i], by, worth);
#pragma unroll 1
    for (uint32 piece = thread + KEPT * TEAM; MAY_BE_LONG && piece < count; piece += TEAM) {
        X again[WIDTH];
        load_piece(x + (int64)piece * WIDTH, again);
        quantise(numbers + (int64)piece * WIDTH, again, by, worth);
    }
}
