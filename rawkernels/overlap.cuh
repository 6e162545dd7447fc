// overlap.cuh: kernels of one stream that overlap (programmatic dependent launch, sm_90 and later).
//
// A kernel launched with `overlap` may start before its predecessor ends. The rules:
//   - every block calls wait_for_previous() before it ends, and every thread before it reads what the predecessor
//     wrote and before it writes anything;
//   - a thread calls let_next_start() only after its own wait_for_previous().
// So when kernel n + 1 starts, kernel n - 1 has ended and its writes can be read without waiting: around the L1 cache
// (__ldcg), in which nothing promises that older lines are gone.

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
