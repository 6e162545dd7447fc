// grouped_gemm_wgmma_codes.cuh: what the warps between the two rings of grouped_gemm_wgmma.cu do if the weights are codes.
// Included by that file only.

// Blocks of K that scales are asked for ahead: of small tiles more, whose blocks pass sooner.
constexpr int AHEAD = WEIGHTS <= 64 ? 4 : WEIGHTS <= 128 ? 2 : 1;

// A warpgroup: codes of the ring `codes` to numbers in the ring that the others multiply from.
__device__ __forceinline__ void decode_units(const Announced& announced, CodeRing codes, Ring ring, const Problem& p,
                                             const Scales& scales, int K, int k_blocks)
{
    Decoder<128, WEIGHTS, BLOCK_K, AHEAD> decoder(threadIdx.x % 128, K);
    wait_for_previous(); // which may have written the scales
    for (int n = 0;; ++n) {
        const Unit unit = announced.wait(n);
        barrier_arrive(announced.free(n));
        if (unit.left == 0) return;
        decoder.open(scales, unit.expert, [&](int r) { return weight_row_of(p, unit, r); });
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) decoder.ask(a, a * BLOCK_K);
        for (int k = 0; k < k_blocks; k += AHEAD) {
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (k + a >= k_blocks) break;
                const auto now = decoder;
                decoder.ask(a, (k + a + AHEAD) * BLOCK_K);
                barrier_wait(codes.full(), codes.parity);
                barrier_wait(ring.empty(), ring.parity);
                now.decode(a, codes.buffer(), ring.buffer(), (k + a) * BLOCK_K);
                shared_writes_visible();
                barrier_arrive(ring.full());
                barrier_arrive(codes.empty());
                codes.next();
                ring.next();
            }
        }
    }
}

// One thread: the rows, where they are not gathered. Those past the expert's end are another expert's: never stored.
__device__ __forceinline__ void fetch_rows(const Announced& announced, Ring ring, const TensorMap* rows_map,
                                           int k_blocks)
{
    wait_for_previous();
    for (int n = 0;; ++n) {
        const Unit unit = announced.wait(n);
        barrier_arrive(announced.free(n));
        if (unit.left == 0) return;
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
            barrier_wait(ring.empty(), ring.parity);
            barrier_arrive_expecting(ring.full(), COLUMNS * 128);
            copy_rows(ring.buffer() + TOKENS_AT, rows_map, ring.full(), k * BLOCK_K, unit.row);
        }
    }
}
