// grouped_gemm_wgmma.cu: each expert's rows of activations times its weights, on Hopper's tensor cores (sm_90a).
//
//   out[r] = activation((x[source(r)] @ weights[expert of r].T * factors + bias) * output_scale)
//   factors = row_factor[source(r)] * column_factor[expert of r, row of the weights]
//   PARTED: the product is sum over parts of K of ((x[source(r), part] @ weights[expert of r, part].T * scale of the
//   weights' group) * row_factor[source(r), part]), and factors are of columns only
//
// Shapes     x (rows, K) X, weights (E, N, K) X through a tensor map, out (R, OUTPUTS) X; N = 2 * OUTPUTS if GATED
// Work       unit = (tile of `schedule`, block of weight rows). A CTA takes unit blockIdx.x, then whichever is next: warp
//            1 draws it and announces it; warp 0 loads weights by the bulk tensor copy engine, and rows likewise, or
//            (GATHERED) warps 2 and 3 load them, 16 bytes a thread; each further warpgroup multiplies; a ring of
//            `stages` buffers, 64 of K each, lies between them. If CODED, a ring of codes lies before it, from which
//            one more warpgroup makes the weights; then warp 2 loads rows that are not gathered
// Operands   weights are on the side of wgmma that counts 64 rows a step, tokens on the other: a tile with fewer
//            than COLUMNS tokens runs with a smaller N. The tensor map has put 8 gate rows before the 8 up rows of
//            the same outputs, so that one thread holds both. Two M_BLOCKS take every other 8 rows, so that a warp
//            holds 32 neighbours.
// Numbers    float32 sums along K in one order, whatever the tile; h and act(h) rounded once each
// Constants  X, WGMMA_TYPE; ACTIVATED, ACTIVATION, GATED; BIASED, SCALED, LIMITED: bias, output_scale, limit are given;
//            FACTORED: a row_factor or a column_factor is; GATHERED: rows by permuted_idx; GROUPS warpgroups of
//            M_BLOCKS x 64 weight rows, COLUMNS tokens; MIN_CTAS of a multiprocessor; registers of each kind of
//            warps, 0: as compiled; CODED, with those of coded_weights.cuh; PARTED: the row_factor is (rows, parts),
//            2: scales are not in the weights; PART_BLOCKS of K at a time
// Launched   by _grouped_gemm_wgmma.py, which chooses the tiles

#include "numbers.cuh"
#include "overlap.cuh"
#include "activation.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"
#include "small_floats.cuh"
#include "format_rules.cuh"
#include "spread_codes.cuh"
#include "coded_weights.cuh"

#ifndef X // defaults, so that an editor can read this file alone
#define X bfloat16
#define ACTIVATED 1
#define ACTIVATION silu
#define GATED 1
#define BIASED 0
#define SCALED 0
#define FACTORED 0
#define LIMITED 0
#define GATHERED 1
#define M_BLOCKS 1
#define COLUMNS 64
#define GROUPS 2
#define MIN_CTAS 1
#define PRODUCER_REGISTERS 56
#define CONSUMER_REGISTERS 224
#define DECODER_REGISTERS 0
#define CODED 0
#define PARTED 0
#define PART_BLOCKS 2
#define RULE fp8
#define ALIKE 16
#endif

constexpr int BLOCK_K = 64;                     // 128 bytes, the width of the swizzle
constexpr int WEIGHTS = 64 * M_BLOCKS * GROUPS; // rows of a tile
constexpr int TILE_OUTPUTS = GATED ? WEIGHTS / 2 : WEIGHTS;
constexpr int TOKENS_AT = WEIGHTS * 128, STAGE = (WEIGHTS + COLUMNS) * 128; // bytes: 128 of each row
constexpr int CODES = WEIGHTS * BLOCK_K / PIECE * PIECE_BYTES;              // bytes of codes of a stage
constexpr int GATHERING = 64;                                               // threads
constexpr int CONSUMERS_AT = CODED ? 8 : 4;                                 // warp
constexpr int THREADS = (CONSUMERS_AT + 4 * GROUPS) * 32;

// Take or leave registers; a warpgroup starts with its share of all. 0: leave them as they are.
template <int COUNT>
__device__ __forceinline__ void set_registers()
{
    constexpr int SHARE = 65536 / (THREADS * MIN_CTAS) / 8 * 8;
    if constexpr (COUNT > SHARE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else if constexpr (COUNT > 0)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The next smaller N that a tile may run with: fine steps near COLUMNS, where most tiles are.
__device__ constexpr int smaller(int n)
{
    return n <= 8 ? 0 : COLUMNS <= 32 ? n - 8 : n <= 16 ? 0 : n > COLUMNS - 48 ? n - 16 : (n / 2 + 15) / 16 * 16;
}

// What every role of a kernel reads.
struct Problem {
    const int* permuted_idx; // null: row r is pair r
    X* out;
    const float* bias;                       // (E, N), if BIASED
    const float* output_scale;               // by pair, or null
    const float *row_factor, *column_factor; // by row of x; (E, factor_columns): weight rows or 1; null: ones
    int outputs, interleaved, factor_columns;
    float alpha, beta, limit;
    int part, parts; // if PARTED: elements of K that share a factor of a row, and the room for factors of a row
};

struct Unit {
    int expert, row, left, block; // `left` rows from `row` on, 0: there is no further unit; block of weight rows
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
template <int BYTES>
struct RingOf {
    uint32 base, barriers;
    int stages, stage;
    uint32 parity;

    __device__ __forceinline__ uint32 buffer() const { return base + stage * BYTES; }
    __device__ __forceinline__ uint32 full() const { return barriers + stage * 8; }
    __device__ __forceinline__ uint32 empty() const { return barriers + (stages + stage) * 8; }
    __device__ __forceinline__ void next()
    {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

using Ring = RingOf<STAGE>;
using CodeRing = RingOf<CODES>;

// What warp 1 tells the others of a unit, which is the CTA's n-th: two places, for the unit in work and the one to come.
struct Announced {
    uint32 barriers, units, rows, scales, factors;

    __device__ __forceinline__ explicit Announced(uint32 base) : barriers(base), units(base + 64), rows(base + 96)
    {
        scales = rows + (GATHERED ? 2 * COLUMNS * 4 : 0);
        factors = scales + (SCALED ? 2 * COLUMNS * 4 : 0);
    }
    static constexpr int BYTES = 96 + 2 * COLUMNS * 4 * (GATHERED + SCALED + (FACTORED || PARTED));

    __device__ __forceinline__ uint32 told(int n) const { return barriers + n % 2 * 8; } // the unit is there
    __device__ __forceinline__ uint32 detailed(int n) const
    {
        return barriers + 16 + n % 2 * 8;
    } // rows, scales, factors too
    __device__ __forceinline__ uint32 free(int n) const { return barriers + 32 + n % 2 * 8; }
    __device__ __forceinline__ uint32 wanted() const { return barriers + 48; } // warp 0 will soon need the next
    __device__ __forceinline__ uint32 parity(int n) const { return n / 2 % 2; }
    __device__ __forceinline__ uint32 rows_of(int n) const { return rows + n % 2 * COLUMNS * 4; }
    __device__ __forceinline__ uint32 scales_of(int n) const { return scales + n % 2 * COLUMNS * 4; }
    __device__ __forceinline__ uint32 factors_of(int n) const { return factors + n % 2 * COLUMNS * 4; }

    __device__ __forceinline__ void init() const
    {
        for (int n = 0; n < 2; ++n) {
            barrier_init(told(n), 1);
            barrier_init(detailed(n), 32); // whoever writes or reads shared memory arrives
            barrier_init(free(n), 1 + (GATHERED ? GATHERING : CODED) + (CODED + GROUPS) * 128);
        }
        barrier_init(wanted(), 1);
    }
    __device__ __forceinline__ Unit wait(int n) const
    {
        barrier_wait(told(n), parity(n));
        const uint4 u = load_chunk(units + n % 2 * 16);
        return {(int)u.x, (int)u.y, (int)u.z, (int)u.w};
    }
};

#include "grouped_gemm_wgmma_store.cuh"
#include "grouped_gemm_wgmma_parts.cuh"
#include "grouped_gemm_wgmma_roles.cuh"
#include "grouped_gemm_wgmma_codes.cuh"

extern "C" __global__ __launch_bounds__(THREADS, MIN_CTAS) void grouped_gemm(
    const __grid_constant__ TensorMap rows_map, const __grid_constant__ TensorMap weights_map, int4* schedule,
    const int* permuted_idx, const uint8* x, const Rule::Scale* scale, const uint8* zero_points, const float* bias,
    const float* output_scale, const float* row_factor, const float* column_factor, X* out, int group_rows,
    int group_columns, int down, int across, int blocks, int K, int outputs, int interleaved, int factor_columns,
    int part, int parts, int top_k, int stages, int code_stages, int together, int ahead, float kept, float alpha,
    float beta, float limit)
{
    extern __shared__ __align__(1024) uint8 shared[]; // the swizzle counts from multiples of 1024
    const uint32 base = shared_address(shared), codes = base + stages * STAGE;
    const uint32 staging = CODED ? codes + code_stages * CODES : codes;
    const uint32 barriers = staging + GROUPS * 4 * STAGING, code_barriers = barriers + 2 * stages * 8;
    const uint32 factors = CODED ? code_barriers + 2 * code_stages * 8 : code_barriers;
    const Announced announced(PARTED ? factors + GROUPS * 2 * FACTORS : factors);
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; ++s) {
            barrier_init(barriers + s * 8, (CODED ? 128 : GATHERED) + (GATHERED ? GATHERING : 1));
            barrier_init(barriers + (stages + s) * 8, GROUPS * 4);
        }
        for (int s = 0; CODED && s < code_stages; ++s) {
            barrier_init(code_barriers + s * 8, 1);
            barrier_init(code_barriers + (code_stages + s) * 8, 128);
        }
        announced.init();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fetch_descriptor(&weights_map);
        if (!GATHERED) fetch_descriptor(&rows_map);
    }
    __syncthreads();

    const int k_blocks = (K + BLOCK_K - 1) / BLOCK_K, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const Tiles tiles{schedule, blocks, together};
    const Problem problem{permuted_idx,   out,   bias, output_scale, row_factor, column_factor, outputs, interleaved,
                          factor_columns, alpha, beta, limit,        part,       parts};
    const Scales scales{scale, zero_points, group_rows, group_columns, down, across};
    Ring ring{base, barriers, stages, 0, 0};
    CodeRing code_ring{codes, code_barriers, code_stages, 0, 0};
    if (CODED && warp >= 4 && warp < 8) {
        set_registers<DECODER_REGISTERS>();
        ring.parity = 1;
        decode_units(announced, code_ring, ring, problem, scales, K, k_blocks);
        return;
    }
    if (warp < 4) {
        set_registers<PRODUCER_REGISTERS>();
        ring.parity = code_ring.parity = 1;
        if (warp == 1)
            announce(tiles, announced, problem, (uint32*)schedule + 1, K / 8, top_k);
        else if (CODED && threadIdx.x == 0)
            fetch(tiles, announced, code_ring, &weights_map, &rows_map, k_blocks, ahead);
        else if (threadIdx.x == 0)
            fetch(tiles, announced, ring, &weights_map, &rows_map, k_blocks, ahead);
        else if (CODED && !GATHERED && threadIdx.x == 64)
            fetch_rows(announced, ring, &rows_map, k_blocks);
        else if (GATHERED && warp > 1)
            gather(announced, ring, x, k_blocks, K / 8, kept);
        return;
    }
    set_registers<CONSUMER_REGISTERS>();
    wait_for_previous();
    const int group = (warp - CONSUMERS_AT) / 4;
    const uint32 results = staging + (warp - CONSUMERS_AT) * STAGING;
    consume(announced, ring, problem, scales, results, factors, k_blocks, group);
}
