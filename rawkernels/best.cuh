// best.cuh: the best elements of a row, one after the other, by one warp: greatest first, equal ones by the lower index.
//
// A number and its index become one unsigned integer, the key: the number's bits, made to grow with the number, above
// the complement of the index. No two keys are equal, so a plain maximum finds both. NaN comes last, after -inf;
// -0 equals +0. A key is never 0: that is no element.
//
//   uint64 key    32 bits of the number, 32 of the index
//   uint32 key    for numbers that were 16 bits wide: 19 bits hold them as float32, and 13 are left for the index

constexpr uint32 WARP = 0xFFFFFFFF;
constexpr uint32 SIGN = 0x80000000;
constexpr uint32 INDEX_BITS = 13;
constexpr uint32 INDEX_MASK = (1 << INDEX_BITS) - 1;
constexpr uint32 GROWN_MINUS_INFINITY = 0x007FFFFF; // grown(-inf): greater ones are numbers
constexpr int SORTED_VALUES = 8;                    // a lane sorts as many, and keeps more in shared memory

// The bits of a number as an integer that grows with it, 0 for NaN.
__device__ __forceinline__ uint32 grown(float x)
{
    const uint32 bits = __float_as_uint(x + 0.0f); // + 0 makes -0 to +0
    const uint32 grows = bits ^ ((uint32)((int)bits >> 31) | SIGN);
    return x == x ? grows : 0;
}

template <typename K>
struct KeyOf;
template <>
struct KeyOf<uint64> {
    static __device__ __forceinline__ uint64 of(float x, int index) { return (uint64)grown(x) << 32 | ~(uint32)index; }
};
template <>
struct KeyOf<uint32> {
    static __device__ __forceinline__ uint32 of(float x, int index)
    {
        return (grown(x) & ~INDEX_MASK) | (INDEX_MASK - (uint32)index);
    }
};

__device__ __forceinline__ int index_of(uint64 key) { return (int)~(uint32)key; }
__device__ __forceinline__ int index_of(uint32 key) { return (int)(INDEX_MASK - (key & INDEX_MASK)); }

// Say whether the number of a key is neither NaN nor -inf.
__device__ __forceinline__ bool is_number(uint64 key) { return (uint32)(key >> 32) > GROWN_MINUS_INFINITY; }

__device__ __forceinline__ uint32 warp_max(uint32 x) { return __reduce_max_sync(WARP, x); }
__device__ __forceinline__ uint64 warp_max(uint64 x)
{
    const uint32 high = (uint32)(x >> 32), best = __reduce_max_sync(WARP, high);
    return (uint64)best << 32 | __reduce_max_sync(WARP, high == best ? (uint32)x : 0);
}

// Sum over a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(WARP, x, offset);
    return x;
}

// Greatest key below `previous` among those of 0..num_elements-1; all lanes get it. It takes one element out of a row
// of any length that nobody stored.
template <typename F>
__device__ __forceinline__ uint64 next_best(int num_elements, uint64 previous, F key_of)
{
    uint64 best = 0;
#pragma unroll 2
    for (int64 i = threadIdx.x % 32; i < num_elements; i += 32) {
        const uint64 key = key_of((int)i);
        best = key < previous && key > best ? key : best;
    }
    return warp_max(best);
}

// Put the greater one first.
template <typename K>
__device__ __forceinline__ void order(K& a, K& b)
{
    const K greater = a > b ? a : b;
    b = a > b ? b : a;
    a = greater;
}

// A row spread over a warp: lane l holds COUNT keys, NEAR neighbours in each place:
//
//   element i of lane l is element (i / NEAR * 32 + l) * NEAR + i % NEAR of the row
//
// A short list is sorted, so that taking an element shifts one. Of a long one a lane knows its greatest key only; when
// that is taken, the warp looks for the next one among its COUNT <= 32 keys, one a lane.
template <typename K, int COUNT, int NEAR>
struct Row {
    static constexpr bool SORTED = COUNT <= SORTED_VALUES;
    static_assert(!SORTED || (COUNT & (COUNT - 1)) == 0, "the sort needs a power of two");
    static constexpr int STRIDE = COUNT | 1; // odd: no two lanes meet in a bank
    static constexpr int SCRATCH = SORTED ? 1 : 32 * STRIDE;

    K keys[SORTED ? COUNT : 1]; // keys[0] is the greatest one that is left
    K* scratch;                 // SCRATCH keys of this warp

    static __device__ __forceinline__ int element(uint32 i)
    {
        return (i / NEAR * 32 + threadIdx.x % 32) * NEAR + i % NEAR;
    }

    __device__ __forceinline__ void fill(const K (&given)[COUNT])
    {
        if constexpr (SORTED) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) keys[i] = given[i];
            sort();
        } else {
            const int lane = threadIdx.x % 32;
            keys[0] = 0;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                scratch[lane * STRIDE + i] = given[i];
                keys[0] = given[i] > keys[0] ? given[i] : keys[0];
            }
            __syncwarp();
        }
    }

    // Take the greatest key out; every lane gets it. All lanes of the warp call together.
    __device__ __forceinline__ K take()
    {
        const K best = warp_max(keys[0]);
        const bool mine = (uint32)keys[0] == (uint32)best; // the half with the index tells
        if constexpr (SORTED) {
#pragma unroll
            for (int i = 0; i < COUNT - 1; ++i) keys[i] = mine ? keys[i + 1] : keys[i];
            keys[COUNT - 1] = mine ? 0 : keys[COUNT - 1];
        } else {
            // place p of a lane's list is read and written by lane p only
            const int lane = threadIdx.x % 32, owner = index_of(best) / NEAR % 32;
            K key = lane < COUNT ? scratch[owner * STRIDE + lane] : 0;
            if (key == best) {
                key = 0;
                scratch[owner * STRIDE + lane] = 0;
            }
            key = warp_max(key);
            keys[0] = mine ? key : keys[0];
        }
        return best;
    }

private:
    // Batcher's odd-even merge sort, greatest first. Every loop has a constant length, so that all become straight code.
    __device__ __forceinline__ void sort()
    {
#pragma unroll
        for (int run = 0; 1 << run < COUNT; ++run) { // sorted runs of 1 << run keys become twice as long
#pragma unroll
            for (int step = 0; 1 << step < COUNT; ++step) {
#pragma unroll
                for (int i = 0; i < COUNT; ++i) {
                    const int p = 1 << run, q = p >> step;
                    const bool pairs = q > 0 && i >= q % p && (i - q % p) % (2 * q) < q && i + q < COUNT &&
                                       i / (2 * p) == (i + q) / (2 * p);
                    if (pairs) order(keys[i], keys[i + q]);
                }
            }
        }
    }
};
