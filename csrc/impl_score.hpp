// Scores of queries over packed keys. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

// ---- queries ----------------------------------------------------------------------------------------------------------------

// Round x [dim] to int8 in the order of the packed columns. Return the scale; leave the rounding
// error in x.
inline float round_query(const Layout& layout, float* x, int8_t* out, int32_t* sum) {
    int dim = layout.dim, P = layout.per_byte(), full = layout.key_chunks() * 4 * P, rest = layout.key_rest();
    float largest = 0.0f;
    for (int d = 0; d < dim; d++) {
        float size = x[d] < 0 ? -x[d] : x[d];
        largest = size > largest ? size : largest;
    }
    float unit = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
    alignas(64) int8_t plain[kMaxDim];
    int32_t total = 0;
    for (int d = 0; d < dim; d++) {
        float y = nearest(x[d] * inverse);
        int32_t rounded = y >= -127 && y <= 127 ? int32_t(y) : 0;  // NaN and infinity: the scale carries them
        plain[d] = int8_t(rounded);
        total += rounded;
        x[d] -= unit * float(rounded);
    }
    std::memcpy(out, plain, size_t(full));
    std::memset(out + full, 0, size_t(round_up(full + 4 * P, 64) - full));
    for (int m = 0; m < P; m++)
        for (int i = 0; i < rest; i++)
            if (full + rest * m + i < dim) out[full + 4 * m + i] = plain[full + rest * m + i];
    *sum = total;
    return unit;
}

// Rotate x [dim][16] in place: random signs, then a Hadamard transform of each power of two in dim.
// With `back` apply the transpose.
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
    int d = 0;
    for (; d + kTile <= dim; d += kTile) {
        Floats x = Isa::load_half(row + d);
        for (int j = 0; j < NQ; j++) acc[j] = Isa::fma(x, Isa::load(queries[j] + d), acc[j]);
    }
    if (d < dim) {
        Floats x = load_halves(row + d, dim - d);
        for (int j = 0; j < NQ; j++) acc[j] = Isa::fma(x, Isa::load(queries[j] + d), acc[j]);
    }
    sums_of<NQ>(acc, out);
}

// Prefetch a page's other fields, which are read before its codes.
inline void fetch_ahead(const void* field, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) fetch(static_cast<const uint8_t*>(field) + i);
}

// Return the page to prefetch while that of token `start` is processed: one memory latency ahead.
inline const uint8_t* page_ahead(const LowBitKV& low_bit_kv, int64_t start) {
    constexpr int64_t kAhead = 3;
    const int64_t page = start / kPage + kAhead, last = (low_bit_kv.length - 1) / kPage;
    return low_bit_kv.pages[page < last ? page : last];
}

template <int BITS, int NQ>
void score_rotated(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int low, int64_t first,
                   int64_t count, float scaling, float* const* scores) {
    constexpr int NT = tiles_per_pass<NQ>();
    const Levels& levels = normal_levels(BITS);
    Tables tables = key_tables<BITS>(layout.code);
    const int chunks = layout.key_chunks(), rest = layout.key_rest(), tile_bytes = kTile * layout.key_row_bytes();
    const int group = layout.group;
    float factor[NQ], offset[NQ];
    for (int j = 0; j < NQ; j++) {
        factor[j] = prepared.scale[low + j] * levels.unit * scaling;
        offset[j] = float(prepared.sum[low + j] * levels.offset);
    }
    alignas(64) float bias[NQ][kPage];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = low_bit_kv.pages[start / kPage];
        const uint8_t* next = page_ahead(low_bit_kv, start);
        fetch_ahead(layout.key_zero_of(next, head), int64_t(layout.groups_per_page()) * layout.dim * 2);
        fetch_ahead(layout.key_scale_of(next, head), kPage * 2);
        int valid = min_of(kPage, first + count - start);
        const uint8_t *codes = layout.key_codes_of(page, head), *ahead = layout.key_codes_of(next, head);
        const uint16_t *mean = layout.key_zero_of(page, head), *scale = layout.key_scale_of(page, head);
        const bool one_mean = valid == kPage && group == kPage;
        float product[NQ];
        for (int t = 0; t < valid; t += group) {
            half_dots<NQ>(prepared.query + low, mean + int64_t(t / group) * layout.dim, layout.dim, product);
            if (one_mean) break;
            for (int j = 0; j < NQ; j++)
                for (int i = t; i < t + group; i++) bias[j][i] = product[j] * scaling;
        }
        for (int tile = 0; tile < valid; tile += NT * kTile) {
            Ints acc[NT * NQ];
            int offset_of_tile = tile / kTile * tile_bytes;
            key_dots<BITS, NQ, NT>(codes + offset_of_tile, tile_bytes, chunks, rest, prepared.bytes[low], tables, ahead + offset_of_tile, acc);
            auto at = [&](int i, int j, Floats token_scale, Floats of_mean) {
                const Floats x = Isa::sub(Isa::to_float(acc[i * NQ + j]), Isa::splat(offset[j]));
                return Isa::fma(Isa::mul(x, Isa::splat(factor[j])), token_scale, of_mean);
            };
            if (one_mean) {
#pragma GCC unroll 4
                for (int i = 0; i < NT; i++) {
                    const Floats token_scale = Isa::load_half(scale + tile + i * kTile);
#pragma GCC unroll 4
                    for (int j = 0; j < NQ; j++)
                        Isa::store(scores[j] + start + tile + i * kTile, at(i, j, token_scale, Isa::splat(product[j] * scaling)));
                }
                continue;
            }
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) {
                const int t = tile + i * kTile;
                if (t >= valid) break;
                const Floats token_scale = Isa::load_half(scale + t);
#pragma GCC unroll 4
                for (int j = 0; j < NQ; j++)
                    store_lanes(scores[j] + start + t, 0, min_of(kTile, valid - t), at(i, j, token_scale, Isa::load(bias[j] + t)));
            }
        }
    }
}

template <int BITS, int NQ>
void score_kivi(const Layout& layout, const LowBitKV& low_bit_kv, int head, const float* const* queries, int64_t first, int64_t count,
                float scaling, float* const* scores) {
    Tables tables = key_tables<BITS>(layout.code);
    const int chunks = layout.key_chunks(), rest = layout.key_rest(), tile_bytes = kTile * layout.key_row_bytes();
    const int dim = layout.dim, group = layout.group;
    alignas(64) float folded[kMaxDim];
    alignas(64) int8_t rounded[NQ][kQueryStride], fine[NQ][kQueryStride];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = low_bit_kv.pages[start / kPage];
        const uint8_t* next = page_ahead(low_bit_kv, start);
        fetch_ahead(layout.key_zero_of(next, head), int64_t(layout.groups_per_page()) * dim * 2);
        fetch_ahead(layout.key_scale_of(next, head), int64_t(layout.groups_per_page()) * dim * 2);
        int valid = min_of(kPage, first + count - start);
        const uint8_t *codes = layout.key_codes_of(page, head), *ahead = layout.key_codes_of(next, head);
        for (int t = 0; t < valid; t += group) {
            const uint16_t* scale = layout.key_scale_of(page, head) + int64_t(t / group) * dim;
            float factor[NQ], fine_factor[NQ], bias[NQ];
            half_dots<NQ>(queries, layout.key_zero_of(page, head) + int64_t(t / group) * dim, dim, bias);
            for (int j = 0; j < NQ; j++) {
                Floats total = Isa::splat(0.0f);
                for (int d = 0; d < dim; d += kTile) {
                    Floats x = Isa::mul(load_halves(scale + d, dim - d), Isa::load(queries[j] + d));
                    Isa::store(folded + d, x);
                    total = Isa::add(total, x);
                }
                // A scale per channel spreads the folded query too widely for 8 bits: the rounding
                // error is a second query.
                int32_t sum, fine_sum;
                float unit = round_query(layout, folded, rounded[j], &sum);
                fine_factor[j] = round_query(layout, folded, fine[j], &fine_sum) * 0.5f * scaling;
                factor[j] = unit * 0.5f * scaling;
                bias[j] = (bias[j] + Isa::sum(total) * middle<BITS>()) * scaling -
                          (factor[j] * float(sum) + fine_factor[j] * float(fine_sum)) * float((1 << BITS) - 1);
            }
            int stop = min_of(valid, t + group);
            for (int tile = t / kTile * kTile; tile < stop; tile += kTile) {
                Ints acc[NQ], fine_acc[NQ];
                const uint8_t *of_tile = codes + tile / kTile * tile_bytes, *of_next = ahead + tile / kTile * tile_bytes;
                key_dots<BITS, NQ, 1>(of_tile, tile_bytes, chunks, rest, rounded[0], tables, of_next, acc);
                key_dots<BITS, NQ, 1>(of_tile, tile_bytes, chunks, rest, fine[0], tables, of_tile, fine_acc);
                int low = t > tile ? t - tile : 0, high = min_of(kTile, stop - tile);
                for (int j = 0; j < NQ; j++) {
                    Floats x = Isa::fma(Isa::to_float(acc[j]), Isa::splat(factor[j]), Isa::splat(bias[j]));
                    x = Isa::fma(Isa::to_float(fine_acc[j]), Isa::splat(fine_factor[j]), x);
                    store_lanes(scores[j] + start + tile, low, high, x);
                }
            }
        }
    }
}

inline bool fills_matrices(const Layout&);

template <class I, int BITS>
void score_by_matrix(const Layout&, const LowBitKV&, int head, const PreparedQuery&, int64_t first, int64_t count, float scaling,
                     float* const* scores);  // impl_matrix.hpp

template <int BITS>
void score_of(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
              float scaling, float* const* scores) {
    if constexpr (Isa::matrix)
        if (fills_matrices(layout) && prepared.count > 4)  // fewer are faster without
            return score_by_matrix<Isa, BITS>(layout, low_bit_kv, head, prepared, first, count, scaling, scores);
    in_fours(prepared.count, [&](auto queries, int low) {
        constexpr int NQ = decltype(queries)::value;
        if (layout.code == Code::rotated)
            score_rotated<BITS, NQ>(layout, low_bit_kv, head, prepared, low, first, count, scaling, scores + low);
        else
            score_kivi<BITS, NQ>(layout, low_bit_kv, head, prepared.query + low, first, count, scaling, scores + low);
    });
}

void score(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
           float scaling, float softcap, float* const* scores) {
    by_bits(layout.bits, [&](auto bits) {
        score_of<decltype(bits)::value>(layout, low_bit_kv, head, prepared, first, count, scaling, scores);
    });
    if (softcap > 0)
        for (int j = 0; j < prepared.count; j++)
            for (int64_t t = first; t < first + count; t++) scores[j][t] = scalar_tanh(scores[j][t] / softcap) * softcap;
}

}  // namespace
}  // namespace specache
