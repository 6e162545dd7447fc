// format_pieces.cuh: neighbours of a row as the quantisers read and write them, and the group that they belong to.
//
// Operands are (L, N, K), groups group_rows x group_cols, fewer at the ends: element (l, n, k) belongs to group
// (l, n / group_rows, k / group_cols) of (L, Nb, Kb). WIDTH neighbours, a piece, are of one row and one group; ALIGNED,
// up to 16, divides the addresses of the first ones.

// a / b of numbers >= 0: 64 bits only where they need them, which is slow.
__device__ __forceinline__ int64 quotient(int64 a, int64 b)
{
    if (a < b) return 0;
    if (b == 1) return a;
    return a >> 32 == 0 ? (uint32)a / (uint32)b : a / b;
}

struct Groups {
    int64 num_rows, row_pieces; // N, K / WIDTH
    int64 rows, pieces;         // of a group along N and along K
    int64 down, across;         // Nb, Kb
};

struct Place {
    int64 matrix, group;
};

__device__ __forceinline__ Place place_of(int64 piece, const Groups& groups)
{
    const int64 row = quotient(piece, groups.row_pieces), column = piece - row * groups.row_pieces;
    const int64 matrix = quotient(row, groups.num_rows), n = row - matrix * groups.num_rows;
    const int64 b = matrix * groups.down + quotient(n, groups.rows);
    return {matrix, b * groups.across + quotient(column, groups.pieces)};
}

// How many of COUNT neighbours one load or store takes.
template <typename T, int COUNT>
__device__ constexpr int near()
{
    constexpr int MOST = ALIGNED < (int)sizeof(T) ? 1 : ALIGNED / (int)sizeof(T);
    return COUNT < MOST ? COUNT : MOST;
}

template <typename T, int COUNT>
__device__ __forceinline__ void load_piece(const T* from, T (&to)[COUNT])
{
    constexpr int NEAR = near<T, COUNT>();
#pragma unroll
    for (int i = 0; i < COUNT; i += NEAR) {
        Neighbours<T, NEAR> part;
        part.word = *(const decltype(part.word)*)(from + i);
#pragma unroll
        for (int j = 0; j < NEAR; ++j) to[i + j] = part.elements[j];
    }
}

template <typename Word>
__device__ __forceinline__ void store_word(Word* to, Word word)
{
    *to = word;
}
template <>
__device__ __forceinline__ void store_word(uint4* to, uint4 word) // an assignment may be cut into four
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
}

template <typename T, int COUNT>
__device__ __forceinline__ void store_piece(T* to, const T (&from)[COUNT])
{
    constexpr int NEAR = near<T, COUNT>();
#pragma unroll
    for (int i = 0; i < COUNT; i += NEAR) {
        Neighbours<T, NEAR> part;
#pragma unroll
        for (int j = 0; j < NEAR; ++j) part.elements[j] = from[i + j];
        store_word((decltype(part.word)*)(to + i), part.word);
    }
}

// A stored scale: a number, or a code as it is.
template <typename S>
__device__ __forceinline__ auto stored(S s)
{
    if constexpr (sizeof(S) == 1)
        return (uint32)s;
    else
        return load(s);
}
