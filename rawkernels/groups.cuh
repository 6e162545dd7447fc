// groups.cuh: what grouped routing compares experts and groups by.

constexpr float FLOOR = 1e-20f; // is added to the sum of the chosen scores

// The choice of expert e by logit x, or -inf where it, the logit or its score is not finite. Under softmax `top` is NaN
// where a row has no scores, and `total` the sum of those that are still to be divided.
template <int HOW, bool WITH_BIAS>
__device__ __forceinline__ float finite_choice(float x, float top, float total, const float* bias, int e)
{
    float choice = x;
    if constexpr (WITH_BIAS) {
        choice = score<HOW>(x, top);
        if constexpr (HOW == SOFTMAX) choice = choice * (1.0f / total);
        choice += bias[e];
    }
    return fabsf(choice) < infinite() && fabsf(x) < infinite() && top == top ? choice : -infinite();
}

// The value of a group: the greatest choice, or with a bias the sum of the two greatest if it has two.
struct BestTwo {
    float first = -infinite(), second = -infinite();

    __device__ __forceinline__ void add(float choice)
    {
        second = fmaxf(second, fminf(first, choice));
        first = fmaxf(first, choice);
    }
    // Take in what the lane at `offset` has found, and the other way round.
    __device__ __forceinline__ void merge(int offset)
    {
        const float its_first = __shfl_xor_sync(WARP, first, offset);
        const float its_second = __shfl_xor_sync(WARP, second, offset);
        second = fmaxf(fminf(first, its_first), fmaxf(second, its_second));
        first = fmaxf(first, its_first);
    }
    __device__ __forceinline__ float value(bool sums) const { return sums ? first + second : first; }
};
