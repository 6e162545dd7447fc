// hopper.cuh: instructions of sm_90a that the grouped product is made of: barriers in shared memory, the bulk
// tensor copy engine, asynchronous copies of rows, stores of matrix fragments. Addresses of shared memory are 32 bits.

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

__device__ __forceinline__ uint32 shared_address(const void* p) { return (uint32)__cvta_generic_to_shared(p); }

// ---- barriers: a phase ends when `count` arrivals and all expected bytes are in; waiters know its parity ----

__device__ __forceinline__ void barrier_init(uint32 barrier, uint32 count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(uint32 barrier)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint32 barrier, uint32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once this thread's asynchronous copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32 barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@done bra out;\n"
                 "bra again;\n"
                 "out: }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// ---- copies ----

// A box of a weight tensor as five axes: K, and the four that put its rows in tile order (_tensor_maps.py).
__device__ __forceinline__ void copy_weights(uint32 to, const TensorMap* map, uint32 barrier, int k, int block,
                                             int expert)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(k), "r"(0), "r"(block), "r"(expert)
                 : "memory");
}

__device__ __forceinline__ void copy_rows(uint32 to, const TensorMap* map, uint32 barrier, int k, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(k), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void fetch_descriptor(const TensorMap* map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// For copies of what will be wanted again: L2 keeps this part of it longer than what only streams by.
__device__ __forceinline__ uint64 keep_in_l2(float part)
{
    uint64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, %1;" : "=l"(policy) : "f"(part));
    return policy;
}

// 16 bytes, or 16 zeros if `bytes` is 0.
__device__ __forceinline__ void copy_chunk(uint32 to, const void* from, int bytes, uint64 policy)
{
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes),
                 "l"(policy)
                 : "memory");
}

// What threads wrote to shared memory becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void shared_writes_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes as one store: left to itself the compiler of CUDA 13.0 takes it apart.
__device__ __forceinline__ void store_global(void* to, const uint4& v)
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- matrices ----

// Rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r & 7); `address` is a multiple of 1024. Of each `step`
// times 8 rows the matrix has the first 8.
__device__ __forceinline__ uint64 matrix_descriptor(uint32 address, int step = 1)
{
    const uint64 eight_rows = (1024 >> 4) * step, swizzle_128 = 1;
    return (uint64)((address & 0x3FFFF) >> 4) | 1ull << 16 | eight_rows << 32 | swizzle_128 << 62;
}

__device__ __forceinline__ void store_transposed(uint32 to, uint32 a)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(a) : "memory");
}

__device__ __forceinline__ void store_transposed(uint32 to, uint32 a, uint32 b)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ void store_transposed(uint32 to, uint32 a, uint32 b, uint32 c, uint32 d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ uint4 load_chunk(uint32 from)
{
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ void store_chunk(uint32 to, int a, int b, int c, int d)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_shared(uint32 to, uint32 x)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ __forceinline__ uint32 load_word(uint32 from)
{
    uint32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from));
    return x;
}

__device__ __forceinline__ void load_shared(uint32 from, float& x, float& y)
{
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(from));
}
