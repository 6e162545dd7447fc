// grouped_route.cu: top-k inside the best groups of experts, one warp a token.
//
//   choice[e]   = logit[e], or score[e] + bias[e];  -inf where that or the logit is not finite
//   group[g]    = the greatest choice of the group, or with a bias the sum of its two greatest
//   choice[e]   = -inf outside the `topk_group` best groups
//   ids         = the k best of choice, weights = their scores / (their sum + 1e-20) * scale
//
// Equal groups and equal experts go by the lower number. An expert whose choice is -inf has weight 0; if all have, the
// ids are 0..k-1 and every weight is 1 / k.
//
// Shapes     router_logits (T, E) X, bias (E,) float or null, is_padding (T,) bytes or null; topk_weights (T, k) float,
//            topk_ids (T, k) ID
// Work       WARPS tokens a block; a warp owns its token's row of both outputs. grouped_topk holds the logits in registers,
//            and the choices pass through shared memory on their way to the lanes that own a group: for E <= 32 VALUES,
//            k <= 32 and GROUPS <= 32. grouped_topk_long reads the logits again for each choice, for any E, k and groups
// Numbers    float32; every sum in one order that depends on E, k and WIDTH only: same bits in every batch
// Constants  X float32, float16 or bfloat16, ID int or int64, SCORING as in scores.cuh, BIASED 0 or 1, VALUES and WIDTH
//            of logits.cuh, GROUPS groups of GROUP_SIZE experts: E = GROUPS * GROUP_SIZE (these four for grouped_topk
//            only), WARPS a block
// Launched   by grouped_route.py, which trusts its caller

#ifndef X
#define X float32
#define ID int
#define SCORING SIGMOID
#define BIASED 1
#define VALUES 8
#define WIDTH 4
#define GROUPS 8
#define GROUP_SIZE 32
#define WARPS 4
#endif

#include "numbers.cuh"
#include "overlap.cuh"
#include "scores.cuh"
#include "best.cuh"
#include "vectors.cuh"
#include "logits.cuh"
#include "choices.cuh"
#include "groups.cuh"

constexpr int NUM_EXPERTS = GROUPS * GROUP_SIZE;
constexpr int OWNERS = GROUPS > 16 ? 32 : GROUPS > 8 ? 16 : GROUPS > 4 ? 8 : GROUPS > 2 ? 4 : GROUPS;
constexpr int PARTS = 32 / OWNERS; // lanes that share the work on one group

// Where a warp keeps expert e: groups whose size is a multiple of 32 must not meet in one bank.
__device__ __forceinline__ uint32 place(uint32 e) { return e + e / 32 * 4; }
constexpr int PLACES = NUM_EXPERTS + NUM_EXPERTS / 32 * 4 + 4;

using Best = Row<uint64, VALUES, WIDTH>;
// What a warp has of shared memory, in keys: first for the choices, then for the keys. Even, for vectors of 16 bytes.
constexpr int ROOM = ((Best::SCRATCH > (PLACES + 1) / 2 ? Best::SCRATCH : (PLACES + 1) / 2) + 1) / 2 * 2;

// Bit g * PARTS says whether group g is one of the best.
__device__ __forceinline__ uint32 best_groups(const float* choices, int topk_group)
{
    const int lane = threadIdx.x % 32, g = lane / PARTS, part = lane % PARTS;
    BestTwo two;
    if (g < GROUPS) {
#pragma unroll 8
        for (int first = 0; first < GROUP_SIZE; first += PARTS) {
            if (first + part < GROUP_SIZE) two.add(choices[place(g * GROUP_SIZE + first + part)]);
        }
    }
#pragma unroll
    for (int offset = PARTS / 2; offset > 0; offset /= 2) two.merge(offset);

    uint64 key = part == 0 && g < GROUPS ? KeyOf<uint64>::of(two.value(BIASED && GROUP_SIZE > 1), g) : 0;
    bool kept = false;
    for (int r = 0; r < topk_group; ++r) {
        if (warp_max(key) == key) {
            kept = true;
            key = 0;
        }
    }
    return __ballot_sync(WARP, kept);
}

extern "C" __global__ __launch_bounds__(32 * WARPS)
void grouped_topk(const X* router_logits, const float* bias, const uint8* is_padding, float* topk_weights, ID* topk_ids,
                  int64 num_tokens, int topk_group, int top_k, int renormalize, float scale)
{
    __shared__ __align__(16) uint64 room[WARPS * ROOM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 t = (int64)blockIdx.x * WARPS + warp;

    wait_for_previous();
    let_next_start();
    if (t >= num_tokens) return;
    topk_weights += t * top_k;
    topk_ids += t * top_k;
    if (is_padding != nullptr && is_padding[t] != 0) {
        drop(topk_weights, topk_ids, top_k);
        return;
    }

    const X* logits = router_logits + t * NUM_EXPERTS;
    float x[VALUES];
    load_row<VALUES, WIDTH>(logits, NUM_EXPERTS, x);
    const float top = SCORING == SOFTMAX ? softmax_top(x) : 0.0f;
    const float total = SCORING == SOFTMAX && (BIASED || !renormalize) ? softmax_total(x, top) : 1.0f;

    float* choices = (float*)(room + warp * ROOM);
    float choice[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int e = Best::element(i);
        const bool inside = e - i % WIDTH < NUM_EXPERTS; // neighbours all are or all are not
        choice[i] = finite_choice<SCORING, BIASED>(x[i], top, total, bias, inside ? e : 0);
        if (GROUPS > 1 && inside) choices[place(e - i % WIDTH) + i % WIDTH] = choice[i]; // side by side: one store
    }
    __syncwarp();
    const uint32 kept_groups = topk_group < GROUPS ? best_groups(choices, topk_group) : WARP;

    uint64 keys[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const uint32 e = Best::element(i);
        const bool kept = kept_groups >> (e / GROUP_SIZE * PARTS) % 32 & 1;
        const uint64 key = KeyOf<uint64>::of(kept ? choice[i] : -infinite(), e);
        keys[i] = e - i % WIDTH < NUM_EXPERTS ? key : 0;
    }
    Best best;
    best.scratch = room + warp * ROOM;
    __syncwarp(); // no lane reads choices any more
    best.fill(keys);
    uint64 mine = 0;
    for (int j = 0; j < top_k; ++j) {
        const uint64 key = best.take();
        mine = lane == j ? key : mine;
    }

    const bool counts = lane < top_k && is_number(mine);
    const float chosen = counts ? score<SCORING>(load(logits[index_of(mine)]), top) : 0.0f;
    const float sum = warp_sum(chosen);
    const bool any = __ballot_sync(WARP, counts) & 1; // the first one is the best
    if (lane < top_k) {
        topk_weights[lane] =
            any ? finish(chosen, renormalize ? sum + FLOOR * total : total, scale, nullptr) : 1.0f / top_k;
        topk_ids[lane] = (ID)index_of(mine);
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS)
void grouped_topk_long(const X* router_logits, const float* bias, const uint8* is_padding, float* topk_weights,
                       ID* topk_ids, int64 num_tokens, int num_experts, int num_expert_group, int topk_group, int top_k,
                       int renormalize, float scale)
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

    const X* logits = router_logits + t * num_experts;
    const int group_size = num_experts / num_expert_group;
    const float top = SCORING == SOFTMAX ? softmax_top_long(logits, num_experts) : 0.0f;
    const float total =
        SCORING == SOFTMAX && (BIASED || !renormalize) ? softmax_total_long(logits, num_experts, top) : 1.0f;
    const auto choice_of = [&](int e) { return finite_choice<SCORING, BIASED>(load(logits[e]), top, total, bias, e); };
    const auto group_key = [&](int g) {
        BestTwo two;
        for (int i = 0; i < group_size; ++i) two.add(choice_of(g * group_size + i));
        return KeyOf<uint64>::of(two.value(BIASED && group_size > 1), g);
    };

    uint64 last_group = topk_group < num_expert_group ? ~0ull : 0; // groups from this key on are kept
    for (int r = 0; r < topk_group && last_group > 0; ++r) {
        last_group = next_best(num_expert_group, last_group, group_key);
    }

    uint64 previous = ~0ull;
    float sum = 0.0f; // of this lane's choices: j = lane, lane + 32, ...
    bool any = false;
    for (int j = 0; j < top_k; ++j) {
        previous = next_best(num_expert_group, previous, [&](int g) {
            const bool kept = last_group == 0 || group_key(g) >= last_group;
            uint64 best = 0; // of the group's experts below `previous`
            for (int e = g * group_size; e < (g + 1) * group_size; ++e) {
                const uint64 key = KeyOf<uint64>::of(kept ? choice_of(e) : -infinite(), e);
                best = key < previous && key > best ? key : best;
            }
            return best;
        });
        any |= is_number(previous);
        if (lane == j % 32) {
            const int e = index_of(previous);
            const float chosen = is_number(previous) ? score<SCORING>(load(logits[e]), top) : 0.0f;
            sum += chosen;
            topk_weights[pairs + j] = chosen;
            topk_ids[pairs + j] = (ID)e;
        }
    }
    sum = warp_sum(sum);
#pragma unroll 1
    for (int j = lane; j < top_k; j += 32) { // a lane reads what it wrote
        topk_weights[pairs + j] =
            any ? finish(topk_weights[pairs + j], renormalize ? sum + FLOOR * total : total, scale, nullptr)
                : 1.0f / top_k;
    }
}
