// format_scales.cu: scales and zero points of groups, from their extremes.
//
//   scale[l, b, g] = RULE(low[l, b, g], high[l, b, g], limits[l]),  out[l, b, g] = the nearest of 0..most to -low / scale
//
// Shapes     low, high (L, G) float and out (L, G), scales S, zero points bytes, G = Nb Kb; limits (L,) float or null
// Work       one thread a group
// Numbers    float32, every operation rounded (format_rules.cuh), a scale that is no code once more to S
// Constants  S dtype of the scales, uint8 for codes; RULE of scale_rules
// Launched   by formats.py

#include "numbers.cuh"
#include "overlap.cuh"
#include "small_floats.cuh"
#include "format_rules.cuh"

#ifndef S
#define S float32
#define RULE int8
#define BLOCK 256
#endif

template <typename T>
__device__ __forceinline__ T as_stored(float scale)
{
    return store<T>(scale);
}
template <typename T>
__device__ __forceinline__ T as_stored(uint32 code)
{
    return code;
}

extern "C" __global__ __launch_bounds__(BLOCK)
void scales(const float* low, const float* high, const float* limits, S* out, int64 num_groups, int64 groups_a_matrix)
{
    wait_for_previous();
    let_next_start();
    const int64 group = (int64)blockIdx.x * BLOCK + threadIdx.x;
    if (group >= num_groups) return;
    out[group] = as_stored<S>(scale_rules::RULE(low[group], high[group], limit_of(limits, group / groups_a_matrix)));
}

extern "C" __global__ __launch_bounds__(BLOCK)
void zero_points(const float* low, const S* scale, uint8* out, int64 num_groups, float most)
{
    wait_for_previous();
    let_next_start();
    const int64 group = (int64)blockIdx.x * BLOCK + threadIdx.x;
    if (group < num_groups) out[group] = zero_point(low[group], load(scale[group]), most);
}
