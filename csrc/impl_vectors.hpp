// Numbers, rows and packed codes as blocks of vectors. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

// ---- numbers ----------------------------------------------------------------------------------------------------------------

inline float root(float x) { return __builtin_sqrtf(x); }
inline float nearest(float x) { return __builtin_nearbyintf(x); }

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    float small = float(int(fraction)) * (1.0f / 16777216.0f);  // 2^-24
    return sign ? -small : small;
}

// Round to nearest even; what is too large is clamped to 65504.
inline uint16_t float_to_half(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7BFF);
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the unit in the last place at 2^-24
        float shifted = float_of(magnitude) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - 0x3F000000));
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

inline float scalar_of(const uint8_t* p, Dtype dtype) {
    if (dtype == Dtype::f32) {
        float x;
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t h;
    std::memcpy(&h, p, 2);
    return dtype == Dtype::bf16 ? float_of(uint32_t(h) << 16) : half_to_float(h);
}

inline Floats load_partial(const float* p, int count, float fill) {
    alignas(64) float x[kTile];
    for (int i = 0; i < kTile; i++) x[i] = i < count ? p[i] : fill;
    return Isa::load(x);
}

inline void store_partial(float* p, int count, Floats v) {
    alignas(64) float x[kTile];
    Isa::store(x, v);
    for (int i = 0; i < count; i++) p[i] = x[i];
}

// Sum each of up to four. The order of addition does not depend on N, so a query's scores do not
// depend on the queries beside it.
template <int N>
inline void sums_of(const Floats* x, float* out) {
    Floats four[4];
    for (int j = 0; j < 4; j++) four[j] = j < N ? x[j] : Isa::splat(0.0f);
    float sums[4];
    Isa::sum_four(four, sums);
    for (int j = 0; j < N; j++) out[j] = sums[j];
}

inline Floats load_halves(const uint16_t* p, int count) {
    if (count >= kTile) return Isa::load_half(p);
    alignas(64) float x[kTile];
    for (int i = 0; i < kTile; i++) x[i] = i < count ? half_to_float(p[i]) : 0.0f;
    return Isa::load(x);
}

// 16 elements of a row; past `count` they are zero.
inline Floats load_elements(const uint8_t* p, Dtype dtype, int count) {
    if (count >= kTile) {
        if (dtype == Dtype::f32) return Isa::load(reinterpret_cast<const float*>(p));
        if (dtype == Dtype::bf16) return Isa::load_bf16(reinterpret_cast<const uint16_t*>(p));
        return Isa::load_half(reinterpret_cast<const uint16_t*>(p));
    }
    alignas(64) float x[kTile];
    for (int i = 0; i < kTile; i++) x[i] = i < count ? scalar_of(p + i * itemsize(dtype), dtype) : 0.0f;
    return Isa::load(x);
}

// ---- constants from numbers -------------------------------------------------------------------------------------------------

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Call f(Constant<n>, first) for `count` items, up to four at a time.
template <class F>
inline void in_fours(int count, const F& f) {
    for (int first = 0; first < count; first += 4) switch (count - first) {
            case 1: f(Constant<1>(), first); break;
            case 2: f(Constant<2>(), first); break;
            case 3: f(Constant<3>(), first); break;
            default: f(Constant<4>(), first);
        }
}

template <class F>
inline void by_dtype(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::f32: return f(Constant<int(Dtype::f32)>());
        case Dtype::bf16: return f(Constant<int(Dtype::bf16)>());
        default: return f(Constant<int(Dtype::f16)>());
    }
}

template <class F>
inline void by_bits(int bits, const F& f) {
    switch (bits) {
        case 1: return f(Constant<1>());
        case 2: return f(Constant<2>());
        default: return f(Constant<4>());
    }
}

// ---- codes ------------------------------------------------------------------------------------------------------------------

// Levels of the codes in a nibble, one table per code of a nibble.
struct Tables {
    Bytes t[4];
};

template <int BITS>
inline Tables tables_of(const int8_t* steps, int offset) {
    Tables tables;
    for (int j = 0; j < 4; j++) {
        uint8_t entry[16];
        for (int x = 0; x < 16; x++) entry[x] = uint8_t(steps[(x >> (j * BITS % 4)) & ((1 << BITS) - 1)] + offset);
        tables.t[j] = Isa::load_table(entry);
    }
    return tables;
}

// KIVI's codes 0 to 2^b - 1 count from their middle, in halves, to keep products with rounded
// queries and weights small.
template <int BITS>
inline Tables centred_tables(int offset) {
    int8_t steps[16];
    for (int c = 0; c < 1 << BITS; c++) steps[c] = int8_t(2 * c - ((1 << BITS) - 1));
    return tables_of<BITS>(steps, offset);
}

template <int BITS>
constexpr float middle() {
    return float((1 << BITS) - 1) / 2;
}

template <int BITS>
inline Tables key_tables(Code code) {
    if (code == Code::kivi) return centred_tables<BITS>((1 << BITS) - 1);
    return tables_of<BITS>(normal_levels(BITS).steps, normal_levels(BITS).offset);
}

template <int BITS>
inline Tables value_tables(Code code) {
    return code == Code::kivi ? centred_tables<BITS>(0) : tables_of<BITS>(normal_levels(BITS).steps, 0);
}

// Codes of block x that belong to plane m, looked up.
template <int BITS>
inline Bytes plane(Bytes low, Bytes high, const Tables& tables, int m) {
    constexpr int per_nibble = 4 / BITS;
    return Isa::lookup(tables.t[m % per_nibble], m < per_nibble ? low : high);
}

// Prefetch to the second-level cache: the first has too few line fill buffers to hide memory
// latency.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline int32_t dword(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// Tiles that share a pass: a rounded query (or weight) is broadcast to a register once for all of
// them. Limited by the registers for their sums.
template <int NQ>
constexpr int tiles_per_pass() {
    return Isa::sums / NQ >= 4 ? 4 : Isa::sums / NQ >= 2 ? 2 : 1;
}

// Products of one block (64 bytes) of each of NT tiles, `tile_bytes` apart, with NQ rows of bytes,
// `row_stride` apart: acc [NT][NQ]. With KEYS, rows are signed (queries) and levels unsigned;
// otherwise rows are unsigned (weights) and levels signed. `ahead`: memory to prefetch.
template <int BITS, int NQ, int NT, bool KEYS>
inline void block_dots(const uint8_t* blocks, int tile_bytes, const void* rows, int row_stride, const Tables& tables, const uint8_t* ahead,
                       Ints* acc) {
    constexpr int P = 8 / BITS;
    Bytes low[NT], high[NT];
#pragma GCC unroll 4
    for (int i = 0; i < NT; i++) {
        Bytes x = Isa::load_bytes(blocks + i * tile_bytes);
        low[i] = Isa::low_nibbles(x), high[i] = Isa::high_nibbles(x);
        fetch(ahead + i * tile_bytes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < P; m++) {
        int32_t four[NQ];
#pragma GCC unroll 8
        for (int j = 0; j < NQ; j++) four[j] = dword(static_cast<const uint8_t*>(rows) + j * row_stride + 4 * m);
#pragma GCC unroll 4
        for (int i = 0; i < NT; i++) {
            Bytes levels = plane<BITS>(low[i], high[i], tables, m);
#pragma GCC unroll 8
            for (int j = 0; j < NQ; j++)
                acc[i * NQ + j] = KEYS ? Isa::dot_us(acc[i * NQ + j], levels, four[j]) : Isa::dot_su(acc[i * NQ + j], four[j], levels);
        }
    }
}

// Products of the `chunks` blocks of each of NT tiles with NQ rows of bytes: acc [NT][NQ].
template <int BITS, int NQ, int NT, bool KEYS, class I = Isa>
inline void tile_dots(const uint8_t* tiles, int tile_bytes, int chunks, const void* rows, int row_stride, const Tables& tables,
                      const uint8_t* ahead, Ints* acc) {
    constexpr int P = 8 / BITS;
    const auto* bytes = static_cast<const uint8_t*>(rows);
    if constexpr (I::by_tile) {
        for (int i = 0; i < NT; i++)
            I::template tile_dots<BITS, NQ, KEYS>(tiles + i * tile_bytes, chunks, bytes, row_stride, tables.t, ahead + i * tile_bytes,
                                                    acc + i * NQ);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < NT * NQ; i++) acc[i] = Isa::zero();
        for (int c = 0; c < chunks; c++)
            block_dots<BITS, NQ, NT, KEYS>(tiles + 64 * c, tile_bytes, bytes + 4 * P * c, row_stride, tables, ahead + 64 * c, acc);
    }
}

// Products of NT tiles of keys (16 tokens each) with NQ rounded queries: acc [NT][NQ].
template <int BITS, int NQ, int NT>
inline void key_dots(const uint8_t* tiles, int tile_bytes, int chunks, int rest, const int8_t* queries, const Tables& tables,
                     const uint8_t* ahead, Ints* acc) {
    constexpr int P = 8 / BITS;
    tile_dots<BITS, NQ, NT, true>(tiles, tile_bytes, chunks, queries, kQueryStride, tables, ahead, acc);
    if (rest) {
        alignas(64) uint8_t spread[NT * 64] = {};
        for (int i = 0; i < NT; i++)
            for (int t = 0; t < kTile; t++)
                for (int d = 0; d < rest; d++) spread[64 * i + 4 * t + d] = tiles[i * tile_bytes + 64 * chunks + t * rest + d];
        block_dots<BITS, NQ, NT, true>(spread, 64, queries + 4 * P * chunks, kQueryStride, tables, spread, acc);
    }
}

// Products of NT whole tiles of values (16 channels each) with NQ rounded weight rows of a page:
// acc [NT][NQ].
template <int BITS, int NQ, int NT>
inline void value_dots(const uint8_t* tiles, const uint8_t* weights, const Tables& tables, const uint8_t* ahead, Ints* acc) {
    constexpr int chunks = kPage * BITS / 32;
    tile_dots<BITS, NQ, NT, false>(tiles, chunks * 64, chunks, weights, kPage, tables, ahead, acc);
}

// The same of one tile with fewer channels.
template <int BITS, int NQ>
inline void short_value_dots(const uint8_t* tile, int rows, const uint8_t* weights, const Tables& tables, Ints* acc) {
    constexpr int chunks = kPage * BITS / 32;
    alignas(64) uint8_t spread[chunks * 64] = {};
    for (int c = 0; c < chunks; c++) std::memcpy(spread + 64 * c, tile + c * rows * 4, size_t(rows) * 4);
    value_dots<BITS, NQ, 1>(spread, weights, tables, spread, acc);
}

}  // namespace
}  // namespace specache
