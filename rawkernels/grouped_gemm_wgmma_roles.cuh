// grouped_gemm_wgmma_roles.cuh: what the warps of grouped_gemm_wgmma.cu do. Included by that file only.

// ---- loading ----

// One thread: weights and rows by the copy engine. Rows past the expert's end are another expert's: never stored.
__device__ __forceinline__ void fetch(Tiles tiles, Ring ring, const TensorMap* weights_map, const TensorMap* rows_map,
                                      int k_blocks, int ahead)
{
    int unit = blockIdx.x, primed = 0;
    if (ahead) { // `schedule` is older than the kernel before this one: its weights need not wait
        tiles.open<false>();
        if (unit < tiles.units()) {
            const Unit u = tiles.at<false>(unit);
            Ring first = ring;
            for (primed = 0; primed < min(ring.stages, k_blocks); ++primed, first.next()) {
                barrier_arrive_expecting(first.full(), STAGE);
                copy_weights(first.buffer(), weights_map, first.full(), primed * BLOCK_K,
                             u.block * (WEIGHTS / (GATED ? 16 : 8)), u.expert);
            }
        }
    }
    wait_for_previous();
    let_next_start();
    tiles.open();
    for (; unit < tiles.units(); unit += gridDim.x, primed = 0) {
        const Unit u = tiles.at(unit);
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
            if (k >= primed) {
                barrier_wait(ring.empty(), ring.parity);
                barrier_arrive_expecting(ring.full(), STAGE);
                copy_weights(ring.buffer(), weights_map, ring.full(), k * BLOCK_K,
                             u.block * (WEIGHTS / (GATED ? 16 : 8)), u.expert);
            }
            copy_rows(ring.buffer() + TOKENS_AT, rows_map, ring.full(), k * BLOCK_K, u.row);
        }
    }
}

// 128 threads: rows by index, 16 bytes a copy; thread t has chunk t % 8 of rows t / 8, + 16, ...
__device__ __forceinline__ void gather(Tiles tiles, Ring ring, const TensorMap* weights_map, const int* permuted_idx,
                                       const uint8* x, int K, int k_blocks, int top_k)
{
    constexpr int STRIDE = 16, COPIES = (COLUMNS + STRIDE - 1) / STRIDE;
    const int thread = threadIdx.x, first_row = thread / 8, chunk = thread % 8;
    const uint32 place = TOKENS_AT + first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
    const int row_chunks = K / 8;
    wait_for_previous();
    if (thread == 0) let_next_start();
    tiles.open();
    int primed = 0;
    for (int unit = blockIdx.x; unit < tiles.units(); unit += gridDim.x) {
        const Unit u = tiles.at(unit);
        const int block = u.block * (WEIGHTS / (GATED ? 16 : 8));
        if (unit == blockIdx.x) { // the first weights set out before the indices are known
            primed = min(ring.stages, k_blocks);
            Ring first = ring;
            for (int k = 0; k < primed && thread == 0; ++k, first.next()) {
                barrier_arrive_expecting(first.full(), WEIGHTS * 128);
                copy_weights(first.buffer(), weights_map, first.full(), k * BLOCK_K, block, u.expert);
            }
        }
        uint32 start[COPIES]; // in chunks: T * H <= 2**35, as the launcher makes sure
        int needed = 0;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int r = first_row + STRIDE * i;
            const int pair = permuted_idx[u.row + min(r, u.left - 1)];
            start[i] = (uint32)(pair / top_k) * (uint32)row_chunks + chunk;
            if (r < u.left) needed = i + 1; // what else the tile multiplies is never stored
        }
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
            barrier_wait(ring.empty(), ring.parity);
            if (thread == 0 && k >= primed) {
                barrier_arrive_expecting(ring.full(), WEIGHTS * 128);
                copy_weights(ring.buffer(), weights_map, ring.full(), k * BLOCK_K, block, u.expert);
            }
            const int bytes = k * 8 + chunk < row_chunks ? 16 : 0; // K may end within the block
#pragma unroll
            for (int i = 0; i < COPIES; ++i)
                if (i < needed)
                    copy_chunk(ring.buffer() + place + i * STRIDE * 128,
                               x + ((uint64)start[i] + (bytes ? k * 8 : 0)) * 16, bytes);
            barrier_arrive_after_copies(ring.full());
        }
        primed = 0;
    }
}

// ---- multiplying ----

// d = weights @ rows.T of a unit, its first N tokens.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[M_BLOCKS][COLUMNS / 2], Ring& ring, int k_blocks, int group)
{
    const bool first_lane = threadIdx.x % 32 == 0;
    const uint64 rows = group * M_BLOCKS * 512; // descriptors count 16 bytes
    uint32 previous = 0;
    for (int k = 0; k < k_blocks; ++k) {
        barrier_wait(ring.full(), ring.parity);
        if (GATHERED) shared_writes_visible();
        const uint64 m = matrix_descriptor(ring.buffer()) + rows, n = matrix_descriptor(ring.buffer() + TOKENS_AT);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
#pragma unroll
            for (int i = 0; i < M_BLOCKS; ++i)
                Wgmma<N>::multiply(d[i], m + i * 512 + step * 2, n + step * 2, k > 0 || step > 0);
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
__device__ __forceinline__ void multiply_tokens(int tokens, float (&d)[M_BLOCKS][COLUMNS / 2], Ring& ring, int k_blocks,
                                                int group)
{
    if constexpr (smaller(N) > 0)
        if (tokens <= smaller(N)) return multiply_tokens<smaller(N)>(tokens, d, ring, k_blocks, group);
    multiply<N>(d, ring, k_blocks, group);
}

// One warpgroup: multiply and store all units of this CTA.
__device__ __forceinline__ void consume(Tiles tiles, Ring ring, const Problem& p, uint32 staging, uint32 scales,
                                        int k_blocks, int group)
{
    for (int at = blockIdx.x; at < tiles.units(); at += gridDim.x) {
        const Unit unit = tiles.at(at);
        const Extras extras = load_extras(p, unit, group); // on its way while the products run
        float d[M_BLOCKS][COLUMNS / 2];
        multiply_tokens<COLUMNS>(unit.left, d, ring, k_blocks, group);
        store_tile(d, p, extras, unit, staging, scales, group);
    }
}
