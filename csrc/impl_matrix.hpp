// Scores and sums over values with matrix registers: one pass over the codes serves all queries of
// a KV head. A part of kernels_impl.hpp.
//
// A matrix register has up to 16 rows of 64 bytes. A packed tile fills it once its levels are
// looked up: 16 tokens (keys) or channels (values) side by side, four bytes each, and a row for
// every four channels or tokens. The other operand has a row per query.
#pragma once

namespace specache {
namespace {

constexpr int kMatrixBytes = 16 * 64;
constexpr int kStretchPages = kStretch / kPage;

// Return whether a layout's tiles fill matrix registers: whole blocks of keys, whole tiles of
// channels.
inline bool fills_matrices(const Layout& layout) {
    return layout.code == Code::rotated && layout.key_rest() == 0 && layout.dim % kTile == 0;
}

// Products of four tiles with the same rows. Rounds from one that `begins` to one with an address
// to `store` to, [4][rows][16], are added up.
struct Round {
    const uint8_t* codes[4];
    int64_t ahead;  // from codes to what is read later
    const void* rows;
    int stride;
    bool begins;
    int32_t* store;
};

// Levels of the blocks that fill one matrix register.
template <class I, int BITS>
inline void look_up(const uint8_t* blocks, int64_t ahead, const Tables& tables, uint8_t* out) {
    constexpr int P = 8 / BITS;
#pragma GCC unroll 8
    for (int c = 0; c < 16 / P; c++) {
        fetch(blocks + ahead + 64 * c);
        Bytes x = Isa::load_bytes(blocks + 64 * c), low = Isa::low_nibbles(x), high = Isa::high_nibbles(x);
#pragma GCC unroll 8
        for (int m = 0; m < P; m++) I::store_bytes(out + 64 * (P * c + m), plane<BITS>(low, high, tables, m));
    }
}

// Levels go through memory, and loading a matrix register stalls on bytes that the core has not yet
// written to its cache. So the levels of one round are looked up while those of the round before
// are multiplied.
template <class I, int BITS, bool KEYS>
inline void multiply(const Round* rounds, int count, int rows, const Tables tables) {
    alignas(4096) uint8_t levels[2][4][kMatrixBytes];
    typename I::Matrices matrices(rows);
    for (int i = 0; i < 4; i++) look_up<I, BITS>(rounds[0].codes[i], rounds[0].ahead, tables, levels[0][i]);
    for (int n = 1; n <= count; n++) {
        const Round &made = rounds[n - 1], &next = rounds[n < count ? n : n - 1];
        uint8_t(*from)[kMatrixBytes] = levels[(n - 1) % 2], (*to)[kMatrixBytes] = levels[n % 2];
        const uint8_t *first = next.codes[0], *second = next.codes[1], *third = next.codes[2], *fourth = next.codes[3];
        const int64_t ahead = next.ahead;
        int32_t* store = made.store;
        if (made.begins) matrices.clear();
        matrices.take_rows(made.rows, made.stride);
        look_up<I, BITS>(first, ahead, tables, to[0]);
        matrices.template add_product<0, KEYS>(from[0]);
        look_up<I, BITS>(second, ahead, tables, to[1]);
        matrices.template add_product<1, KEYS>(from[1]);
        look_up<I, BITS>(third, ahead, tables, to[2]);
        matrices.template add_product<2, KEYS>(from[2]);
        look_up<I, BITS>(fourth, ahead, tables, to[3]);
        matrices.template add_product<3, KEYS>(from[3]);
        if (store) matrices.store(store);
    }
}

// The pages of a stretch from token `first` on, and those that are read later.
class Stretch {
public:
    Stretch(const LowBitKV& low_bit_kv, int64_t first, int64_t count) : pages(int((count + kPage - 1) / kPage)) {
        const int64_t last = (low_bit_kv.length - 1) / kPage, number = first / kPage;
        for (int i = 0; i < 2 * kStretchPages; i++) pages_[i] = low_bit_kv.pages[number + i < last ? number + i : last];
    }
    const uint8_t* page(int i) const { return pages_[i]; }

    const int pages;

private:
    const uint8_t* pages_[2 * kStretchPages];
};

template <class I, int BITS>
void score_stretch(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int64_t first, int count,
                   float scaling, float* const* scores) {
    constexpr int kRegister = kMatrixBytes * BITS / 8, kAhead = 3;  // packed bytes whose levels fill a register; pages
    constexpr int kTiles = kPage / kTile;
    const Levels& levels = normal_levels(BITS);
    const Stretch stretch(low_bit_kv, first, count);
    const int queries = prepared.count, group = layout.group, tile_bytes = kTile * layout.key_row_bytes();
    const int parts = (tile_bytes + kRegister - 1) / kRegister;
    alignas(64) int32_t sums[kStretchPages][kTiles * kMaxQueries * kTile];
    Round rounds[kStretchPages * kMaxDim / 64];
    for (int page = 0, n = 0; page < stretch.pages; page++) {
        const uint8_t *codes = layout.key_codes_of(stretch.page(page), head), *ahead = stretch.page(page + kAhead);
        fetch_ahead(layout.key_zero_of(ahead, head), int64_t(layout.groups_per_page()) * layout.dim * 2);
        fetch_ahead(layout.key_scale_of(ahead, head), kPage * 2);
        for (int part = 0; part < parts; part++, n++) {
            Round& round = rounds[n];
            for (int i = 0; i < kTiles; i++) round.codes[i] = codes + i * tile_bytes + part * kRegister;
            round.ahead = layout.key_codes_of(ahead, head) - codes;
            round.rows = prepared.bytes[0] + 64 * part, round.stride = kQueryStride;
            round.begins = part == 0, round.store = part == parts - 1 ? sums[page] : nullptr;
        }
    }
    multiply<I, BITS, true>(rounds, stretch.pages * parts, queries, key_tables<BITS>(layout.code));

    for (int page = 0; page < stretch.pages; page++) {
        const int valid = min_of(kPage, count - page * kPage);
        const uint16_t* mean = layout.key_zero_of(stretch.page(page), head);
        Floats token_scale[kTiles];
        for (int i = 0; i < kTiles; i++) token_scale[i] = Isa::load_half(layout.key_scale_of(stretch.page(page), head) + i * kTile);
        in_fours(queries, [&](auto four, int low) {
            constexpr int NQ = decltype(four)::value;
            for (int g = 0; g < valid; g += group) {
                float bias[NQ];
                half_dots<NQ>(prepared.query + low, mean + int64_t(g / group) * layout.dim, layout.dim, bias);
                const int stop = min_of(valid, g + group);
                for (int j = 0; j < NQ; j++) {
                    const float unit = prepared.scale[low + j] * levels.unit * scaling;
                    const Floats factor = Isa::splat(unit), more = Isa::splat(bias[j] * scaling);
                    const Floats offset = Isa::splat(float(prepared.sum[low + j] * levels.offset));
                    float* to = scores[low + j] + first + page * kPage;
                    const int32_t* sum = sums[page] + (low + j) * kTile;
                    auto at = [&](int i) {
                        Floats x = Isa::mul(Isa::sub(Isa::to_float(I::load_ints(sum + i * queries * kTile)), offset), factor);
                        return Isa::fma(x, token_scale[i], more);
                    };
                    if (g == 0 && stop == kPage) {
#pragma GCC unroll 4
                        for (int i = 0; i < kTiles; i++) Isa::store(to + i * kTile, at(i));
                        continue;
                    }
                    for (int i = g / kTile; i * kTile < stop; i++)
                        store_lanes(to + i * kTile, g > i * kTile ? g - i * kTile : 0, min_of(kTile, stop - i * kTile), at(i));
                }
            }
        });
    }
}

template <class I, int BITS>
void score_by_matrix(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
                     float scaling, float* const* scores) {
    for (int64_t start = first; start < first + count; start += kStretch)
        score_stretch<I, BITS>(layout, low_bit_kv, head, prepared, start, min_of(kStretch, first + count - start), scaling, scores);
}

// Attend to a stretch for up to eight queries. Weights times value scales are rounded to 16 bits of
// the stretch's largest and go through the registers as two rows of bytes: sums stay in registers
// for the whole stretch.
template <class I, int BITS>
void attend_stretch(const Layout& layout, const LowBitKV& low_bit_kv, int head, int64_t first, int count, int queries,
                    const float* const* weights, const float* share, const Partial& out) {
    constexpr int tile_bytes = kTile * kPage * BITS / 8;
    const Stretch stretch(low_bit_kv, first, count);
    const int tiles = layout.dim / kTile, groups = (tiles + 3) / 4;
    alignas(64) uint8_t rounded[kStretchPages][16][64];
    alignas(64) int32_t sums[kMaxDim / kTile / 4][4 * 16 * kTile];
    alignas(64) float scale[kStretch];

    for (int t = 0; t < stretch.pages * kPage; t += kTile)
        Isa::store(scale + t, load_halves(layout.value_scale_of(stretch.page(t / kPage), head) + t % kPage, count - t));
    float unit[8];  // from the largest weight left: a fetched pair's weight may have been far above
    for (int j = 0; j < queries; j++) {
        Floats largest = Isa::splat(1e-30f);
        for (int t = 0; t < stretch.pages * kPage; t += kTile)
            largest = Isa::max(largest, Isa::mul(Isa::load(weights[j] + first + t), Isa::load(scale + t)));
        unit[j] = Isa::largest(largest) / 65535.0f;
    }
    for (int page = 0; page < stretch.pages; page++) {
        fetch_ahead(layout.value_scale_of(stretch.page(page + kStretchPages), head), kPage * 2);
        for (int j = 0; j < queries; j++)
            I::store_in_two(rounded[page][j], rounded[page][queries + j], weights[j] + first + page * kPage, scale + page * kPage,
                            1.0f / unit[j]);
    }

    Round rounds[kMaxDim / kTile / 4 * kStretchPages];
    for (int group = 0, n = 0; group < groups; group++)
        for (int page = 0; page < stretch.pages; page++, n++) {
            const uint8_t* codes = layout.value_codes_of(stretch.page(page), head);
            Round& round = rounds[n];
            for (int i = 0; i < 4; i++) round.codes[i] = codes + min_of(4 * group + i, tiles - 1) * tile_bytes;
            round.ahead = layout.value_codes_of(stretch.page(page + kStretchPages), head) - codes;
            round.rows = rounded[page], round.stride = 64;
            round.begins = page == 0, round.store = page == stretch.pages - 1 ? sums[group] : nullptr;
        }
    multiply<I, BITS, false>(rounds, groups * stretch.pages, 2 * queries, value_tables<BITS>(layout.code));

    for (int j = 0; j < queries; j++) {
        const Floats by = Isa::splat(unit[j] * normal_levels(BITS).unit * share[j]);
        float* to = out.out + j * out.stride;
        for (int tile = 0; tile < tiles; tile++) {
            const int32_t* sum = sums[tile / 4] + (tile % 4 * 2 * queries + j) * kTile;
            const Floats high = Isa::to_float(I::load_ints(sum)), low = Isa::to_float(I::load_ints(sum + queries * kTile));
            Isa::store(to + tile * kTile, Isa::fma(Isa::fma(high, Isa::splat(256.0f), low), by, Isa::load(to + tile * kTile)));
        }
    }
}

template <class I, int BITS>
void attend_values_by_matrix(const Layout& layout, const LowBitKV& low_bit_kv, int head, int64_t first, int64_t count, int queries,
                             const float* const* weights, const float* const* relative, Partial out) {
    for (int low = 0; low < queries; low += 8) {
        const int some = min_of(8, queries - low);
        const Partial part{out.out + low * out.stride, out.peak + low, out.total + low, out.stride};
        for (int64_t start = first; start < first + count; start += kStretch) {
            float share[8];
            for (int j = 0; j < some; j++) share[j] = relative ? relative[low + j][start / kStretch] : 1.0f;
            attend_stretch<I, BITS>(layout, low_bit_kv, head, start, min_of(kStretch, first + count - start), some, weights + low, share, part);
        }
    }
}

}  // namespace
}  // namespace specache
