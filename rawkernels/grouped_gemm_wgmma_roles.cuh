// grouped_gemm_wgmma_roles.cuh: what the warps of grouped_gemm_wgmma.cu do. Included by that file only.

// ---- scheduling ----

// One warp: which units this CTA does, the rows, scales and factors of each. The first is unit blockIdx.x. The others are drawn
// when they are needed, so that neighbours in the list run at the same time and find each other's operands in L2, and
// no CTA is left with more work than the others. The counter wraps to zero with the last draw: of all CTAs that have
// a unit at all, each draws once for each further unit and once in vain, which are as many draws as units.
__device__ __forceinline__ void announce(Tiles tiles, const Announced& announced, const Problem& p, uint32* drawn,
                                         int row_chunks, int top_k)
{
    constexpr int DETAILS = (COLUMNS + 31) / 32;
    const int lane = threadIdx.x % 32;
    wait_for_previous();
    if (lane == 0) let_next_start();
    tiles.open();
    const int units = tiles.units();
    int unit = blockIdx.x;
    for (int n = 0;; ++n) {
        const Unit u = unit < units ? tiles.at(unit) : Unit{0, 0, 0, 0};
        barrier_wait(announced.free(n), announced.parity(n) ^ 1);
        if (lane == 0) {
            store_chunk(announced.units + n % 2 * 16, u.expert, u.row, u.left, u.block);
            barrier_arrive(announced.told(n));
        }
        if (u.left == 0) return;
        if (GATHERED || SCALED || FACTORED || PARTED) {
            int pair[DETAILS];
#pragma unroll
            for (int i = 0; i < DETAILS; ++i) {
                const int row = u.row + min(lane + i * 32, u.left - 1);
                pair[i] = p.permuted_idx ? p.permuted_idx[row] : row;
            }
#pragma unroll
            for (int i = 0; i < DETAILS; ++i) {
                const int at = (lane + i * 32) * 4;
                if (lane + i * 32 >= COLUMNS) break;
                const int tile_row = u.row + min(lane + i * 32, u.left - 1);
                const int source = GATHERED ? pair[i] / top_k : tile_row;
                if (GATHERED) store_shared(announced.rows_of(n) + at, (uint32)source * (uint32)row_chunks);
                if (SCALED) store_shared(announced.scales_of(n) + at, __float_as_uint(p.output_scale[pair[i]]));
                if (PARTED)
                    store_shared(announced.factors_of(n) + at, (uint32)source * (uint32)p.parts);
                else if (FACTORED) {
                    const float factor = p.row_factor ? p.row_factor[source] : 1.0f;
                    store_shared(announced.factors_of(n) + at, __float_as_uint(factor));
                }
            }
            barrier_arrive(announced.detailed(n));
        }
        if (units > gridDim.x) {
            barrier_wait(announced.wanted(), n & 1);
            if (lane == 0) unit = gridDim.x + atomicInc(drawn, units - 1);
            unit = __shfl_sync(~0u, unit, 0);
        } else {
            unit = units;
        }
    }
}

// ---- loading ----

// One thread: weights or their codes, and unless GATHERED the rows beside weights, by the copy engine. Rows past the
// expert's end are another expert's: never stored.
template <typename Filled>
__device__ __forceinline__ void fetch(Tiles tiles, const Announced& announced, Filled ring,
                                      const TensorMap* weights_map, const TensorMap* rows_map, int k_blocks, int ahead)
{
    constexpr bool WITH_ROWS = !GATHERED && !CODED;
    constexpr int BYTES = CODED ? CODES : GATHERED ? WEIGHTS * 128 : STAGE, BLOCK = WEIGHTS / (GATED ? 16 : 8);
    constexpr int ELEMENTS = CODED ? CODES / WEIGHTS : BLOCK_K; // of the map, in a block of K
    constexpr int EARLY = 6; // k blocks: the next unit is asked for as late as its answer allows
    int primed = 0;
    if (!GATHERED && ahead) { // `schedule` is older than the kernel before this one: its weights need not wait
        tiles.open<false>();
        if (blockIdx.x < tiles.units()) {
            const Unit u = tiles.at<false>(blockIdx.x);
            Filled first = ring;
            for (primed = 0; primed < min(ring.stages, k_blocks); ++primed, first.next()) {
                barrier_arrive_expecting(first.full(), BYTES);
                copy_weights(first.buffer(), weights_map, first.full(), primed * ELEMENTS, u.block * BLOCK, u.expert);
            }
        }
    }
    wait_for_previous(); // which may have written the weights
    for (int n = 0;; ++n, primed = 0) {
        const Unit u = announced.wait(n);
        barrier_arrive(announced.free(n));
        if (u.left == 0) return;
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
            if (k == max(0, k_blocks - EARLY)) barrier_arrive(announced.wanted());
            if (k >= primed) {
                barrier_wait(ring.empty(), ring.parity);
                barrier_arrive_expecting(ring.full(), BYTES);
                copy_weights(ring.buffer(), weights_map, ring.full(), k * ELEMENTS, u.block * BLOCK, u.expert);
            }
            if (WITH_ROWS) copy_rows(ring.buffer() + TOKENS_AT, rows_map, ring.full(), k * BLOCK_K, u.row);
        }
    }
}

// 64 threads: rows by index, 16 bytes a copy; thread t has chunk t % 8 of rows t / 8, + 8, ...
__device__ __forceinline__ void gather(const Announced& announced, Ring ring, const uint8* x, int k_blocks,
                                       int row_chunks, float kept)
{
    constexpr int STRIDE = GATHERING / 8, COPIES = COLUMNS / STRIDE;
    const int thread = threadIdx.x % GATHERING, first_row = thread / 8, chunk = thread % 8;
    const uint32 place = TOKENS_AT + first_row * 128 + ((chunk ^ first_row) << 4);
    const uint64 policy = keep_in_l2(kept);
    wait_for_previous();
    for (int n = 0;; ++n) {
        const Unit u = announced.wait(n);
        if (u.left == 0) return;
        barrier_wait(announced.detailed(n), announced.parity(n));
        uint32 start[COPIES]; // in chunks: T * H <= 2**35, as the launcher makes sure
#pragma unroll
        for (int i = 0; i < COPIES; ++i)
            start[i] = load_word(announced.rows_of(n) + (first_row + STRIDE * i) * 4) + chunk;
        barrier_arrive(announced.free(n));
        const int needed = (u.left - first_row + STRIDE - 1) / STRIDE; // what else the tile multiplies is never stored
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
            barrier_wait(ring.empty(), ring.parity);
            const int bytes = k * 8 + chunk < row_chunks ? 16 : 0; // K may end within the block
#pragma unroll
            for (int i = 0; i < COPIES; ++i)
                if (i < needed)
                    copy_chunk(ring.buffer() + place + i * STRIDE * 128,
                               x + ((uint64)start[i] + (bytes ? k * 8 : 0)) * 16, bytes, policy);
            barrier_arrive_after_copies(ring.full());
        }
    }
}

// ---- multiplying ----

// d = weights @ rows.T of a unit, its first N tokens; if PARTED, of scaled parts.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[M_BLOCKS][COLUMNS / 2], Ring& ring, PartScales& scales,
                                         PartFactors& factors, int k_blocks, int group)
{
    if constexpr (PARTED) return multiply_parts<N>(d, ring, scales, factors, k_blocks, group);
    const bool first_lane = threadIdx.x % 32 == 0;
    const uint64 rows = group * M_BLOCKS * 512; // descriptors count 16 bytes
    constexpr uint64 block = 1024 >> 4;         // of M_BLOCKS: from its first 8 rows to those of the next
    uint32 previous = 0;
    for (int k = 0; k < k_blocks; ++k) {
        barrier_wait(ring.full(), ring.parity);
        if (GATHERED) shared_writes_visible();
        const uint64 m = matrix_descriptor(ring.buffer(), M_BLOCKS) + rows;
        const uint64 n = matrix_descriptor(ring.buffer() + TOKENS_AT);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
#pragma unroll
            for (int i = 0; i < M_BLOCKS; ++i)
                Wgmma<N>::multiply(d[i], m + i * block + step * 2, n + step * 2, k > 0 || step > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && first_lane) barrier_arrive(previous);
        previous = ring.empty();
        ring.next();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (first_lane) barrier_arrive(previous);
}

// The same with the least N that covers `tokens`.
template <int N>
__device__ __forceinline__ void multiply_tokens(int tokens, float (&d)[M_BLOCKS][COLUMNS / 2], Ring& ring,
                                                PartScales& scales, PartFactors& factors, int k_blocks, int group)
{
    if constexpr (smaller(N) > 0)
        if (tokens <= smaller(N)) return multiply_tokens<smaller(N)>(tokens, d, ring, scales, factors, k_blocks, group);
    multiply<N>(d, ring, scales, factors, k_blocks, group);
}

// A warp of a warpgroup: multiply and store all units of this CTA.
__device__ __forceinline__ void consume(const Announced& announced, Ring ring, const Problem& p, const Scales& scales,
                                        uint32 staging, uint32 places, int k_blocks, int group)
{
    for (int n = 0;; ++n) {
        const Unit unit = announced.wait(n);
        if (unit.left == 0) return;
        // on their way while the products run
        const OfRows biases = load_biases(p, unit, group), factors = load_factors(p, unit, group);
        float d[M_BLOCKS][COLUMNS / 2];
        PartScales part_scales(p, unit, scales, group);
        PartFactors part_factors(announced, p, n, places + group * 2 * FACTORS, group);
        multiply_tokens<COLUMNS>(unit.left, d, ring, part_scales, part_factors, k_blocks, group);
        if (SCALED || FACTORED) barrier_wait(announced.detailed(n), announced.parity(n));
        store_tile(d, p, biases, factors, unit, staging, announced.scales_of(n), announced.factors_of(n), group);
        barrier_arrive(announced.free(n));
    }
}
