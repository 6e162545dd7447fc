// grouped_gemm_wgmma.cu: each expert's rows of activations times its weights, on Hopper's tensor cores (sm_90a).
//
//   out[r] = activation(((x[source(r)] @ weights[expert of r].T) + bias) * output_scale)
//
// Shapes     x (rows, K) X, weights (E, N, K) X through a tensor map, out (R, OUTPUTS) X; N = 2 * OUTPUTS if GATED
// Work       unit = (tile of `schedule`, block of weight rows); a CTA takes units blockIdx.x, + gridDim.x, ...
//            warps 0-3 load: weights by the bulk tensor copy engine, rows likewise or (GATHERED) 16 bytes a thread;
//            each further warpgroup multiplies; a ring of `stages` buffers, 64 of K each, lies between them
// Operands   weights are on the side of wgmma that counts 64 rows a step, tokens on the other: a tile with fewer
//            than COLUMNS tokens runs with a smaller N. The tensor map has put 8 gate rows before the 8 up rows of
//            the same outputs, so that one thread holds both.
// Numbers    float32 sums along K in one order, whatever the tile; h and act(h) rounded once each
// Constants  X, WGMMA_TYPE; ACTIVATED, ACTIVATION, GATED; BIASED, SCALED, LIMITED: bias, output_scale, limit are given;
//            GATHERED: rows by permuted_idx; GROUPS warpgroups of M_BLOCKS x 64 weight rows, COLUMNS tokens;
//            MIN_CTAS of a multiprocessor; registers of both kinds of warps, 0: as compiled
// Launched   by _grouped_gemm_wgmma.py, which chooses the tiles

#include "numbers.cuh"
#include "overlap.cuh"
#include "activation.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define ACTIVATED 1
#define ACTIVATION silu
#define GATED 1
#define BIASED 0
#define SCALED 0
#define LIMITED 0
#define GATHERED 1
#define M_BLOCKS 1
#define COLUMNS 64
#define GROUPS 2
#define MIN_CTAS 1
#define PRODUCER_REGISTERS 56
#define CONSUMER_REGISTERS 224
#endif

constexpr int BLOCK_K = 64;                     // 128 bytes, the width of the swizzle
constexpr int WEIGHTS = 64 * M_BLOCKS * GROUPS; // rows of a tile
constexpr int TILE_OUTPUTS = GATED ? WEIGHTS / 2 : WEIGHTS;
constexpr int TOKENS_AT = WEIGHTS * 128, STAGE = (WEIGHTS + COLUMNS) * 128; // bytes: 128 of each row

// The next smaller N that a tile may run with: fine steps near COLUMNS, where most tiles are.
__device__ constexpr int smaller(int n)
{
    return n <= 8 ? 0 : COLUMNS <= 32 ? n - 8 : n <= 16 ? 0 : n > COLUMNS - 48 ? n - 16 : (n / 2 + 15) / 16 * 16;
}

// What every role of a kernel reads.
struct Problem {
    const int* permuted_idx; // null: row r is pair r
    X* out;
    const float* bias;         // (E, N), if BIASED
    const float* output_scale; // by pair, or null
    int outputs, interleaved;
    float alpha, beta, limit;
};

struct Unit {
    int expert, row, left, block; // `left` rows from `row` on; block of weight rows
};

// The tile list of permute.py: {count, ...}, then {expert, first row, rows, 0} each. `together` tiles share each block
// of weights while it is in L2.
struct Tiles {
    const int4* list;
    int blocks, together, count;
    int4 own; // of the first unit, if `together` is 1: no need to know the count before it is read

    // A thread that has not waited yet reads around the L1 cache, which may hold the list of an earlier call.
    template <bool WAITED>
    __device__ __forceinline__ int4 entry(int i) const
    {
        return WAITED ? list[i] : __ldcg(list + i);
    }
    template <bool WAITED = true>
    __device__ __forceinline__ void open()
    {
        own = entry<WAITED>(1 + blockIdx.x / blocks); // the grid has no more CTAs than the list has room for
        count = entry<WAITED>(0).x;
    }
    __device__ __forceinline__ int units() const { return count * blocks; }
    template <bool WAITED = true>
    __device__ __forceinline__ Unit at(int unit) const
    {
        const int whole = together * blocks, group = unit / whole, within = unit - group * whole;
        const int height = together == 1 ? 1 : min(together, count - group * together), block = within / height;
        const bool first = together == 1 && unit == blockIdx.x;
        const int4 tile = first ? own : entry<WAITED>(1 + group * together + within - block * height);
        return {tile.x, tile.y, tile.z, block};
    }
};

// The ring of buffers as one thread walks along it.
struct Ring {
    uint32 base, barriers;
    int stages, stage;
    uint32 parity;

    __device__ __forceinline__ uint32 buffer() const { return base + stage * STAGE; }
    __device__ __forceinline__ uint32 full() const { return barriers + stage * 8; }
    __device__ __forceinline__ uint32 empty() const { return barriers + (stages + stage) * 8; }
    __device__ __forceinline__ void next()
    {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

#include "grouped_gemm_wgmma_store.cuh"
#include "grouped_gemm_wgmma_roles.cuh"

extern "C" __global__ __launch_bounds__(128 + 128 * GROUPS, MIN_CTAS) void grouped_gemm(
    const __grid_constant__ TensorMap rows_map, const __grid_constant__ TensorMap weights_map, const int4* schedule,
    const int* permuted_idx, const uint8* x, const float* bias, const float* output_scale, X* out, int blocks, int K,
    int outputs, int interleaved, int top_k, int stages, int together, int ahead, float alpha, float beta, float limit)
{
    extern __shared__ uint8 shared[];
    const uint32 base = (shared_address(shared) + 1023) & ~1023u;
    const uint32 staging = base + stages * STAGE;
    const uint32 barriers = staging + GROUPS * STAGING;
    const uint32 scales = barriers + 2 * stages * 8;
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; ++s) {
            barrier_init(barriers + s * 8, GATHERED ? 1 + 128 : 1);
            barrier_init(barriers + (stages + s) * 8, GROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fetch_descriptor(&weights_map);
        if (!GATHERED) fetch_descriptor(&rows_map);
    }
    __syncthreads();

    const int k_blocks = (K + BLOCK_K - 1) / BLOCK_K;
    Tiles tiles{schedule, blocks, together};
    Ring ring{base, barriers, stages, 0, 0};
    if (threadIdx.x < 128) {
#if PRODUCER_REGISTERS
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
#endif
        ring.parity = 1;
        if (GATHERED)
            gather(tiles, ring, &weights_map, permuted_idx, x, K, k_blocks, top_k);
        else if (threadIdx.x == 0)
            fetch(tiles, ring, &weights_map, &rows_map, k_blocks, ahead);
        return;
    }
#if CONSUMER_REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
    wait_for_previous();
    tiles.open();
    const Problem problem{permuted_idx, out, bias, output_scale, outputs, interleaved, alpha, beta, limit};
    const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    consume(tiles, ring, problem, staging + group * STAGING, scales + group * SCALE_BYTES, k_blocks, group);
}
