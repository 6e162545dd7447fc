// dense_route.cu: router weights as a dense (T, E) table and as (T, k) choices, each from the other.
//
// Dense to choices: the k entries of greatest magnitude, greatest first, equal ones by the lower expert id; an entry of
// 0 is no choice (id -1, weight 0). NaN counts as the greatest, so that it is never lost.
// Choices to dense: out[t, topk_ids[t, j]] += topk_weights[t, j], j ascending.
//
// Shapes     router_weights (T, E) X and topk_weights (T, k) float; or topk_weights (T, k) X and out (T, E) float;
//            topk_ids (T, k) ID, signed
// Work       WARPS tokens a block; a warp owns its token's row of the outputs, and reads its row of the inputs again for
//            each choice, or for each 32 experts
// Numbers    weights are copied, or added in float32
// Constants  X float32, float16 or bfloat16, ID int or int64, WARPS a block
// Launched   by dense_route.py, which trusts its caller

#ifndef X
#define X float32
#define ID int
#define WARPS 4
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "best.cuh"

extern "C" __global__ __launch_bounds__(32 * WARPS)
void topk_from_dense(const X* router_weights, float* topk_weights, ID* topk_ids, int64 num_tokens, int num_experts,
                     int top_k)
{
    const int lane = threadIdx.x % 32;
    const int64 t = (int64)blockIdx.x * WARPS + threadIdx.x / 32;

    wait_for_previous();
    let_next_start();
    if (t >= num_tokens) return;

    const X* weights = router_weights + t * num_experts;
    uint64 previous = ~0ull;
    for (int j = 0; j < top_k; ++j) {
        previous = next_best(num_experts, previous, [&](int e) {
            const float size = fabsf(load(weights[e]));
            return KeyOf<uint64>::of(size == size ? size : __uint_as_float(0x7F800000), e);
        });
        if (lane == j % 32) {
            const int e = index_of(previous);
            const float weight = load(weights[e]);
            const bool chosen = !(weight == 0.0f);
            topk_weights[t * top_k + j] = chosen ? weight : 0.0f;
            topk_ids[t * top_k + j] = chosen ? e : -1;
        }
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS)
void dense_from_topk(const X* topk_weights, const ID* topk_ids, float* out, int64 num_tokens, int num_experts,
                     int top_k)
{
    const int lane = threadIdx.x % 32;
    const int64 t = (int64)blockIdx.x * WARPS + threadIdx.x / 32;

    wait_for_previous();
    let_next_start();
    if (t >= num_tokens) return;

    for (int64 e = lane; e < num_experts; e += 32) {
        float sum = 0.0f;
        for (int j = 0; j < top_k; ++j) {
            if (topk_ids[t * top_k + j] == e) sum += load(topk_weights[t * top_k + j]);
        }
        out[t * num_experts + e] = sum;
    }
}
