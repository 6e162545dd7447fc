// grouped_gemm_loop.cuh: the kernel of the grouped products other than wgmma: a ring of stages, filled STAGES - 1 ahead of
// the arithmetic. Included by grouped_gemm_mma.cu and grouped_gemm_fma.cu only, behind their `Warp`:
//
//   begin(stage)               before the first stage
//   multiply(sums, stage)      when it returns, nothing of the stage is needed any more
//   end(sums, next stage)      the next one has landed
//   finish(..., sums, staged)  results into shared memory

extern "C" __global__ __launch_bounds__(THREADS, MIN_CTAS) void grouped_gemm(
    const int4* schedule, const uint8* x, const int* permuted_idx, const float* input_scale, const uint8* weights,
    const float* bias, const float* output_scale, const float* row_factor, const float* column_factor, X* out,
    int64 x_stride, int64 expert_stride, int64 weight_stride, int top_k, int interleaved, int K, int outputs,
    int factor_columns, int most_tiles, int parts, int column_blocks, int wide_stores, int ahead, float alpha,
    float beta, float limit)
{
    Problem p;
    p.schedule = schedule, p.permuted_idx = permuted_idx;
    p.input_scale = input_scale, p.output_scale = output_scale, p.bias = bias;
    p.row_factor = row_factor, p.column_factor = column_factor, p.factor_columns = factor_columns;
    p.x = x, p.weights = weights, p.out = out;
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
            if (s < k_blocks) weight_copies.copy(first + s * STAGE, s * BLOCK_K);
    if (ahead) wait_for_previous();
    let_next_start();
    if (tile.rows == 0) return;

    const RowCopies row_copies(p, tile);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < k_blocks) row_copies.copy(first + s * STAGE, s * BLOCK_K);
        copies_commit();
    }
    Warp warp(p, tile);
    const bool works = warp.row < tile.rows && tile.column + (GATED ? warp.column / 2 : warp.column) < outputs;
    Warp::Sums sums = {};
    uint32 reads = first, writes = first + (STAGES - 1) * STAGE;
    copies_wait<STAGES - 2>();
    __syncthreads();
    if (works) warp.begin(reads);

    for (int k = 0; k < k_blocks; ++k) {
        // the stage of the previous round is free: all have passed the barrier at its end
        if (k + STAGES - 1 < k_blocks) {
            weight_copies.copy(writes, (k + STAGES - 1) * BLOCK_K);
            row_copies.copy(writes, (k + STAGES - 1) * BLOCK_K);
        }
        copies_commit();
        if (works) warp.multiply(sums, reads);
        writes = reads;
        reads = reads + STAGE == first + STAGES * STAGE ? first : reads + STAGE;
        copies_wait<STAGES - 2>(); // the next stage has landed
        __syncthreads();
        if (works) warp.end(sums, reads); // behind the last stage: reads what is there, uses nothing of it
    }

    __syncthreads(); // the stages are free
    X* staged = (X*)shared;
    if (works) warp.finish(p, tile, sums, staged);
    __syncthreads();
    store_tile(p, tile, staged);
}
