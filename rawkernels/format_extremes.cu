// format_extremes.cu: the smallest and the largest number of each group of an operand, and zero.
//
//   low[l, b, g] = min(x[l, n, k], 0), high[l, b, g] = max(x[l, n, k], 0) over the n, k of the group
//
// Shapes     x (L, N, K) X, low and high (L, Nb, Kb) float; groups as in format_pieces.cuh
// Work       TEAM threads a group, of one warp or a block; gridDim.y teams share a group that is large, and combine
//            what they find in low and high, which hold zeros. Of the threads of a group 2**log_across stand side by
//            side along K, at a piece each
// Numbers    exact: the same bits in any order; NaN is passed over
// Constants  X element type; WIDTH elements of a piece, 1 to 16 bytes; ALIGNED bytes of an address; TEAM a power of two,
//            up to 32 or BLOCK
// Launched   by formats.py

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define WIDTH 8
#define ALIGNED 16
#define TEAM 32
#define BLOCK 256
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "vectors.cuh"
#include "format_pieces.cuh"
#include "teams.cuh"

extern "C" __global__ __launch_bounds__(BLOCK)
void extremes(const X* x, uint32* low, uint32* high, int64 num_groups, int64 num_rows, int64 row_pieces, int64 rows,
              int64 pieces, int64 down, int64 across, int log_across)
{
    wait_for_previous();
    let_next_start();
    const int64 group = (int64)blockIdx.x * (BLOCK / TEAM) + threadIdx.x / TEAM;
    const uint32 thread = blockIdx.y * TEAM + threadIdx.x % TEAM;
    const uint32 columns = 1u << log_across, row_step = (gridDim.y * TEAM) >> log_across;
    float smallest = 0.0f, largest = 0.0f;
    if (group < num_groups) {
        const int64 b = quotient(group, across), matrix = quotient(b, down); // b counts through all matrices
        const int64 first = (group - b * across) * pieces, first_row = (b - matrix * down) * rows;
        const int64 last = first + pieces < row_pieces ? first + pieces : row_pieces;
        const int64 rows_here = first_row + rows < num_rows ? rows : num_rows - first_row;
        const X* row = x + (matrix * num_rows + first_row) * row_pieces * WIDTH;
        for (int64 n = thread >> log_across; n < rows_here; n += row_step) {
            for (int64 piece = first + (thread & (columns - 1)); piece < last; piece += columns) {
                X given[WIDTH];
                load_piece(row + (n * row_pieces + piece) * WIDTH, given);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    const float number = load(given[i]);
                    smallest = fminf(smallest, number);
                    largest = fmaxf(largest, number);
                }
            }
        }
    }
    // adding zero drops its sign; then both, as integers, grow with their size
    uint32 ends[2] = {__float_as_uint(__fadd_rn(smallest, 0.0f)), __float_as_uint(__fadd_rn(largest, 0.0f))};
    largest_of_team(ends);
    if (threadIdx.x % TEAM == 0 && group < num_groups) {
        if (gridDim.y == 1) {
            low[group] = ends[0];
            high[group] = ends[1];
        } else {
            atomicMax(low + group, ends[0]);
            atomicMax(high + group, ends[1]);
        }
    }
}
