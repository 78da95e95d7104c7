// The kernels, written once over a small vector vocabulary and compiled once per instruction set: the including file defines `Isa`
// in the anonymous namespace of `specache`. Nothing here may be a template or inline function of another namespace: the linker could
// then pick a copy made for another processor.
//
// A block is 64 bytes, 16 int32 or 16 floats, whatever the registers' size.

#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace specache {
namespace {

using Bytes = Isa::Bytes;
using Ints = Isa::Ints;
using Floats = Isa::Floats;

constexpr float kLowest = -1e30f;
constexpr int kQueryStride = kMaxDim + 64;

inline int min_of(int64_t a, int64_t b) { return int(a < b ? a : b); }
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

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

// ---- codes ------------------------------------------------------------------------------------------------------------------

// What the codes in a nibble stand for, one table per code of a nibble.
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

// KIVI's codes 0 to 2^b - 1 count from their middle, in halves: rounded queries and weights then meet small numbers.
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

inline int32_t dword(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// Products of one tile of keys (16 tokens) with NQ rounded queries.
template <int BITS, int NQ>
inline void key_dots(const uint8_t* tile, int chunks, int rest, const int8_t* queries, const Tables& tables, Ints* acc) {
    constexpr int P = 8 / BITS;
    for (int j = 0; j < NQ; j++) acc[j] = Isa::zero();
    const int8_t* q = queries;
    for (int c = 0; c < chunks; c++, tile += 64, q += 4 * P) {
        Bytes x = Isa::load_bytes(tile), low = Isa::low_nibbles(x), high = Isa::high_nibbles(x);
#pragma GCC unroll 8
        for (int m = 0; m < P; m++) {
            Bytes levels = plane<BITS>(low, high, tables, m);
#pragma GCC unroll 8
            for (int j = 0; j < NQ; j++) acc[j] = Isa::dot_us(acc[j], levels, dword(q + j * kQueryStride + 4 * m));
        }
    }
    if (rest) {
        alignas(64) uint8_t spread[64] = {};
        for (int t = 0; t < kTile; t++)
            for (int i = 0; i < rest; i++) spread[4 * t + i] = tile[t * rest + i];
        Bytes x = Isa::load_bytes(spread), low = Isa::low_nibbles(x), high = Isa::high_nibbles(x);
        for (int m = 0; m < P; m++) {
            Bytes levels = plane<BITS>(low, high, tables, m);
            for (int j = 0; j < NQ; j++) acc[j] = Isa::dot_us(acc[j], levels, dword(q + j * kQueryStride + 4 * m));
        }
    }
}

// Products of one tile of values (up to 16 channels) with NQ rounded weight rows of a page.
template <int BITS, int NQ>
inline void value_dots(const uint8_t* tile, int rows, const uint8_t* weights, const Tables& tables, Ints* acc) {
    constexpr int P = 8 / BITS, chunks = kPage / (4 * P);
    for (int j = 0; j < NQ; j++) acc[j] = Isa::zero();
    for (int c = 0; c < chunks; c++) {
        alignas(64) uint8_t spread[64];
        const uint8_t* source = tile + c * rows * 4;
        if (rows < kTile) {
            std::memset(spread, 0, 64);
            std::memcpy(spread, source, size_t(rows) * 4);
            source = spread;
        }
        Bytes x = Isa::load_bytes(source), low = Isa::low_nibbles(x), high = Isa::high_nibbles(x);
#pragma GCC unroll 8
        for (int m = 0; m < P; m++) {
            Bytes levels = plane<BITS>(low, high, tables, m);
#pragma GCC unroll 8
            for (int j = 0; j < NQ; j++)
                acc[j] = Isa::dot_su(acc[j], dword(weights + j * kPage + 4 * (c * P + m)), levels);
        }
    }
}

// ---- queries ----------------------------------------------------------------------------------------------------------------

// Round x [dim] to int8 in the order of the packed columns; returns the scale.
inline float round_query(const Layout& layout, const float* x, int8_t* out, int32_t* sum) {
    int dim = layout.dim, P = layout.per_byte(), full = layout.key_chunks() * 4 * P, rest = layout.key_rest();
    float largest = 0.0f;
    for (int d = 0; d < dim; d++) {
        float size = x[d] < 0 ? -x[d] : x[d];
        largest = size > largest ? size : largest;
    }
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    alignas(64) int8_t plain[kMaxDim];
    int32_t total = 0;
    for (int d = 0; d < dim; d++) {
        float y = x[d] * inverse;
        int32_t rounded = int32_t(y + (y < 0 ? -0.5f : 0.5f));
        plain[d] = int8_t(rounded);
        total += rounded;
    }
    std::memcpy(out, plain, size_t(full));
    std::memset(out + full, 0, size_t(4 * P));
    for (int m = 0; m < P; m++)
        for (int i = 0; i < rest; i++)
            if (full + rest * m + i < dim) out[full + 4 * m + i] = plain[full + rest * m + i];
    *sum = total;
    return largest / 127.0f;
}

// In place on x [dim][16]: random signs, then a Hadamard transform of each power of two in dim; or its transpose.
inline void rotate(const Layout& layout, float* x, bool back) {
    int dim = layout.dim;
    if (!back)
        for (int d = 0; d < dim; d++) Isa::store(x + d * kTile, Isa::mul(Isa::load(x + d * kTile), Isa::splat(layout.signs[d])));
    for (int start = 0, left = dim; left;) {
        int size = 1;
        while (size * 2 <= left) size *= 2;
        float* block = x + start * kTile;
        for (int half = 1; half < size; half *= 2)
            for (int i = 0; i < size; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    Floats a = Isa::load(block + j * kTile), b = Isa::load(block + (j + half) * kTile);
                    Isa::store(block + j * kTile, Isa::add(a, b));
                    Isa::store(block + (j + half) * kTile, Isa::sub(a, b));
                }
        Floats norm = Isa::splat(1.0f / root(float(size)));
        for (int d = 0; d < size; d++) Isa::store(block + d * kTile, Isa::mul(Isa::load(block + d * kTile), norm));
        start += size, left -= size;
    }
    if (back)
        for (int d = 0; d < dim; d++) Isa::store(x + d * kTile, Isa::mul(Isa::load(x + d * kTile), Isa::splat(layout.signs[d])));
}

void prepare(const Layout& layout, const float* weights, const float* const* queries, int count, PreparedQuery* out) {
    out->count = count;
    for (int j = 0; j < count; j++) out->query[j] = queries[j];
    if (layout.code == Code::kivi) return;
    alignas(64) float block[kMaxDim * kTile];
    std::memset(block, 0, sizeof(float) * size_t(layout.dim) * kTile);
    for (int d = 0; d < layout.dim; d++)
        for (int j = 0; j < count; j++) block[d * kTile + j] = queries[j][d] / weights[d];
    rotate(layout, block, false);
    alignas(64) float rotated[kMaxDim];
    for (int j = 0; j < count; j++) {
        for (int d = 0; d < layout.dim; d++) rotated[d] = block[d * kTile + j];
        out->scale[j] = round_query(layout, rotated, out->bytes[j], &out->sum[j]);
    }
}

// ---- score ------------------------------------------------------------------------------------------------------------------

inline void store_lanes(float* row, int low, int high, Floats v) {
    if (low == 0 && high == kTile) {
        Isa::store(row, v);
        return;
    }
    alignas(64) float x[kTile];
    Isa::store(x, v);
    for (int i = low; i < high; i++) row[i] = x[i];
}

// sum_d query_j[d] * row[d] of NQ queries, which are padded with zeros to whole blocks.
template <int NQ>
inline void half_dots(const float* const* queries, const uint16_t* row, int dim, float* out) {
    Floats acc[NQ];
    for (int j = 0; j < NQ; j++) acc[j] = Isa::splat(0.0f);
    for (int d = 0; d < dim; d += kTile) {
        Floats x = load_halves(row + d, dim - d);
        for (int j = 0; j < NQ; j++) acc[j] = Isa::fma(x, Isa::load(queries[j] + d), acc[j]);
    }
    for (int j = 0; j < NQ; j++) out[j] = Isa::sum(acc[j]);
}

template <int BITS, int NQ>
void score_rotated(const Layout& layout, const Copy& copy, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
                   float scaling, float* const* scores) {
    const Levels& levels = normal_levels(BITS);
    Tables tables = key_tables<BITS>(layout.code);
    const int chunks = layout.key_chunks(), rest = layout.key_rest(), tile_bytes = kTile * layout.key_row_bytes();
    const int group = layout.group;
    float factor[NQ], offset[NQ];
    for (int j = 0; j < NQ; j++) {
        factor[j] = prepared.scale[j] * levels.unit * scaling;
        offset[j] = float(prepared.sum[j] * levels.offset);
    }
    alignas(64) float bias[NQ][kPage];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = copy.pages[start / kPage];
        int valid = min_of(kPage, first + count - start);
        const uint16_t* mean = layout.key_zero_of(page, head);
        for (int t = 0; t < valid; t += group) {
            float product[NQ];
            half_dots<NQ>(prepared.query, mean + int64_t(t / group) * layout.dim, layout.dim, product);
            for (int j = 0; j < NQ; j++)
                for (int i = t; i < t + group; i++) bias[j][i] = product[j] * scaling;
        }
        const uint8_t* codes = layout.key_codes_of(page, head);
        const uint16_t* scale = layout.key_scale_of(page, head);
        if (start + kPage < first + count) {
            const uint8_t* next = layout.key_codes_of(copy.pages[start / kPage + 1], head);
            for (int i = 0; i < kPage * layout.key_row_bytes(); i += 64) __builtin_prefetch(next + i);
        }
        for (int t = 0; t < valid; t += kTile) {
            Ints acc[NQ];
            key_dots<BITS, NQ>(codes + t / kTile * tile_bytes, chunks, rest, prepared.bytes[0], tables, acc);
            Floats token_scale = Isa::load_half(scale + t);
            for (int j = 0; j < NQ; j++) {
                Floats x = Isa::mul(Isa::sub(Isa::to_float(acc[j]), Isa::splat(offset[j])), Isa::splat(factor[j]));
                x = Isa::fma(x, token_scale, Isa::load(bias[j] + t));
                store_lanes(scores[j] + start + t, 0, min_of(kTile, valid - t), x);
            }
        }
    }
}

template <int BITS, int NQ>
void score_kivi(const Layout& layout, const Copy& copy, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
                float scaling, float* const* scores) {
    Tables tables = key_tables<BITS>(layout.code);
    const int chunks = layout.key_chunks(), rest = layout.key_rest(), tile_bytes = kTile * layout.key_row_bytes();
    const int dim = layout.dim, group = layout.group;
    alignas(64) float folded[kMaxDim];
    alignas(64) int8_t rounded[NQ][kQueryStride];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = copy.pages[start / kPage];
        int valid = min_of(kPage, first + count - start);
        const uint8_t* codes = layout.key_codes_of(page, head);
        for (int t = 0; t < valid; t += group) {
            const uint16_t* scale = layout.key_scale_of(page, head) + int64_t(t / group) * dim;
            float factor[NQ], bias[NQ];
            half_dots<NQ>(prepared.query, layout.key_zero_of(page, head) + int64_t(t / group) * dim, dim, bias);
            for (int j = 0; j < NQ; j++) {
                Floats total = Isa::splat(0.0f);
                for (int d = 0; d < dim; d += kTile) {
                    Floats x = Isa::mul(load_halves(scale + d, dim - d), Isa::load(prepared.query[j] + d));
                    Isa::store(folded + d, x);
                    total = Isa::add(total, x);
                }
                int32_t sum;
                factor[j] = round_query(layout, folded, rounded[j], &sum) * 0.5f * scaling;
                bias[j] = (bias[j] + Isa::sum(total) * middle<BITS>()) * scaling - factor[j] * float(sum * ((1 << BITS) - 1));
            }
            int stop = min_of(valid, t + group);
            for (int tile = t / kTile * kTile; tile < stop; tile += kTile) {
                Ints acc[NQ];
                key_dots<BITS, NQ>(codes + tile / kTile * tile_bytes, chunks, rest, rounded[0], tables, acc);
                int low = t > tile ? t - tile : 0, high = min_of(kTile, stop - tile);
                for (int j = 0; j < NQ; j++) {
                    Floats x = Isa::fma(Isa::to_float(acc[j]), Isa::splat(factor[j]), Isa::splat(bias[j]));
                    store_lanes(scores[j] + start + tile, low, high, x);
                }
            }
        }
    }
}

template <int BITS, int NQ>
void score_of(const Layout& layout, const Copy& copy, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
              float scaling, float* const* scores) {
    if (layout.code == Code::rotated)
        score_rotated<BITS, NQ>(layout, copy, head, prepared, first, count, scaling, scores);
    else
        score_kivi<BITS, NQ>(layout, copy, head, prepared, first, count, scaling, scores);
}

#define SPECACHE_BY_COUNT(function, bits, count, ...)        \
    switch (count) {                                         \
        case 1: return function<bits, 1>(__VA_ARGS__);       \
        case 2: return function<bits, 2>(__VA_ARGS__);       \
        case 3: return function<bits, 3>(__VA_ARGS__);       \
        default: return function<bits, 4>(__VA_ARGS__);      \
    }

#define SPECACHE_BY_BITS(function, bits, count, ...)                       \
    switch (bits) {                                                        \
        case 1: SPECACHE_BY_COUNT(function, 1, count, __VA_ARGS__)         \
        case 2: SPECACHE_BY_COUNT(function, 2, count, __VA_ARGS__)         \
        default: SPECACHE_BY_COUNT(function, 4, count, __VA_ARGS__)        \
    }

void score_uncapped(const Layout& layout, const Copy& copy, int head, const PreparedQuery& prepared, int64_t first,
                    int64_t count, float scaling, float* const* scores) {
    SPECACHE_BY_BITS(score_of, layout.bits, prepared.count, layout, copy, head, prepared, first, count, scaling, scores)
}

void score(const Layout& layout, const Copy& copy, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
           float scaling, float softcap, float* const* scores) {
    score_uncapped(layout, copy, head, prepared, first, count, scaling, scores);
    if (softcap > 0)
        for (int j = 0; j < prepared.count; j++)
            for (int64_t t = first; t < first + count; t++) scores[j][t] = scalar_tanh(scores[j][t] / softcap) * softcap;
}

// ---- select -----------------------------------------------------------------------------------------------------------------

inline Floats scores_at(const float* scores, int64_t t, int64_t length) {
    return t + kTile <= length ? Isa::load(scores + t) : load_partial(scores + t, int(length - t), kLowest);
}

inline float largest_of(const float* scores, int64_t length) {
    Floats peak = Isa::splat(kLowest);
    for (int64_t t = 0; t < length; t += kTile) peak = Isa::max(peak, scores_at(scores, t, length));
    return Isa::largest(peak);
}

void select(const float* const* scores, const float* rest_lse, int groups, int64_t length, int64_t k, int64_t* positions,
            float* mass, int32_t* picked) {
    int64_t padded = (length + kTile - 1) / kTile * kTile;
    for (int g = 0; g < groups; g++) {
        float peak = largest_of(scores[g], length);
        Floats total = Isa::splat(0.0f), shift = Isa::splat(peak);
        for (int64_t t = 0; t < length; t += kTile) total = Isa::add(total, Isa::exp(Isa::sub(scores_at(scores[g], t, length), shift)));
        // log-sum-exp over the copy and what is outside of it
        float lse = peak + scalar_log(Isa::sum(total));
        float high = lse > rest_lse[g] ? lse : rest_lse[g], low = lse > rest_lse[g] ? rest_lse[g] : lse;
        float gap = low - high;
        float all = high + (gap > -80.0f ? scalar_log(1.0f + Isa::first(Isa::exp(Isa::splat(gap)))) : 0.0f);
        Floats factor = Isa::mul(Isa::exp(Isa::splat(peak - all)), Isa::splat(1.0f / float(groups)));
        for (int64_t t = 0; t < length; t += kTile) {
            Floats p = Isa::mul(Isa::exp(Isa::sub(scores_at(scores[g], t, length), shift)), factor);
            Isa::store(mass + t, g ? Isa::add(p, Isa::load(mass + t)) : p);
        }
    }
    for (int64_t t = length; t < padded; t++) mass[t] = -INFINITY;

    if (k >= length) {
        for (int64_t i = 0; i < k; i++) positions[i] = i < length ? i : -1;
        return;
    }
    // A value that at least k elements reach: the k-th largest of the blocks' largest.
    float bound = -INFINITY;
    alignas(64) float tops[4096];
    int64_t blocks = padded / kTile < 4096 ? padded / kTile : 4096;
    if (blocks >= 2 * k) {
        int64_t per_block = (padded / kTile + blocks - 1) / blocks;
        int64_t used = 0;
        for (int64_t t = 0; t < padded; used++) {
            Floats top = Isa::load(mass + t);
            int64_t stop = t + per_block * kTile < padded ? t + per_block * kTile : padded;
            for (t += kTile; t < stop; t += kTile) top = Isa::max(top, Isa::load(mass + t));
            tops[used] = Isa::largest(top);
        }
        if (used >= k) bound = kth_largest(tops, used, k);
    }
    int64_t found = 0;
    Floats least = Isa::splat(bound);
    for (int64_t t = 0; t < padded; t += kTile)
        for (uint32_t mask = Isa::not_less(Isa::load(mass + t), least); mask; mask &= mask - 1) {
            int64_t position = t + __builtin_ctz(mask);
            if (position < length) picked[found++] = int32_t(position);
        }
    float* values = mass + padded;  // of the candidates
    for (int64_t i = 0; i < found; i++) values[i] = mass[picked[i]];
    float threshold = kth_largest(values, found, k);
    int64_t above = 0, taken = 0;
    for (int64_t i = 0; i < found; i++) above += mass[picked[i]] > threshold;
    int64_t equals = k - above;
    for (int64_t i = 0; i < found && taken < k; i++) {
        float x = mass[picked[i]];
        if (x > threshold || (x == threshold && equals-- > 0)) positions[taken++] = picked[i];
    }
    for (; taken < k; taken++) positions[taken] = -1;
}

// ---- exact rows -------------------------------------------------------------------------------------------------------------

inline void row_dots(const float* const* queries, int count, const uint8_t* row, Dtype dtype, int dim, float* out) {
    Floats acc[kMaxQueries];
    for (int j = 0; j < count; j++) acc[j] = Isa::splat(0.0f);
    for (int d = 0; d < dim; d += kTile) {
        Floats x = load_elements(row + d * itemsize(dtype), dtype, dim - d);
        for (int j = 0; j < count; j++) acc[j] = Isa::fma(x, Isa::load(queries[j] + d), acc[j]);
    }
    for (int j = 0; j < count; j++) out[j] = Isa::sum(acc[j]);
}

inline void add_row(const uint8_t* row, Dtype dtype, int dim, float weight, float* out) {
    for (int d = 0; d < dim; d += kTile) {
        Floats x = load_elements(row + d * itemsize(dtype), dtype, dim - d);
        Isa::store(out + d, Isa::fma(x, Isa::splat(weight), Isa::load(out + d)));
    }
}

void rescore(const float* const* queries, int groups, int dim, const Rows& rows, int row, const int64_t* positions, int64_t k,
             float scaling, float softcap, float* const* scores) {
    for (int64_t i = 0; i < k; i++) {
        if (positions[i] < 0) continue;
        float product[kMaxQueries];
        for (int first = 0; first < groups; first += kMaxQueries) {
            int count = min_of(kMaxQueries, groups - first);
            row_dots(queries + first, count, rows.at(row, i, positions[i]), rows.dtype, dim, product);
            for (int j = 0; j < count; j++) {
                float x = product[j] * scaling;
                scores[first + j][positions[i]] = softcap > 0 ? scalar_tanh(x / softcap) * softcap : x;
            }
        }
    }
}

void exact(const float* const* queries, int queries_count, int dim, const uint8_t* keys, const uint8_t* values,
           int64_t key_stride, int64_t value_stride, int64_t count, Dtype dtype, float scaling, float softcap, float* scores,
           Partial out) {
    int64_t stride = count + kTile;
    for (int64_t t = 0; t < count; t++) {
        float product[kMaxQueries];
        row_dots(queries, queries_count, keys + t * key_stride, dtype, dim, product);
        for (int j = 0; j < queries_count; j++) {
            float x = product[j] * scaling;
            scores[j * stride + t] = softcap > 0 ? scalar_tanh(x / softcap) * softcap : x;
        }
    }
    for (int j = 0; j < queries_count; j++) {
        float* row = scores + j * stride;
        float peak = largest_of(row, count);
        Floats total = Isa::splat(0.0f);
        for (int64_t t = 0; t < count; t += kTile) {
            Floats p = Isa::exp(Isa::sub(scores_at(row, t, count), Isa::splat(peak)));
            store_partial(row + t, min_of(kTile, count - t), p);
            total = Isa::add(total, p);
        }
        out.peak[j] = peak;
        out.total[j] = Isa::sum(total);
        std::memset(out.out + j * out.stride, 0, sizeof(float) * size_t(round_up(dim, kTile)));
    }
    for (int64_t t = 0; t < count; t++)
        for (int j = 0; j < queries_count; j++)
            add_row(values + t * value_stride, dtype, dim, scores[j * stride + t], out.out + j * out.stride);
}

// ---- attend -----------------------------------------------------------------------------------------------------------------

// Round a page's weights (softmax weight times the tokens' value scale, which add up to `sum`) to bytes; returns their unit, 0 if
// there is nothing to add.
inline float round_weights(const float* weights, const uint16_t* scale, int step, int valid, uint8_t* out, float* sum) {
    alignas(64) float scaled[kPage];
    Floats peak = Isa::splat(0.0f), total = Isa::splat(0.0f);
    for (int t = 0; t < kPage; t += kTile) {
        Floats s;
        if (step == 1 && t + kTile <= valid) {
            s = Isa::load_half(scale + t);
        } else {
            alignas(64) float gathered[kTile];
            for (int i = 0; i < kTile; i++) gathered[i] = t + i < valid ? half_to_float(scale[int64_t(t + i) * step]) : 0.0f;
            s = Isa::load(gathered);
        }
        Floats w = Isa::mul(Isa::load(weights + t), s);
        Isa::store(scaled + t, w);
        peak = Isa::max(peak, w);
        total = Isa::add(total, w);
    }
    float largest = Isa::largest(peak);
    *sum = Isa::sum(total);
    if (!(largest > 1e-30f)) return 0.0f;
    Floats inverse = Isa::splat(255.0f / largest);
    for (int t = 0; t < kPage; t += kTile) Isa::store_rounded(out + t, Isa::mul(Isa::load(scaled + t), inverse));
    return largest / 255.0f;
}

template <int BITS, int NQ>
void attend_values(const Layout& layout, const Copy& copy, int head, int64_t first, int64_t count, const float* weights,
                   int weight_stride, Partial out) {
    Tables tables = value_tables<BITS>(layout.code);
    const int dim = layout.dim, groups = layout.code == Code::rotated ? 1 : layout.value_groups();
    const float unit = layout.code == Code::rotated ? normal_levels(BITS).unit : 0.5f;
    const int tile_bytes = kTile * layout.value_row_bytes();
    alignas(64) uint8_t rounded[NQ][kPage];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = copy.pages[start / kPage];
        int valid = min_of(kPage, first + count - start);
        const uint8_t* codes = layout.value_codes_of(page, head);
        if (start + kPage < first + count) {
            const uint8_t* next = layout.value_codes_of(copy.pages[start / kPage + 1], head);
            for (int i = 0; i < dim * layout.value_row_bytes(); i += 64) __builtin_prefetch(next + i);
        }
        for (int group = 0; group < groups; group++) {
            int low = groups == 1 ? 0 : group * layout.value_group;
            int high = groups == 1 ? dim : min_of(dim, low + layout.value_group);
            float factor[NQ], zero[NQ];
            bool any = false;
            for (int j = 0; j < NQ; j++) {
                const float* w = weights + int64_t(j) * weight_stride + (start - first);
                float sum;
                float size = round_weights(w, layout.value_scale_of(page, head) + group, groups, valid, rounded[j], &sum);
                if (size == 0.0f) std::memset(rounded[j], 0, kPage);
                factor[j] = size * unit;
                zero[j] = 0.0f;
                if (layout.code == Code::kivi) {
                    const uint16_t* z = layout.value_zero_of(page, head) + group;
                    zero[j] = sum * middle<BITS>();
                    for (int t = 0; t < valid; t++) zero[j] += w[t] * half_to_float(z[int64_t(t) * groups]);
                }
                any = any || size != 0.0f || zero[j] != 0.0f;
            }
            if (!any) continue;
            for (int tile = low / kTile * kTile; tile < high; tile += kTile) {
                Ints acc[NQ];
                value_dots<BITS, NQ>(codes + tile / kTile * tile_bytes, min_of(kTile, dim - tile), rounded[0], tables, acc);
                bool whole = tile >= low && (tile + kTile <= high || high == dim);
                for (int j = 0; j < NQ; j++) {
                    float* to = out.out + j * out.stride + tile;
                    Floats x = Isa::fma(Isa::to_float(acc[j]), Isa::splat(factor[j]), Isa::splat(zero[j]));
                    Floats sum = Isa::add(x, Isa::load(to));
                    if (whole)
                        Isa::store(to, sum);
                    else
                        store_lanes(to, low > tile ? low - tile : 0, min_of(kTile, high - tile), sum);
                }
            }
        }
    }
}

void add_values(const Layout& layout, const Copy& copy, int head, int64_t first, int64_t count, int queries,
                const float* weights, int weight_stride, Partial out) {
    SPECACHE_BY_BITS(attend_values, layout.bits, queries, layout, copy, head, first, count, weights, weight_stride, out)
}

void attend(const Layout& layout, const Copy& copy, int head, int64_t first, int64_t count, const float* const* scores,
            int queries, const int* row_of, const int64_t* const* positions, int64_t k, const Rows& rows, float* weights,
            Partial out) {
    const int stride = kAttendChunk + kPage, dim = layout.dim;
    for (int j = 0; j < queries; j++) {
        const float* row = scores[j] + first;
        float* w = weights + int64_t(j) * stride;
        float peak = largest_of(row, count);
        Floats total = Isa::splat(0.0f), shift = Isa::splat(peak);
        for (int64_t t = 0; t < count; t += kTile) {
            Floats p = Isa::exp(Isa::sub(scores_at(row, t, count), shift));
            Isa::store(w + t, p);
            total = Isa::add(total, p);
        }
        for (int64_t t = count; t < (count + kPage - 1) / kPage * kPage; t++) w[t] = 0.0f;
        out.peak[j] = peak;
        out.total[j] = Isa::sum(total);
        float* to = out.out + j * out.stride;
        std::memset(to, 0, sizeof(float) * size_t(out.stride));
    }
    for (int j = 0; j < queries; j++) {
        float* w = weights + int64_t(j) * stride;
        for (int64_t i = 0; i < k; i++) {
            int64_t position = positions[row_of[j]][i];
            if (position >= first && position < first + count) w[position - first] = 0.0f;
        }
    }
    add_values(layout, copy, head, first, count, queries, weights, stride, out);
    if (layout.code == Code::rotated) {
        alignas(64) float block[kMaxDim * kTile];
        std::memset(block, 0, sizeof(float) * size_t(dim) * kTile);
        for (int d = 0; d < dim; d++)
            for (int j = 0; j < queries; j++) block[d * kTile + j] = out.out[j * out.stride + d];
        rotate(layout, block, true);
        for (int d = 0; d < dim; d++)
            for (int j = 0; j < queries; j++) out.out[j * out.stride + d] = block[d * kTile + j];
    }
    for (int j = 0; j < queries; j++)
        for (int64_t i = 0; i < k; i++) {
            int64_t position = positions[row_of[j]][i];
            if (position < first || position >= first + count) continue;
            float p = Isa::first(Isa::exp(Isa::splat(scores[j][position] - out.peak[j])));
            add_row(rows.at(row_of[j], i, position) + dim * itemsize(rows.dtype), rows.dtype, dim, p, out.out + j * out.stride);
        }
}

// ---- quantise ---------------------------------------------------------------------------------------------------------------

// Codes [dim][64] of tokens [offset, offset + count) -> packed keys; tokens are rows.
inline void pack_keys(const Layout& layout, const uint8_t* codes, uint8_t* out, int offset, int count) {
    const int bits = layout.bits, P = layout.per_byte(), chunks = layout.key_chunks(), rest = layout.key_rest();
    for (int tile = offset / kTile * kTile; tile < offset + count; tile += kTile) {
        int low = offset > tile ? offset - tile : 0, high = min_of(kTile, offset + count - tile);
        uint8_t* to = out + tile * layout.key_row_bytes();
        for (int c = 0; c < chunks; c++, to += 64) {
            alignas(64) uint32_t packed[kTile] = {};
            for (int m = 0; m < P; m++)
                for (int i = 0; i < 4; i++) {
                    const uint8_t* source = codes + (4 * P * c + 4 * m + i) * kPage + tile;
                    for (int t = 0; t < kTile; t++) packed[t] |= uint32_t(source[t]) << (8 * i + m * bits);
                }
            std::memcpy(to + 4 * low, packed + low, size_t(high - low) * 4);
        }
        for (int t = low; t < high; t++)
            for (int i = 0; i < rest; i++) {
                uint32_t byte = 0;
                for (int m = 0; m < P; m++) {
                    int d = 4 * P * chunks + rest * m + i;
                    if (d < layout.dim) byte |= uint32_t(codes[d * kPage + tile + t]) << (m * bits);
                }
                to[t * rest + i] = uint8_t(byte);
            }
    }
}

// The same for values: channels are rows, tokens of a page share bytes.
inline void pack_values(const Layout& layout, const uint8_t* codes, uint8_t* out, int offset, int count) {
    const int bits = layout.bits, P = layout.per_byte(), chunks = kPage / (4 * P);
    alignas(64) uint8_t mask[kPage];
    for (int t = 0; t < kPage; t++) mask[t] = t >= offset && t < offset + count ? uint8_t((1 << bits) - 1) : 0;
    for (int d = 0; d < layout.dim; d++) {
        int tile = d / kTile, rows = min_of(kTile, layout.dim - tile * kTile);
        uint8_t* to = out + tile * kTile * layout.value_row_bytes() + d % kTile * 4;
        for (int c = 0; c < chunks; c++, to += rows * 4) {
            uint32_t packed = 0, ours = 0;
            for (int m = 0; m < P; m++) {
                uint32_t in_range = uint32_t(dword(mask + 4 * (P * c + m)));
                packed |= (uint32_t(dword(codes + d * kPage + 4 * (P * c + m))) & in_range) << (m * bits);
                ours |= in_range << (m * bits);
            }
            packed |= uint32_t(dword(to)) & ~ours;
            std::memcpy(to, &packed, 4);
        }
    }
}

// 16 rotated vectors x [dim][16] -> codes[d][lane], scale[lane].
inline void encode(const Layout& layout, const float* x, uint8_t* codes, float* scale) {
    const Levels& levels = normal_levels(layout.bits);
    const int count = 1 << layout.bits;
    float level[16], bound[16];
    for (int i = 0; i < count; i++) level[i] = float(levels.steps[i]) * levels.unit;
    for (int i = 0; i + 1 < count; i++) bound[i] = (level[i] + level[i + 1]) / 2;
    Floats squares = Isa::splat(0.0f);
    for (int d = 0; d < layout.dim; d++) {
        Floats y = Isa::load(x + d * kTile);
        squares = Isa::fma(y, y, squares);
    }
    alignas(64) float rms[kTile], unit_squares[kTile] = {}, product[kTile] = {};
    Isa::store(rms, squares);
    for (int t = 0; t < kTile; t++) rms[t] = root(rms[t] / float(layout.dim));
    for (int d = 0; d < layout.dim; d++) {
        uint8_t* to = codes + d * kPage;
        for (int t = 0; t < kTile; t++) {
            float u = x[d * kTile + t] / (rms[t] > 1.17549435e-38f ? rms[t] : 1.17549435e-38f);
            float value = level[0];
            int code = 0;
            for (int i = 0; i + 1 < count; i++) {
                bool over = u > bound[i];
                code += over;
                value = over ? level[i + 1] : value;
            }
            to[t] = uint8_t(code);
            unit_squares[t] += u * u;
            product[t] += u * value;
        }
    }
    for (int t = 0; t < kTile; t++)
        scale[t] = rms[t] * unit_squares[t] / (product[t] > 1.17549435e-38f ? product[t] : 1.17549435e-38f);
}

inline void quantise_rotated(const Layout& layout, const float* weights, int head, uint8_t* page, int offset, int count,
                             const uint8_t* keys, const uint8_t* values, int64_t key_stride, int64_t value_stride, Dtype dtype,
                             float* x, uint8_t* codes) {
    const int dim = layout.dim, group = layout.group, size = itemsize(dtype);
    alignas(64) float row[kMaxDim], scale[kTile];
    uint16_t* mean = const_cast<uint16_t*>(layout.key_zero_of(page, head));
    for (int t = 0; t < count; t += group) {
        std::memset(row, 0, sizeof(row));
        for (int i = t; i < t + group; i++) add_row(keys + i * key_stride, dtype, dim, 1.0f, row);
        for (int d = 0; d < dim; d++) mean[int64_t(offset + t) / group * dim + d] = float_to_half(row[d] / float(group));
    }
    for (int is_value = 0; is_value < 2; is_value++) {
        uint16_t* scales = const_cast<uint16_t*>(is_value ? layout.value_scale_of(page, head) : layout.key_scale_of(page, head));
        for (int tile = offset / kTile * kTile; tile < offset + count; tile += kTile) {
            int low = offset > tile ? offset - tile : 0, high = min_of(kTile, offset + count - tile);
            if (low || high < kTile) std::memset(x, 0, sizeof(float) * size_t(dim) * kTile);
            for (int t = low; t < high; t++) {
                int64_t token = tile + t - offset;
                const uint8_t* source = is_value ? values + token * value_stride : keys + token * key_stride;
                for (int d = 0; d < dim; d += kTile) Isa::store(row + d, load_elements(source + d * size, dtype, dim - d));
                if (is_value) {
                    for (int d = 0; d < dim; d++) x[d * kTile + t] = row[d];
                } else {
                    const uint16_t* m = mean + int64_t(tile + t) / group * dim;
                    for (int d = 0; d < dim; d += kTile)
                        Isa::store(row + d, Isa::sub(Isa::load(row + d), load_halves(m + d, dim - d)));
                    for (int d = 0; d < dim; d++) x[d * kTile + t] = row[d] * weights[d];
                }
            }
            rotate(layout, x, false);
            encode(layout, x, codes + tile, scale);
            for (int t = low; t < high; t++) scales[tile + t] = float_to_half(scale[t]);
        }
        if (is_value)
            pack_values(layout, codes, const_cast<uint8_t*>(layout.value_codes_of(page, head)), offset, count);
        else
            pack_keys(layout, codes, const_cast<uint8_t*>(layout.key_codes_of(page, head)), offset, count);
    }
}

// Scale and zero point of a group, rounded to the 16 bits they are stored in.
struct MinMax {
    uint16_t scale_bits, zero_bits;
    float scale, zero;

    MinMax(float low, float high, int bits) {
        float s = bits == 1 ? (high - low) / 2 : (high - low) / float((1 << bits) - 1);
        float z = bits == 1 ? (3 * low + high) / 4 : low;
        scale_bits = float_to_half(s), zero_bits = float_to_half(z);
        scale = half_to_float(scale_bits), zero = half_to_float(zero_bits);
    }
    uint8_t code(float x, int bits) const {
        if (!(scale > 0)) return 0;
        float step = nearest((x - zero) / scale), most = float((1 << bits) - 1);
        return uint8_t(step < 0 ? 0 : step > most ? most : step);
    }
};

inline void quantise_kivi(const Layout& layout, int head, uint8_t* page, int offset, int count, const uint8_t* keys,
                          const uint8_t* values, int64_t key_stride, int64_t value_stride, Dtype dtype, float* x,
                          uint8_t* codes) {
    const int dim = layout.dim, group = layout.group, bits = layout.bits, size = itemsize(dtype), groups = layout.value_groups();
    const int padded = round_up(dim, kTile);
    uint16_t* key_scale = const_cast<uint16_t*>(layout.key_scale_of(page, head));
    uint16_t* key_zero = const_cast<uint16_t*>(layout.key_zero_of(page, head));
    uint16_t* value_scale = const_cast<uint16_t*>(layout.value_scale_of(page, head));
    uint16_t* value_zero = const_cast<uint16_t*>(layout.value_zero_of(page, head));
    for (int is_value = 0; is_value < 2; is_value++) {
        for (int t = 0; t < count; t++) {
            const uint8_t* source = is_value ? values + t * value_stride : keys + t * key_stride;
            for (int d = 0; d < dim; d += kTile) Isa::store(x + t * padded + d, load_elements(source + d * size, dtype, dim - d));
        }
        int rows = is_value ? 1 : group, columns = is_value ? layout.value_group : 1;
        for (int t = 0; t < count; t += rows)
            for (int d = 0; d < dim; d += columns) {
                int stop = min_of(dim, d + columns);
                float low = x[t * padded + d], high = low;
                for (int i = t; i < t + rows; i++)
                    for (int j = d; j < stop; j++) {
                        float y = x[i * padded + j];
                        low = y < low ? y : low;
                        high = y > high ? y : high;
                    }
                MinMax found(low, high, bits);
                for (int i = t; i < t + rows; i++)
                    for (int j = d; j < stop; j++) codes[j * kPage + offset + i] = found.code(x[i * padded + j], bits);
                int64_t place = is_value ? int64_t(offset + t) * groups + d / columns : int64_t(offset + t) / group * dim + d;
                (is_value ? value_scale : key_scale)[place] = found.scale_bits;
                (is_value ? value_zero : key_zero)[place] = found.zero_bits;
            }
        if (is_value)
            pack_values(layout, codes, const_cast<uint8_t*>(layout.value_codes_of(page, head)), offset, count);
        else
            pack_keys(layout, codes, const_cast<uint8_t*>(layout.key_codes_of(page, head)), offset, count);
    }
}

void quantise(const Layout& layout, const float* weights, int head, uint8_t* page, int offset, int count, const uint8_t* keys,
              const uint8_t* values, int64_t key_stride, int64_t value_stride, Dtype dtype, float* scratch) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + kMaxDim * kPage);
    if (layout.code == Code::rotated)
        quantise_rotated(layout, weights, head, page, offset, count, keys, values, key_stride, value_stride, dtype, scratch, codes);
    else
        quantise_kivi(layout, head, page, offset, count, keys, values, key_stride, value_stride, dtype, scratch, codes);
}

const Kernels kTable = {Isa::name, prepare, score, select, rescore, attend, exact, quantise};

}  // namespace
}  // namespace specache
