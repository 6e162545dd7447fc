// special_experts.cu: experts that compute nothing: a choice of id >= num_experts adds weight * x, or nothing at all.
//
//   out[t, h] = (sum over j of topk_weights[t, j] where topk_ids[t, j] >= num_experts) * x[t, h]
//
// The other choices are handed on as they are, these ones with `masked_id` and weight 0.
//
// Shapes     hidden_states, out (T, H) X, topk_weights, real_weights (T, k) float, topk_ids, real_ids (T, k) ID, signed
// Work       grid T; a block owns its token's row of every output, a thread WIDTH neighbours of out at a time
// Numbers    float32 sum, j ascending, the product once rounded to float32 and once to X: same bits on every run
// Constants  X float32, float16 or bfloat16, ID int or int64, WIDTH elements of one load and store: rows start at a
//            multiple of WIDTH * sizeof(X) bytes and WIDTH divides H; BLOCK threads a block
// Launched   by special_experts.py, which trusts its caller

#ifndef X
#define X bfloat16
#define ID int
#define WIDTH 8
#define BLOCK 256
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "vectors.cuh"

extern "C" __global__ __launch_bounds__(BLOCK)
void zero_experts(const X* hidden_states, const float* topk_weights, const ID* topk_ids, float* real_weights,
                  ID* real_ids, X* out, int num_experts, int masked_id, int copies, int top_k, int64 hidden_size)
{
    const int64 t = blockIdx.x;

    wait_for_previous();
    let_next_start();

    float weight = 0.0f;
    for (int j = 0; j < top_k; ++j) {
        const int64 pair = t * top_k + j;
        const ID id = topk_ids[pair];
        const float given = topk_weights[pair];
        const bool special = id >= num_experts;
        if (special && copies) weight += given;
        if (j % BLOCK == threadIdx.x) {
            real_ids[pair] = special ? (ID)masked_id : id;
            real_weights[pair] = special ? 0.0f : given;
        }
    }

    const X* x = hidden_states + t * hidden_size;
    X* y = out + t * hidden_size;
    for (int64 h = (int64)threadIdx.x * WIDTH; h < hidden_size; h += BLOCK * WIDTH) {
        Neighbours<X, WIDTH> result;
        result.word = {};
        if (weight != 0.0f) { // else NaN and infinities of x stay out
            Neighbours<X, WIDTH> given;
            given.word = *(const decltype(given.word)*)(x + h);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) result.elements[i] = store<X>(weight * load(given.elements[i]));
        }
        *(decltype(result.word)*)(y + h) = result.word;
    }
}
