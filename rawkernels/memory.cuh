// memory.cuh: copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 and later), and
// matrix fragments read back. Addresses of shared memory are 32 bits.
//
// A tile in shared memory has rows of 128 bytes; 16-byte chunk c of row r lies at chunk c ^ (r & 7), so that the same
// chunk of eight neighbouring rows falls into all 32 banks.

constexpr int TILE_PITCH = 128;

// The same number, which the compiler keeps in a register: it would rather compute some again in every loop.
__device__ __forceinline__ uint32 kept(uint32 x)
{
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ const uint8* kept(const uint8* p)
{
    asm volatile("" : "+l"(p));
    return p;
}

__device__ __forceinline__ uint32 shared_address(const void* p) { return kept(__cvta_generic_to_shared(p)); }

// `BYTES` (4, 8 or 16) from global to shared memory, or as many zeros if `count` is 0; then `from` is not read.
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32 to, const void* from, int count)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(count)
                 : "memory");
}

// 16 bytes that no other block of this multiprocessor will want: around the L1 cache.
__device__ __forceinline__ void copy_async_once(uint32 to, const void* from, int count)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(count) : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the `PENDING` latest groups of this thread have landed.
template <int PENDING>
__device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void store_words(uint32 to, const uint32 (&words)[4])
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ float4 load_floats(uint32 from)
{
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// Four 8 x 8 matrices of 16-bit elements (8 x 4 of 32 bits); lane l gives the address of row l % 8 of matrix l / 8
// and receives, of each matrix, 32 bits of row l / 4.
__device__ __forceinline__ void load_matrices(uint32& a, uint32& b, uint32& c, uint32& d, uint32 from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(from)
                 : "memory");
}
