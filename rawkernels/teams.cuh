// teams.cuh: the largest in a team of threads, which is a part of a warp, a warp, or a block.
//
// Constants  TEAM threads of a team, a power of two up to 32, or BLOCK, those of a block. Every thread of the block calls

constexpr uint32 WARP = 0xFFFFFFFF;

__device__ __forceinline__ uint32 largest_of_warp(uint32 value) // of a team, where that is a part
{
    if constexpr (TEAM >= 32) {
        value = __reduce_max_sync(WARP, value);
    } else {
#pragma unroll
        for (int offset = TEAM / 2; offset > 0; offset /= 2) {
            const uint32 other = __shfl_xor_sync(WARP, value, offset);
            value = value > other ? value : other;
        }
    }
    return value;
}

// Each of `values` becomes the largest of its kind in the team.
template <int COUNT>
__device__ __forceinline__ void largest_of_team(uint32 (&values)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = largest_of_warp(values[i]);
    if constexpr (TEAM > 32) {
        __shared__ uint32 found[COUNT][BLOCK / 32];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (threadIdx.x % 32 == 0) found[i][threadIdx.x / 32] = values[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = largest_of_warp(found[i][threadIdx.x % (BLOCK / 32)]);
    }
}
