// activation.cuh: every gated activation as one function of float32 numbers, for act.cu and for epilogues.
//
//   activations::ACTIVATION(g, u, alpha, beta, limit) -> float
//
// The names and formulas are those of cpu/act.py; limit = infinity means no clamp, and a parameter that a formula
// does not use is ignored. Clamps are comparisons written so that NaN stays NaN.
// Numbers    exp is 2**(x log2(e)) by one instruction: 2 ulp and 1.5 ulp more for each unit of its argument, but there
//            the logistic function falls faster than that grows; the reciprocal within 1 ulp, zero from 2**126 on.
//            The bound of the reference allows both: 16 roundings relative to the argument (reference/act.py)

namespace activations
{

constexpr float LARGEST = 3.402823466e38f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float SQRT_HALF = 0.7071067811865476f;
// 0.5 (1 + tanh(z)) is the logistic function of 2 z, which has no cancellation for z < 0
constexpr float GELU_LINEAR = 1.5957691216057308f; // 2 sqrt(2 / pi)
constexpr float GELU_CUBIC = 0.07135481627159596f; // 0.044715 times that

__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }

__device__ __forceinline__ float clamp(float x, float limit)
{
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

// 1 / (1 + exp(-x)) in four instructions: an epilogue has no time for more. exp overflows to infinity, which becomes
// zero.
__device__ __forceinline__ float sigmoid(float x)
{
    float e, y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -LOG2_E));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
    return y;
}

__device__ __forceinline__ float silu_of(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float gelu_of(float x) { return 0.5f * x * (1.0f + erff(x * SQRT_HALF)); }
__device__ __forceinline__ float gelu_tanh_of(float x)
{
    return x * sigmoid(x * __fmaf_rn(x * x, GELU_CUBIC, GELU_LINEAR));
}
__device__ __forceinline__ float relu_of(float x) { return x < 0.0f ? 0.0f : x; }

// silu(min(g, limit)) * clamp(u, limit), where silu(x) = x sigmoid(x)
__device__ __forceinline__ float silu(float g, float u, float alpha, float beta, float limit)
{
    return silu_of(at_most(g, limit)) * clamp(u, limit);
}

// 0.5 g (1 + erf(g / sqrt(2))) * u
__device__ __forceinline__ float gelu(float g, float u, float alpha, float beta, float limit) { return gelu_of(g) * u; }
__device__ __forceinline__ float geglu(float g, float u, float alpha, float beta, float limit)
{
    return gelu_of(g) * u;
}

// 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g**3))) * u
__device__ __forceinline__ float gelu_tanh(float g, float u, float alpha, float beta, float limit)
{
    return gelu_tanh_of(g) * u;
}
__device__ __forceinline__ float gelu_pytorch_tanh(float g, float u, float alpha, float beta, float limit)
{
    return gelu_tanh_of(g) * u;
}

// g' sigmoid(alpha g') * (clamp(u, limit) + beta), where g' = min(g, limit)
__device__ __forceinline__ float swigluoai(float g, float u, float alpha, float beta, float limit)
{
    g = at_most(g, limit);
    return (clamp(u, limit) + beta) * (g * sigmoid(alpha * g));
}
__device__ __forceinline__ float swigluoai_uninterleave(float g, float u, float alpha, float beta, float limit)
{
    return swigluoai(g, u, alpha, beta, limit);
}

// min(silu(g), limit) * clamp(u, limit)
__device__ __forceinline__ float swiglustep(float g, float u, float alpha, float beta, float limit)
{
    return at_most(silu_of(g), limit) * clamp(u, limit);
}

// beta tanh(g / beta) sigmoid(g) * limit tanh(u / limit); u itself for an infinite limit
__device__ __forceinline__ float situ(float g, float u, float alpha, float beta, float limit)
{
    const float soft = limit * tanhf(u / limit);
    u = limit > LARGEST ? u : soft;
    return beta * tanhf(g / beta) * sigmoid(g) * u;
}

// max(g, 0) * u
__device__ __forceinline__ float reglu(float g, float u, float alpha, float beta, float limit)
{
    return relu_of(g) * u;
}
__device__ __forceinline__ float relu(float g, float u, float alpha, float beta, float limit) { return relu_of(g) * u; }

// max(g, 0)**2 * u
__device__ __forceinline__ float relu2(float g, float u, float alpha, float beta, float limit)
{
    const float r = relu_of(g);
    return r * r * u;
}

// g * u
__device__ __forceinline__ float identity(float g, float u, float alpha, float beta, float limit) { return g * u; }

// The same formulas of g alone, without clamps.
__device__ __forceinline__ float silu_no_mul(float g, float u, float alpha, float beta, float limit)
{
    return silu_of(g);
}
__device__ __forceinline__ float gelu_no_mul(float g, float u, float alpha, float beta, float limit)
{
    return gelu_of(g);
}
__device__ __forceinline__ float gelu_tanh_no_mul(float g, float u, float alpha, float beta, float limit)
{
    return gelu_tanh_of(g);
}
__device__ __forceinline__ float gelu_pytorch_tanh_no_mul(float g, float u, float alpha, float beta, float limit)
{
    return gelu_tanh_of(g);
}
__device__ __forceinline__ float relu_no_mul(float g, float u, float alpha, float beta, float limit)
{
    return relu_of(g);
}
__device__ __forceinline__ float relu2_no_mul(float g, float u, float alpha, float beta, float limit)
{
    const float r = relu_of(g);
    return r * r;
}
__device__ __forceinline__ float identity_no_mul(float g, float u, float alpha, float beta, float limit) { return g; }

} // namespace activations
