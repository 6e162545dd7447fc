// route.cu: scores and top-k of router logits, one warp a token, logits to weights and ids in one pass.
//
//   ids[t]     = the k best of choice[t], greatest first, equal ones by the lower expert id; or a row of the table
//   weights[t] = score[t, ids[t]] / their sum (or not) * scale
//
// Without a bias the choice is the logit itself: every score grows with it, so the ids depend on no rounding.
//
// Shapes     router_logits (T, E) X, bias, image_bias, per_expert_scale (E,) float, input_ids (T,) int64, table
//            (vocabulary, k) TABLE, is_padding (T,) bytes, each but the first may be null; topk_weights (T, k) float,
//            topk_ids (T, k) ID
// Work       WARPS tokens a block; a warp owns its token's row of both outputs. fused_topk holds the logits in
//            registers, for E <= 32 VALUES and k <= 32; fused_topk_long reads them again for each choice, for any E and k
// Numbers    float32; every sum in one order that depends on E, k and WIDTH only: same bits in every batch
// Constants  X float32, float16 or bfloat16, ID and TABLE int or int64, SCORING as in scores.cuh, BIASED 0 or 1,
//            VALUES and WIDTH of logits.cuh, WARPS a block
// Launched   by route.py, which trusts its caller

#ifndef X
#define X float32
#define ID int
#define TABLE int
#define SCORING SOFTMAX
#define BIASED 0
#define VALUES 4
#define WIDTH 4
#define WARPS 4
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "scores.cuh"
#include "best.cuh"
#include "vectors.cuh"
#include "logits.cuh"
#include "choices.cuh"

constexpr int IMAGE_IDS = 5; // image tokens carry one of five consecutive ids

template <bool NARROW>
struct Keys {
    using Type = uint64;
};
template <>
struct Keys<true> {
    using Type = uint32;
};
using Key = Keys<!BIASED && sizeof(X) == 2>::Type;

struct Token {
    const X* logits;
    const float* bias; // of its experts, or null
    const TABLE* ids;  // its row of the table, or null
    bool looks_up;     // its ids come from the table, or are -1
};

__device__ __forceinline__ Token find_token(const X* router_logits, const float* bias, const int64* input_ids,
                                            const TABLE* table, const float* image_bias, int64 first_image_id,
                                            int64 vocabulary, int64 t, int num_experts, int top_k)
{
    Token token = {router_logits + t * num_experts, BIASED ? bias : nullptr, nullptr, false};
    const int64 input_id = input_ids == nullptr ? 0 : input_ids[t];
    const bool is_image =
        BIASED && image_bias != nullptr && input_id >= first_image_id && input_id < first_image_id + IMAGE_IDS;
    if (is_image) {
        token.bias = image_bias;
    } else if (table != nullptr) {
        token.looks_up = true;
        if (input_id >= 0 && input_id < vocabulary) token.ids = table + input_id * top_k;
    }
    return token;
}

__device__ __forceinline__ float choice_of(const Token& token, float x, int e, float top, float share)
{
    if (BIASED && token.bias != nullptr) return biased_choice<SCORING>(x, top, share, token.bias[e]);
    return plain_choice<SCORING>(x, top);
}

__device__ __forceinline__ bool needs_total(const Token& token, int renormalize)
{
    return SCORING == SOFTMAX && (!renormalize || (BIASED && token.bias != nullptr));
}

extern "C" __global__ __launch_bounds__(32 * WARPS)
void fused_topk(const X* router_logits, const float* bias, const int64* input_ids, const TABLE* table,
                const float* image_bias, const uint8* is_padding, const float* per_expert_scale, float* topk_weights,
                ID* topk_ids, int64 first_image_id, int64 vocabulary, int64 num_tokens, int num_experts, int top_k,
                int renormalize, float scale)
{
    using Best = Row<Key, VALUES, WIDTH>;
    __shared__ Key scratch[WARPS * Best::SCRATCH];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 t = (int64)blockIdx.x * WARPS + warp;

    wait_for_previous();
    let_next_start();
    if (t >= num_tokens) return;

    if (is_padding != nullptr && is_padding[t] != 0) {
        drop(topk_weights + t * top_k, topk_ids + t * top_k, top_k);
        return;
    }
    const Token token = find_token(router_logits, bias, input_ids, table, image_bias, first_image_id, vocabulary, t,
                                   num_experts, top_k);

    float x[VALUES];
    load_row<VALUES, WIDTH>(token.logits, num_experts, x);
    const float top = SCORING == SOFTMAX ? softmax_top(x) : 0.0f;
    const float total = needs_total(token, renormalize) ? softmax_total(x, top) : 1.0f;

    int64 id = -1;
    if (token.looks_up) {
        if (lane < top_k && token.ids != nullptr) id = token.ids[lane];
    } else {
        const float share = total > 0.0f ? 1.0f / total : 1.0f;
        Key keys[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const int e = Best::element(i);
            const bool inside = e - i % WIDTH < num_experts; // neighbours all are or all are not
            const Key key = KeyOf<Key>::of(choice_of(token, x[i], inside ? e : 0, top, share), e);
            keys[i] = inside ? key : 0;
        }
        Best best;
        best.scratch = scratch + warp * Best::SCRATCH;
        best.fill(keys);
        int mine = -1;
        for (int j = 0; j < top_k; ++j) {
            const int e = index_of(best.take());
            mine = lane == j ? e : mine;
        }
        id = mine;
    }

    const bool counts = lane < top_k && id >= 0 && id < num_experts;
    const float chosen = counts ? score<SCORING>(load(token.logits[id]), top) : 0.0f;
    const float kept = warp_sum(chosen);
    if (lane < top_k) {
        const int64 pair = t * top_k + lane;
        const float* factor = counts && per_expert_scale != nullptr ? per_expert_scale + id : nullptr;
        topk_weights[pair] = finish(chosen, renormalize ? kept : total, scale, factor);
        topk_ids[pair] = (ID)id;
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS)
void fused_topk_long(const X* router_logits, const float* bias, const int64* input_ids, const TABLE* table,
                     const float* image_bias, const uint8* is_padding, const float* per_expert_scale,
                     float* topk_weights, ID* topk_ids, int64 first_image_id, int64 vocabulary, int64 num_tokens,
                     int num_experts, int top_k, int renormalize, float scale)
{
    const int lane = threadIdx.x % 32;
    const int64 t = (int64)blockIdx.x * WARPS + threadIdx.x / 32;

    wait_for_previous();
    let_next_start();
    if (t >= num_tokens) return;

    const int64 pairs = t * top_k; // of the tokens before
    if (is_padding != nullptr && is_padding[t] != 0) {
        drop(topk_weights + pairs, topk_ids + pairs, top_k);
        return;
    }
    const Token token = find_token(router_logits, bias, input_ids, table, image_bias, first_image_id, vocabulary, t,
                                   num_experts, top_k);
    const float top = SCORING == SOFTMAX ? softmax_top_long(token.logits, num_experts) : 0.0f;
    const float total = needs_total(token, renormalize) ? softmax_total_long(token.logits, num_experts, top) : 1.0f;
    const float share = total > 0.0f ? 1.0f / total : 1.0f;

    uint64 previous = ~0ull;
    float kept = 0.0f; // of this lane's choices: j = lane, lane + 32, ...
    for (int j = 0; j < top_k; ++j) {
        int64 id = -1;
        if (token.looks_up) {
            if (token.ids != nullptr) id = token.ids[j];
        } else {
            previous = next_best(num_experts, previous, [&](int e) {
                return KeyOf<uint64>::of(choice_of(token, load(token.logits[e]), e, top, share), e);
            });
            id = index_of(previous);
        }
        if (lane == j % 32) {
            const float chosen = id >= 0 && id < num_experts ? score<SCORING>(load(token.logits[id]), top) : 0.0f;
            kept += chosen;
            topk_weights[pairs + j] = chosen;
            topk_ids[pairs + j] = (ID)id;
        }
    }
    kept = warp_sum(kept);
#pragma unroll 1
    for (int j = lane; j < top_k; j += 32) { // a lane reads what it wrote
        const int64 id = topk_ids[pairs + j];
        const bool counts = id >= 0 && id < num_experts;
        const float* factor = counts && per_expert_scale != nullptr ? per_expert_scale + id : nullptr;
        topk_weights[pairs + j] = finish(topk_weights[pairs + j], renormalize ? kept : total, scale, factor);
    }
}
