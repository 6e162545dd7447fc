// coded_weights.cuh: weights that come into shared memory as codes and become numbers there, for the grouped products.
//
//   number[n, k] = X(number(code[n, k], prepare(scale of its group, 1), zero point of its group))
//
// A thread decodes PIECE neighbours of a row, then those of the row STEP further on. Numbers are laid out as
// memory.cuh says. A scale for a whole piece is asked for AHEAD blocks of K before it is needed: it comes from memory.
// Constants  X element type; RULE of decoders (format_rules.cuh); ALIKE neighbours, a power of two up to PIECE, that
//            share a scale; PARTED 2: scales meet sums, and the number is the code's without one

using Rule = decoders::RULE;

constexpr int PIECE = 16;
constexpr int PIECE_BYTES = Rule::PACKED ? PIECE / 2 : PIECE;

// What stands beside the codes; a group is group_rows x group_columns of them, fewer at the ends.
struct Scales {
    const Rule::Scale* scale; // (E, down, across)
    const uint8* zero_points; // the same, or null
    int group_rows, group_columns, down, across;
};

__device__ __forceinline__ uint4 load_codes(uint32 from)
{
    uint4 v = {};
    if constexpr (Rule::PACKED)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
    else
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from)
                     : "memory");
    return v;
}

__device__ __forceinline__ void store_numbers(uint32 to, const uint32* words)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

// THREADS decode ROWS rows of BLOCK_K codes, again and again along K.
template <int THREADS, int ROWS, int BLOCK_K, int AHEAD>
struct Decoder {
    static constexpr int ACROSS = BLOCK_K / PIECE, STEP = THREADS / ACROSS, PASSES = ROWS / STEP;
    static constexpr int GROUPS_A_PIECE = PIECE / ALIKE, CHUNKS = PIECE * (int)sizeof(X) / 16;
    static constexpr int ROW_BYTES = ACROSS * PIECE_BYTES, NUMBERS_PITCH = 128;
    static_assert(PASSES * STEP == ROWS && BLOCK_K * sizeof(X) == NUMBERS_PITCH && STEP % 8 == 0, "");

    const Rule::Scale* scale; // of the expert
    const uint8* zero_points;
    int group_columns, K;
    int row, column;    // first ones of this thread, in the block
    int groups[PASSES]; // where the groups of each row begin
    Rule::Scale scales[AHEAD][PASSES];
    uint8 zeros[AHEAD][PASSES];

    __device__ __forceinline__ Decoder(int thread, int K) : K(K), row(thread / ACROSS), column(thread % ACROSS * PIECE)
    {
    }
    // The rows of an expert; `row_of(r)` is the row of its weights that row r of the block is, or any one that exists.
    template <typename RowOf>
    __device__ __forceinline__ void open(const Scales& s, int expert, RowOf row_of)
    {
        const int64 before = (int64)expert * s.down * s.across;
        scale = s.scale + before;
        zero_points = s.zero_points ? s.zero_points + before : nullptr;
        group_columns = s.group_columns;
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            const int n = row_of(row + i * STEP);
            groups[i] = (s.group_rows == 1 ? n : n / s.group_rows) * s.across;
        }
    }
    // Ask for the scales of the block at element k.
    __device__ __forceinline__ void ask(int slot, int k)
    {
        if (ALIKE < PIECE || PARTED == 2) return;
        const int at = across(k);
#pragma unroll
        for (int i = 0; i < PASSES; ++i) load(groups[i] + at, scales[slot][i], zeros[slot][i]);
    }
    __device__ __forceinline__ int across(int k) const
    {
        return (uint32)min(k + column, K - 1) / (uint32)group_columns;
    }
    __device__ __forceinline__ void load(int group, Rule::Scale& to, uint8& zero) const
    {
        to = __ldg(scale + group);
        if (Rule::ZERO && zero_points) zero = __ldg(zero_points + group);
    }
    // Codes of the block at element k, in rows of ROW_BYTES at `from`, to numbers at `to`.
    __device__ __forceinline__ void decode(int slot, uint32 from, uint32 to, int k) const
    {
        from += row * ROW_BYTES + column / PIECE * PIECE_BYTES;
        to += row * NUMBERS_PITCH;
        if (K - k - column < PIECE)
            decode_rows<true>(slot, from, to, k);
        else
            decode_rows<false>(slot, from, to, k);
    }
    // TAIL: K ends within the piece or before it, and zeros follow.
    template <bool TAIL>
    __device__ __forceinline__ void decode_rows(int slot, uint32 from, uint32 to, int k) const
    {
        uint4 next = load_codes(from);
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            const uint32 words[4] = {next.x, next.y, next.z, next.w};
            if (i + 1 < PASSES) next = load_codes(from + (i + 1) * STEP * ROW_BYTES);
            float numbers[PIECE];
            Spread<Rule>::numbers(words, numbers);
#pragma unroll
            for (int g = 0; g < GROUPS_A_PIECE; ++g) {
                Rule::Scale own = scales[slot][i];
                uint8 own_zero = zeros[slot][i];
                if (ALIKE < PIECE && PARTED != 2) load(groups[i] + across(k + g * ALIKE), own, own_zero);
                const float p = PARTED == 2 ? 1.0f : Rule::prepare(own, 1.0f);
                const float origin = Spread<Rule>::origin(Rule::ZERO && zero_points ? own_zero : Rule::ZERO);
#pragma unroll
                for (int j = g * ALIKE; j < (g + 1) * ALIKE; ++j) {
                    numbers[j] = __fmul_rn(numbers[j] - origin, p);
                    if (TAIL && k + column + j >= K) numbers[j] = 0.0f;
                }
            }
            uint32 out[CHUNKS * 4];
#pragma unroll
            for (int j = 0; j < CHUNKS * 4; ++j) out[j] = word_of(numbers, j);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                store_numbers(to + i * STEP * NUMBERS_PITCH + ((column / PIECE * CHUNKS + c ^ row & 7) << 4),
                              out + c * 4);
        }
    }
    static __device__ __forceinline__ uint32 word_of(const float* numbers, int j)
    {
        if constexpr (sizeof(X) == 4)
            return __float_as_uint(numbers[j]);
        else
            return store_pair<X>(numbers[j * 2], numbers[j * 2 + 1]);
    }
};
