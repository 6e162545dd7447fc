// grouped_gemm_loop.cuh: the kernel of the grouped products other than wgmma: a ring of stages, filled STAGES - 1 ahead of
// the arithmetic; codes become numbers while the stage before theirs is multiplied. Included by grouped_gemm_mma.cu and
// grouped_gemm_fma.cu only, behind their `Warp`, which takes rows and weights of a stage:
//
//   begin(rows, weights)             before the first stage
//   multiply(sums, rows, weights)    when it returns, nothing of the stage is needed any more
//   end(sums, rows, weights)         those of the next one, which have landed
//   parts, add(total, sums, k)       if PARTED, behind the last stage of a part
//   finish(..., sums, staged)        results into shared memory

// Groups of copies that may be on their way while a stage is multiplied: the next one's codes have landed.
constexpr int PENDING = CODED ? STAGES - 3 : STAGES - 2;
static_assert(PENDING >= 0, "");

extern "C" __global__ __launch_bounds__(THREADS, MIN_CTAS) void grouped_gemm(
    const int4* schedule, const uint8* x, const int* permuted_idx, const float* input_scale, const uint8* weights,
    const Rule::Scale* scale, const uint8* zero_points, const float* bias, const float* output_scale,
    const float* row_factor, const float* column_factor, X* out, int group_rows, int group_columns, int down,
    int across, int64 x_stride, int64 expert_stride, int64 weight_stride, int top_k, int interleaved, int K,
    int outputs, int factor_columns, int part, int row_parts, int most_tiles, int parts, int column_blocks,
    int wide_stores, int ahead, float alpha, float beta, float limit)
{
    Problem p;
    p.schedule = schedule, p.permuted_idx = permuted_idx;
    p.input_scale = input_scale, p.output_scale = output_scale, p.bias = bias;
    p.row_factor = row_factor, p.column_factor = column_factor, p.factor_columns = factor_columns;
    p.x = x, p.weights = weights, p.out = out;
    p.part = part, p.row_parts = row_parts;
    p.scales = {scale, zero_points, group_rows, group_columns, down, across};
    p.x_stride = x_stride, p.expert_stride = expert_stride, p.weight_stride = weight_stride;
    p.top_k = top_k, p.interleaved = interleaved, p.K = K, p.outputs = outputs;
    p.most_tiles = most_tiles, p.parts = parts, p.column_blocks = column_blocks, p.wide_stores = wide_stores;
    p.alpha = alpha, p.beta = beta, p.limit = limit;
    extern __shared__ __align__(128) uint8 shared[];
    const uint32 first = shared_address(shared);
    const int k_blocks = (K + BLOCK_K - 1) / BLOCK_K;

    // where the schedule is older than the previous kernel and weights are nobody's output, they need not wait for it
    if (!ahead) wait_for_previous();
    const Tile tile = find_tile(p);
    const WeightCopies weight_copies(p, tile);
    if (tile.rows > 0)
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s)
            if (s < k_blocks) weight_copies.copy(first + s * STAGE, s);
    if (ahead) wait_for_previous();
    let_next_start();
    if (tile.rows == 0) return;

    const RowCopies row_copies(p, tile);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < k_blocks) row_copies.copy(first + s * STAGE, s);
        copies_commit();
    }
    Warp warp(p, tile);
    const bool works = warp.row < tile.rows && tile.column + (GATED ? warp.column / 2 : warp.column) < outputs;
    Warp::Sums sums = {}, total = {}; // of all parts; if not PARTED the sums are
    uint32 reads = first, writes = first + (STAGES - 1) * STAGE;
    Decoder<THREADS, BLOCK_COLUMNS, BLOCK_K, 1> decoder(threadIdx.x, K);
    if (CODED) {
        decoder.open(p.scales, tile.expert, [&](int c) { return weight_row_of(p, tile, c); });
        decoder.ask(0, 0);
    }
    copies_wait<PENDING>();
    __syncthreads();
    uint32 numbers = first + STAGES * STAGE; // where the weights of the stage lie that is multiplied
    if (CODED) {
        const auto now = decoder;
        decoder.ask(0, BLOCK_K);
        now.decode(0, first + WEIGHTS_AT, numbers, 0);
        __syncthreads();
    }
    if (works) warp.begin(reads, CODED ? numbers : reads + WEIGHTS_AT);

    for (int k = 0; k < k_blocks; ++k) {
        // the stage of the previous round is free: all have passed the barrier at its end
        if (k + STAGES - 1 < k_blocks) {
            weight_copies.copy(writes, k + STAGES - 1);
            row_copies.copy(writes, k + STAGES - 1);
        }
        copies_commit();
        writes = reads;
        reads = reads + STAGE == first + STAGES * STAGE ? first : reads + STAGE;
        const uint32 next = CODED ? first + STAGES * STAGE + (k + 1) % 2 * NUMBERS : reads + WEIGHTS_AT;
        if (CODED && k + 1 < k_blocks) {
            const auto now = decoder;
            decoder.ask(0, (k + 2) * BLOCK_K);
            now.decode(0, reads + WEIGHTS_AT, next, (k + 1) * BLOCK_K);
        }
        if (works) warp.multiply(sums, writes, CODED ? numbers : writes + WEIGHTS_AT);
        numbers = next;
        copies_wait<PENDING>(); // the next stage has landed
        __syncthreads();
        if (works) warp.end(sums, reads, numbers); // behind the last stage: reads what is there, uses nothing of it
        if (works && warp.parts.ends((k + 1) * BLOCK_K, K)) warp.add(total, sums, k * BLOCK_K);
    }

    __syncthreads(); // the stages are free
    X* staged = (X*)shared;
    if (works) warp.finish(p, tile, PARTED ? total : sums, staged);
    __syncthreads();
    store_tile(p, tile, staged);
}
