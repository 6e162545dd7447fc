// vectors.cuh: neighbours in memory as one word of up to 16 bytes, for one load or store.

template <int BYTES>
struct Word;
template <>
struct Word<1> {
    using Type = uint8;
};
template <>
struct Word<2> {
    using Type = uint16;
};
template <>
struct Word<4> {
    using Type = uint32;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

template <typename T, int NEAR>
union Neighbours {
    typename Word<NEAR * sizeof(T)>::Type word;
    T elements[NEAR];
};
