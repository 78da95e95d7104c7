// Exact rows, and softmax-weighted sums over packed values. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

// ---- exact rows -------------------------------------------------------------------------------------------------------------

template <int NQ, Dtype T>
inline void row_dots_of(const float* const* queries, const uint8_t* row, int dim, float* out) {
    Floats acc[NQ];
    for (int j = 0; j < NQ; j++) acc[j] = Isa::splat(0.0f);
    for (int d = 0; d < dim; d += kTile) {
        Floats x = load_elements(row + d * itemsize(T), T, dim - d);
        for (int j = 0; j < NQ; j++) acc[j] = Isa::fma(x, Isa::load(queries[j] + d), acc[j]);
    }
    sums_of<NQ>(acc, out);
}

inline void row_dots(const float* const* queries, int count, const uint8_t* row, Dtype dtype, int dim, float* out) {
    in_fours(count, [&](auto four, int first) {
        by_dtype(dtype, [&](auto type) {
            row_dots_of<decltype(four)::value, Dtype(decltype(type)::value)>(queries + first, row, dim, out + first);
        });
    });
}

inline void add_row(const uint8_t* row, Dtype dtype, int dim, float weight, float* out) {
    for (int d = 0; d < dim; d += kTile) {
        Floats x = load_elements(row + d * itemsize(dtype), dtype, dim - d);
        Isa::store(out + d, Isa::fma(x, Isa::splat(weight), Isa::load(out + d)));
    }
}

// out[j] = sum_t weights[j][t] value(t), `blocks` registers of each at a time.
template <int NQ, Dtype T, class Tokens>
inline void sum_rows(const Tokens& tokens, int64_t count, int dim, const float* weights, int64_t stride, float* out,
                     int out_stride) {
    constexpr int blocks = 2;
    for (int d = 0; d < dim; d += blocks * kTile) {
        const int used = dim - d > kTile ? blocks : 1;
        Floats acc[blocks][NQ];
        for (auto& of_block : acc)
            for (Floats& x : of_block) x = Isa::splat(0.0f);
        for (int64_t t = 0; t < count; t++) {
            const uint8_t* row = tokens.value(t) + d * itemsize(T);
            Floats x[blocks];
            x[0] = load_elements(row, T, dim - d);
            x[1] = used > 1 ? load_elements(row + kTile * itemsize(T), T, dim - d - kTile) : Isa::splat(0.0f);
            for (int j = 0; j < NQ; j++) {
                const Floats weight = Isa::splat(weights[j * stride + t]);
                for (int i = 0; i < blocks; i++) acc[i][j] = Isa::fma(x[i], weight, acc[i][j]);
            }
        }
        for (int i = 0; i < used; i++)
            for (int j = 0; j < NQ; j++) Isa::store(out + j * out_stride + d + i * kTile, acc[i][j]);
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

// Keys and values at a stride each.
struct Strided {
    const uint8_t *keys, *values;
    int64_t key_stride, value_stride;
    const uint8_t* key(int64_t i) const { return keys + i * key_stride; }
    const uint8_t* value(int64_t i) const { return values + i * value_stride; }
};

// Selected rows [K | V], `half` bytes each.
struct Selected {
    const Rows& rows;
    int row;
    const int64_t *positions, *slots;
    int64_t half;
    const uint8_t* key(int64_t i) const { return rows.at(row, slots[i], positions[i]); }
    const uint8_t* value(int64_t i) const { return key(i) + half; }
};

// Query j sees the first seen[j] tokens.
template <class Tokens>
void attend_exactly(const float* const* queries, int queries_count, int dim, const Tokens& tokens, int64_t count, const int64_t* seen,
                    Dtype dtype, float scaling, float softcap, float* scores, const Partial& out) {
    int64_t stride = count + kTile;
    for (int64_t t = 0; t < count; t++) {
        float product[kMaxQueries];
        row_dots(queries, queries_count, tokens.key(t), dtype, dim, product);
        for (int j = 0; j < queries_count; j++) {
            float x = product[j] * scaling;
            scores[j * stride + t] = softcap > 0 ? scalar_tanh(x / softcap) * softcap : x;
        }
    }
    for (int j = 0; j < queries_count; j++) {
        float* row = scores + j * stride;
        float peak = largest_of(row, seen[j]);
        Floats total = Isa::splat(0.0f);
        for (int64_t t = 0; t < seen[j]; t += kTile) {
            Floats p = Isa::exp(Isa::sub(scores_at(row, t, seen[j]), Isa::splat(peak)));
            store_partial(row + t, min_of(kTile, count - t), p);
            total = Isa::add(total, p);
        }
        for (int64_t t = seen[j]; t < count; t++) row[t] = 0.0f;
        out.peak[j] = peak;
        out.total[j] = Isa::sum(total);
    }
    in_fours(queries_count, [&](auto four, int low) {
        by_dtype(dtype, [&](auto type) {
            sum_rows<decltype(four)::value, Dtype(decltype(type)::value)>(tokens, count, dim, scores + low * stride, stride,
                                                                          out.out + low * out.stride, out.stride);
        });
    });
}

void exact(const float* const* queries, int queries_count, int dim, const uint8_t* keys, const uint8_t* values,
           int64_t key_stride, int64_t value_stride, int64_t count, const int64_t* seen, Dtype dtype, float scaling, float softcap,
           float* scores, Partial out) {
    Strided tokens{keys, values, key_stride, value_stride};
    attend_exactly(queries, queries_count, dim, tokens, count, seen, dtype, scaling, softcap, scores, out);
}

void exact_rows(const float* const* queries, int queries_count, int dim, const Rows& rows, int row, const int64_t* positions,
                const int64_t* slots, int64_t count, float scaling, float softcap, float* scores, Partial out) {
    Selected tokens{rows, row, positions, slots, int64_t(dim) * itemsize(rows.dtype)};
    for (int64_t i = 0; i < count; i++) {  // rows are scattered: prefetch all of them
        const uint8_t* key = tokens.key(i);
        for (int64_t d = 0; d < 2 * tokens.half; d += 64) __builtin_prefetch(key + d);
    }
    int64_t seen[kMaxQueries];
    for (int j = 0; j < queries_count; j++) seen[j] = count;
    attend_exactly(queries, queries_count, dim, tokens, count, seen, rows.dtype, scaling, softcap, scores, out);
}

// ---- attend -----------------------------------------------------------------------------------------------------------------

// Round a page's weights (softmax weight times the token's value scale; they add up to `sum`) to
// bytes. Return the unit of the bytes, 0 if all weights are 0.
inline float round_weights(const float* weights, const uint16_t* scale, int step, int valid, uint8_t* out, float* sum) {
    Floats scaled[kPage / kTile], peak = Isa::splat(0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kPage / kTile; i++) {
        const int t = i * kTile;
        Floats s;
        if (step == 1 && t + kTile <= valid) {
            s = Isa::load_half(scale + t);
        } else {
            alignas(64) float gathered[kTile];
            for (int n = 0; n < kTile; n++) gathered[n] = t + n < valid ? half_to_float(scale[int64_t(t + n) * step]) : 0.0f;
            s = Isa::load(gathered);
        }
        scaled[i] = Isa::mul(Isa::load(weights + t), s);
        peak = Isa::max(peak, scaled[i]);
    }
    if (sum) *sum = Isa::sum(Isa::add(Isa::add(scaled[0], scaled[1]), Isa::add(scaled[2], scaled[3])));
    const float largest = Isa::largest(peak);
    if (!(largest > 1e-30f)) return 0.0f;
    const Floats inverse = Isa::splat(255.0f / largest);
#pragma GCC unroll 4
    for (int i = 0; i < kPage / kTile; i++) Isa::store_rounded(out + i * kTile, Isa::mul(scaled[i], inverse));
    return largest / 255.0f;
}

// weights[j][t] are those of tokens; relative[j][t / kStretch] multiplies them where it is given.
template <int BITS, int NQ>
void attend_values(const Layout& layout, const LowBitKV& low_bit_kv, int head, int64_t first, int64_t count, const float* const* weights,
                   const float* const* relative, Partial out) {
    constexpr int NT = tiles_per_pass<NQ>(), tile_bytes = kTile * kPage * BITS / 8;
    Tables tables = value_tables<BITS>(layout.code);
    const int dim = layout.dim, groups = layout.code == Code::rotated ? 1 : layout.value_groups();
    const float unit = layout.code == Code::rotated ? normal_levels(BITS).unit : 0.5f;
    alignas(64) uint8_t rounded[NQ][kPage];
    for (int64_t start = first; start < first + count; start += kPage) {
        const uint8_t* page = low_bit_kv.pages[start / kPage];
        const uint8_t* next = page_ahead(low_bit_kv, start);
        fetch_ahead(layout.value_scale_of(next, head), kPage * groups * 2);
        if (layout.code == Code::kivi) fetch_ahead(layout.value_zero_of(next, head), kPage * groups * 2);
        int valid = min_of(kPage, first + count - start);
        const uint8_t *codes = layout.value_codes_of(page, head), *ahead = layout.value_codes_of(next, head);
        for (int group = 0; group < groups; group++) {
            int low = groups == 1 ? 0 : group * layout.value_group;
            int high = groups == 1 ? dim : min_of(dim, low + layout.value_group);
            float factor[NQ], zero[NQ];
            bool any = false;
            for (int j = 0; j < NQ; j++) {
                const float *w = weights[j] + start, share = relative ? relative[j][start / kStretch] : 1.0f;
                float sum;
                float size = round_weights(w, layout.value_scale_of(page, head) + group, groups, valid, rounded[j],
                                           layout.code == Code::kivi ? &sum : nullptr);
                if (size == 0.0f) std::memset(rounded[j], 0, kPage);
                factor[j] = size * unit * share;
                zero[j] = 0.0f;
                if (layout.code == Code::kivi) {
                    const uint16_t* z = layout.value_zero_of(page, head) + group;
                    zero[j] = sum * middle<BITS>();
                    for (int t = 0; t < valid; t++) zero[j] += w[t] * half_to_float(z[int64_t(t) * groups]);
                    zero[j] *= share;
                }
                any = any || factor[j] != 0.0f || zero[j] != 0.0f;
            }
            if (!any) continue;
            const bool plain = layout.code == Code::rotated && dim % kTile == 0;  // whole tiles, no zero points
            auto add = [&](int tile, const Ints* acc) {
                if (plain) {
                    for (int j = 0; j < NQ; j++) {
                        float* to = out.out + j * out.stride + tile;
                        Isa::store(to, Isa::fma(Isa::to_float(acc[j]), Isa::splat(factor[j]), Isa::load(to)));
                    }
                    return;
                }
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
            };
            int tile = low / kTile * kTile;
            for (; tile + NT * kTile <= min_of(dim, round_up(high, kTile)); tile += NT * kTile) {
                Ints acc[NT * NQ];
                int64_t offset = int64_t(tile / kTile) * tile_bytes;
                value_dots<BITS, NQ, NT>(codes + offset, rounded[0], tables, ahead + offset, acc);
#pragma GCC unroll 4
                for (int i = 0; i < NT; i++) add(tile + i * kTile, acc + i * NQ);
            }
            for (; tile < high; tile += kTile) {
                Ints acc[NQ];
                int64_t offset = int64_t(tile / kTile) * tile_bytes;
                if (tile + kTile <= dim)
                    value_dots<BITS, NQ, 1>(codes + offset, rounded[0], tables, ahead + offset, acc);
                else
                    short_value_dots<BITS, NQ>(codes + offset, dim - tile, rounded[0], tables, acc);
                add(tile, acc);
            }
        }
    }
}

template <class I, int BITS>
void attend_values_by_matrix(const Layout&, const LowBitKV&, int head, int64_t first, int64_t count, int queries,
                             const float* const* weights, const float* const* relative, Partial out);  // impl_matrix.hpp

void add_values(const Layout& layout, const LowBitKV& low_bit_kv, int head, int64_t first, int64_t count, int queries,
                const float* const* weights, const float* const* relative, Partial out) {
    by_bits(layout.bits, [&](auto bits) {
        constexpr int b = decltype(bits)::value;
        if constexpr (Isa::matrix)
            if (fills_matrices(layout))
                return attend_values_by_matrix<Isa, b>(layout, low_bit_kv, head, first, count, queries, weights, relative, out);
        in_fours(queries, [&](auto queries_count, int low) {
            Partial part{out.out + low * out.stride, out.peak + low, out.total + low, out.stride};
            attend_values<b, decltype(queries_count)::value>(layout, low_bit_kv, head, first, count, weights + low,
                                                             relative ? relative + low : nullptr, part);
        });
    });
}

// With the rotated code, sums over values are rotated back once.
void rotate_back(const Layout& layout, int queries, Partial out) {
    if (layout.code != Code::rotated) return;
    const int dim = layout.dim;
    alignas(64) float block[kMaxDim * kTile];
    std::memset(block, 0, sizeof(float) * size_t(dim) * kTile);
    for (int d = 0; d < dim; d++)
        for (int j = 0; j < queries; j++) block[d * kTile + j] = out.out[j * out.stride + d];
    rotate(layout, block, true);
    for (int d = 0; d < dim; d++)
        for (int j = 0; j < queries; j++) out.out[j * out.stride + d] = block[d * kTile + j];
}

void attend_with_weights(const Layout& layout, const LowBitKV& low_bit_kv, int head, int64_t first, int64_t count,
                         const float* const* weights, int queries, const float* const* peaks, Partial out) {
    const int64_t stretches = (count + kStretch - 1) / kStretch;
    float shares[kMaxQueries][kAttendChunk / kStretch];
    const float* relative[kMaxQueries];
    for (int j = 0; j < queries; j++) {
        const float* of_stretch = peaks[j] + first / kStretch;
        float peak = kLowest, total = 0.0f;
        for (int64_t s = 0; s < stretches; s++) peak = of_stretch[s] > peak ? of_stretch[s] : peak;
        for (int64_t s = 0; s < stretches; s++) {
            int64_t low = s * kStretch, high = min_of(count, low + kStretch);
            Floats sum = Isa::splat(0.0f);
            for (int64_t t = low; t < high; t += kTile) sum = Isa::add(sum, Isa::load(weights[j] + first + t));
            shares[j][s] = Isa::first(Isa::exp(Isa::splat(of_stretch[s] - peak)));
            total += shares[j][s] * Isa::sum(sum);
        }
        relative[j] = shares[j] - first / kStretch;
        out.peak[j] = peak;
        out.total[j] = total;
        std::memset(out.out + j * out.stride, 0, sizeof(float) * size_t(out.stride));
    }
    add_values(layout, low_bit_kv, head, first, count, queries, weights, relative, out);
}

}  // namespace
}  // namespace specache
