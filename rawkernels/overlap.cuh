// overlap.cuh: kernels of one stream that overlap (programmatic dependent launch, sm_90 and later).
//
// A kernel launched with `overlap` may start before its predecessor ends. Rules: every thread that reads what an
// earlier kernel wrote, or writes anything, calls wait_for_previous() first (it returns when all earlier kernels
// have ended and their writes are visible); let_next_start() is a hint and orders nothing.

__device__ __forceinline__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
