// scores.cuh: scores of a router in float32: softmax, sigmoid and sqrt(softplus) of one logit.
//
//   score<HOW>(x, top) -> float
//
// Numbers    a score that is not finite counts as 0. The errors are those that reference/route.py allows: 2 ulp for
//            expf, 1 for log1pf and for the root, correct rounding for the sigmoid's reciprocal

constexpr int SOFTMAX = 0, SIGMOID = 1, SQRTSOFTPLUS = 2;
constexpr float SOFTPLUS_IS_X = 20.0f;

__device__ __forceinline__ float infinite() { return __uint_as_float(0x7F800000); }

__device__ __forceinline__ float fast_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fast_root(float x)
{
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x for x >= 1, correctly rounded but for rare ties, without the slow path of a division; 0 beyond 2**126, and
// NaN for infinity.
__device__ __forceinline__ float reciprocal_of_sum(float x)
{
    const float y = fast_reciprocal(x);
    return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

// Score of a logit; for softmax `top` is the greatest of its row, and the division is still to do.
template <int HOW>
__device__ __forceinline__ float score(float x, float top)
{
    float y;
    if constexpr (HOW == SOFTMAX) {
        y = expf(x - top);
    } else if constexpr (HOW == SIGMOID) {
        y = reciprocal_of_sum(1.0f + expf(-x));
    } else {
        // softplus(x) is x itself above 20, where log1p(exp(x)) stays at 20
        y = log1pf(expf(x < SOFTPLUS_IS_X ? x : SOFTPLUS_IS_X));
        y = fast_root(y > x ? y : x);
        y = x < infinite() ? y : 0.0f;
    }
    return y == y ? y : 0.0f;
}

// What experts are compared by without a bias: the logit, with which every score grows. `top` is NaN where a row has no
// softmax: then all are equal. A logit without a score comes last, as NaN, except under sigmoid, where it counts as 0.
template <int HOW>
__device__ __forceinline__ float plain_choice(float x, float top)
{
    if constexpr (HOW == SOFTMAX) {
        return top == top ? x : 0.0f;
    } else if constexpr (HOW == SIGMOID) {
        return x == x ? x : -infinite();
    } else {
        return x < infinite() ? x : __uint_as_float(0x7FC00000);
    }
}

// What they are compared by with a bias; `share` is 1 / the sum of the row's scores under softmax, else not used.
template <int HOW>
__device__ __forceinline__ float biased_choice(float x, float top, float share, float bias)
{
    const float y = score<HOW>(x, top);
    if constexpr (HOW == SOFTMAX) {
        return __fmaf_rn(y, share, bias);
    } else if constexpr (HOW == SIGMOID) {
        return y + bias;
    } else {
        return x < infinite() ? y + bias : -1e30f;
    }
}
