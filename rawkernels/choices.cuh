// choices.cuh: what the kernels that write topk_weights and topk_ids have in common.
//
// Constants  ID  int or int64

// Write the row of a padding token, by one warp.
__device__ __forceinline__ void drop(float* topk_weights, ID* topk_ids, int top_k)
{
#pragma unroll 1
    for (int j = threadIdx.x % 32; j < top_k; j += 32) {
        topk_weights[j] = 0.0f;
        topk_ids[j] = -1;
    }
}

// Divide a chosen score, unless by nothing, and scale it; `factor` is the expert's own or null.
__device__ __forceinline__ float finish(float chosen, float divisor, float scale, const float* factor)
{
    const float weight = chosen / (divisor > 0.0f ? divisor : 1.0f) * scale;
    return factor == nullptr ? weight : weight * *factor;
}
