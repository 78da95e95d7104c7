// Products of rows of activations with a linear layer's weights. A part of kernels_impl.hpp.
//
// Codes are packed in tiles of 16 outputs: for every block of 32 inputs, the register of lanes j
// (j = 0 to 7) holds inputs 4 j to 4 j + 3 of each output. A row is rounded to 8 bits per block of
// 32 inputs. Sums of a block are exact integers, and blocks are added in their order, so a row's
// bits do not depend on the rows beside it.
#pragma once

namespace specache {
namespace {

constexpr int kLanes = kProductBlock / 4;  // registers of 64 codes in a block of 16 outputs
// Rows whose sums stay in registers.
constexpr int kRowsPerPass = Isa::kProductSums >= 16 ? 8 : 2;

inline Floats magnitude(Floats x) { return Isa::max(x, Isa::sub(Isa::splat(0.0f), x)); }

// Round a row of `inputs` elements (whole blocks), row `into.row` of the `into.rows` of its pass: x =
// codes * scale, one scale per block. `sums`: of a block's codes. A block with NaN or infinity gets
// the scale NaN.
void round_row(const uint8_t* x, Dtype dtype, int64_t inputs, const RoundedRow& into) {
    const Floats middle = Isa::splat(128.0f);
    for (int64_t start = 0, block = 0; start < inputs; start += kProductBlock, block++) {
        const uint8_t* from = x + start * itemsize(dtype);
        const Floats a = load_elements(from, dtype, kTile), b = load_elements(from + kTile * itemsize(dtype), dtype, kTile);
        const Floats nothing = Isa::add(Isa::mul(a, Isa::splat(0.0f)), Isa::mul(b, Isa::splat(0.0f)));
        const float largest = Isa::largest(Isa::max(magnitude(a), magnitude(b)));
        const int64_t place = block * into.rows + into.row;
        int8_t* out = into.codes + place * kProductBlock;
        int32_t sum = 0;
        if (!(Isa::sum(nothing) == 0.0f)) {
            into.scales[place] = float_of(0x7FC00000), into.sums[place] = 0;
            std::memset(out, 0, kProductBlock);
            continue;
        }
        const Floats inverse = Isa::splat(largest > 1e-30f ? 127.0f / largest : 0.0f);
        alignas(64) uint8_t shifted[kProductBlock];
        Isa::store_rounded(shifted, Isa::fma(a, inverse, middle));
        Isa::store_rounded(shifted + kTile, Isa::fma(b, inverse, middle));
        for (int i = 0; i < kProductBlock; i++) {
            const int code = int(shifted[i]) - 128;
            out[i] = int8_t(code), sum += code;
        }
        into.scales[place] = largest > 1e-30f ? largest / 127.0f : 0.0f, into.sums[place] = sum;
    }
}

// Store 16 sums, or the first `count`, as elements of `dtype`.
inline void store_outputs(uint8_t* out, Dtype dtype, Floats sums, const uint8_t* bias, int count) {
    if (bias) sums = Isa::add(sums, load_elements(bias, dtype, count));
    if (dtype == Dtype::f32) {
        if (count >= kTile) return Isa::store(reinterpret_cast<float*>(out), sums);
        return store_partial(reinterpret_cast<float*>(out), count, sums);
    }
    alignas(64) uint16_t halves[kTile];
    uint16_t* const into = count >= kTile ? reinterpret_cast<uint16_t*>(out) : halves;
    if (dtype == Dtype::bf16) {
        Isa::store_bf16(into, sums);
    } else {
        alignas(64) float x[kTile];
        Isa::store(x, sums);
        for (int i = 0; i < kTile; i++) {
            const uint32_t bits = bits_of(x[i]), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
            // above 65519.996 it rounds to infinity
            into[i] = size > 0x7F800000 ? uint16_t(0x7E00) : size >= 0x477FF000 ? uint16_t(sign | 0x7C00) : float_to_half(x[i]);
        }
    }
    if (into == halves) std::memcpy(out, halves, size_t(count) * 2);
}

// Sums of one tile's block of 8-bit codes with NR rows [NR, 32].
template <int NR>
inline void block_of_8(const uint8_t* codes, const int8_t* rows, const int32_t* sums, Ints* acc) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) acc[r] = Isa::splat_int(-Isa::weight_offset * sums[r]);
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j++) {
        const Isa::Weights weights = Isa::weights(Isa::load_bytes(codes + 64 * j));
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) acc[r] = Isa::dot_weights(acc[r], weights, dword(rows + r * kProductBlock + 4 * j));
    }
}

// The same with 4-bit codes, 0 to 15 for -8 to 7: the low nibbles of register j hold lanes j, the
// high ones lanes j + 4.
template <int NR>
inline void block_of_4(const uint8_t* codes, const int8_t* rows, const int32_t* sums, Ints* acc) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) acc[r] = Isa::splat_int(-8 * sums[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kLanes / 2; j++) {
        const Bytes both = Isa::load_bytes(codes + 64 * j), low = Isa::low_nibbles(both), high = Isa::high_nibbles(both);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) {
            const int8_t* row = rows + r * kProductBlock + 4 * j;
            acc[r] = Isa::dot_us(acc[r], low, dword(row));
            acc[r] = Isa::dot_us(acc[r], high, dword(row + kProductBlock / 2));
        }
    }
}

template <int BITS, int NR>
void tile_product(const PackedTile& tile, const RoundedRows& x, int64_t first, const Outputs& out) {
    Floats total[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) total[r] = Isa::splat(0.0f);
    const int64_t blocks = x.inputs / kProductBlock;
    constexpr int block_bytes = kTile * kProductBlock * BITS / 8;
    const uint8_t* codes = tile.codes;
    const int8_t* rows = x.codes + first * x.inputs;
    const float* scales = x.scales + first * blocks;
    const int32_t* sums = x.sums + first * blocks;
    for (int64_t b = 0; b < blocks; b++, codes += block_bytes, rows += NR * kProductBlock, scales += NR, sums += NR) {
#pragma GCC unroll 8
        for (int i = 0; i < block_bytes; i += 64) __builtin_prefetch(codes + kProductAhead + i, 0, 3);
        Ints acc[NR];
        if (BITS == 8)
            block_of_8<NR>(codes, rows, sums, acc);
        else
            block_of_4<NR>(codes, rows, sums, acc);
        const Floats scale = Isa::load_bf16(tile.scales + b * kTile);
        const Floats zero = BITS == 4 ? Isa::load_bf16(tile.zeros + b * kTile) : scale;
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) {
            Floats part = Isa::mul(Isa::to_float(acc[r]), scale);
            if (BITS == 4) part = Isa::fma(zero, Isa::splat(float(sums[r])), part);
            total[r] = Isa::fma(part, Isa::splat(scales[r]), total[r]);
        }
    }
    for (int r = 0; r < NR; r++) store_outputs(out.at(first + r), out.dtype, total[r], out.bias, out.count);
}

void packed_product(const PackedTile& tile, const RoundedRows& x, int64_t rows, const Outputs& out) {
    for (int64_t first = 0; first < rows;) {
        const int count = rows_of_pass(rows - first, kRowsPerPass);
        switch (count + (tile.zeros ? 16 : 0)) {
            case 1: tile_product<8, 1>(tile, x, first, out); break;
            case 2: tile_product<8, 2>(tile, x, first, out); break;
            case 4: tile_product<8, std::min(4, kRowsPerPass)>(tile, x, first, out); break;
            case 8: tile_product<8, kRowsPerPass>(tile, x, first, out); break;
            case 17: tile_product<4, 1>(tile, x, first, out); break;
            case 18: tile_product<4, 2>(tile, x, first, out); break;
            case 20: tile_product<4, std::min(4, kRowsPerPass)>(tile, x, first, out); break;
            default: tile_product<4, kRowsPerPass>(tile, x, first, out);
        }
        first += count;
    }
}

// ---- weights as they are: [outputs, inputs] of a float type -------------------------------------------------------------------

// Inputs are taken in blocks of 32, as two registers: of bfloat16 weights the even and the odd ones,
// which takes one operation each, of others the first and the last. Activations lie in that order.

template <Dtype DTYPE>
inline void load_weights(const uint8_t* p, Floats& first, Floats& second) {
    if (DTYPE == Dtype::bf16) return Isa::load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), first, second);
    if (DTYPE == Dtype::f32) {
        first = Isa::load(reinterpret_cast<const float*>(p)), second = Isa::load(reinterpret_cast<const float*>(p) + kTile);
        return;
    }
    first = Isa::load_half(reinterpret_cast<const uint16_t*>(p)), second = Isa::load_half(reinterpret_cast<const uint16_t*>(p) + kTile);
}

// Widen a row to float32 in the order of `weights`, the blocks `stride` elements apart. Elements past
// `inputs`, up to a whole block, are zero.
void widen_row(const uint8_t* x, Dtype dtype, int64_t inputs, Dtype weights, float* out, int64_t stride) {
    for (int64_t start = 0; start < inputs; start += kProductBlock, out += stride) {
        const int count = min_of(kProductBlock, inputs - start);
        const uint8_t* from = x + start * itemsize(dtype);
        if (weights != Dtype::bf16) {
            Isa::store(out, load_elements(from, dtype, count));
            Isa::store(out + kTile, count > kTile ? load_elements(from + kTile * itemsize(dtype), dtype, count - kTile) : Isa::splat(0.0f));
            continue;
        }
        for (int i = 0; i < kProductBlock; i++)
            out[i % 2 * kTile + i / 2] = i < count ? scalar_of(from + i * itemsize(dtype), dtype) : 0.0f;
    }
}

// Rows that share a pass over the weights.
constexpr int kPlainRows = Isa::kProductSums >= 16 ? 8 : 1;

// A row of weights is taken whole where the activations are so few that they stay in the first-level
// cache for all outputs: four rows are one stretch of memory. Otherwise so many inputs at a time.
constexpr int64_t kFewActivations = 8192, kPlainInputs = 256;

// Lanes of sums that are not added up yet, of each row and output of a tile.
struct LaneSums {
    alignas(64) float lanes[kProductRows][kTile][kTile];
};

// Add inputs [start, stop) of NO outputs to the sums of NR rows from `first` on, in one order of
// addition whatever NR and NO are. With AHEAD, prefetch the weights at `next`: whole rows in the order of
// their addresses, which memory delivers faster than four rows in turn.
template <Dtype DTYPE, int NR, int NO, bool AHEAD>
inline void some_outputs(const PlainTile& tile, int output, const uint8_t* next, const FloatRows& x, int64_t first, int64_t start,
                         int64_t stop, LaneSums& sums) {
    Floats acc[NO][NR];
    for (int o = 0; o < NO; o++)
        for (int r = 0; r < NR; r++) acc[o][r] = Isa::load(sums.lanes[first + r][output + o]);
    constexpr int size = DTYPE == Dtype::f32 ? 4 : 2;
    const uint8_t* weights = tile.weights + output * tile.stride;
    const float* rows = x.values + first * x.stride + start * NR;
    const bool in_order = stop - start == x.inputs && tile.stride == x.inputs * size;  // all that is read
    for (int64_t i = start; i < stop; i += kProductBlock, rows += NR * kProductBlock) {
        Floats w[NO][2];
        if (i + kProductBlock <= stop) {
#pragma GCC unroll 4
            for (int o = 0; o < NO; o++) {
                const uint8_t* from = weights + o * tile.stride + i * size;
                load_weights<DTYPE>(from, w[o][0], w[o][1]);
                if (AHEAD && in_order) {
                    const uint8_t* ahead = next + ((i - start) * NO + o * kProductBlock) * size;
                    fetch(ahead);
                    if (size == 4) fetch(ahead + 64);
                } else if (AHEAD) {
                    const uint8_t* ahead = next + o * tile.stride + (i - start) * size;
                    __builtin_prefetch(ahead, 0, 3);
                    if (size == 4) __builtin_prefetch(ahead + 64, 0, 3);
                }
            }
        } else {
            for (int o = 0; o < NO; o++) {
                alignas(64) uint8_t rest[kProductBlock * size] = {};
                std::memcpy(rest, weights + o * tile.stride + i * size, size_t(stop - i) * size);
                load_weights<DTYPE>(rest, w[o][0], w[o][1]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) {
            const Floats a = Isa::load(rows + r * kProductBlock), b = Isa::load(rows + r * kProductBlock + kTile);
#pragma GCC unroll 4
            for (int o = 0; o < NO; o++) acc[o][r] = Isa::fma(w[o][1], b, Isa::fma(w[o][0], a, acc[o][r]));
        }
    }
    for (int o = 0; o < NO; o++)
        for (int r = 0; r < NR; r++) Isa::store(sums.lanes[first + r][output + o], acc[o][r]);
}

template <Dtype DTYPE, int NR, bool AHEAD>
inline void four_outputs(const PlainTile& tile, int output, int outputs, const uint8_t* next, const FloatRows& x, int64_t first,
                         int64_t start, int64_t stop, LaneSums& sums) {
    if (outputs < 4)
        for (int o = 0; o < outputs; o++) some_outputs<DTYPE, NR, 1, false>(tile, output + o, next, x, first, start, stop, sums);
    else if (NR <= 4)
        some_outputs<DTYPE, NR, 4, AHEAD>(tile, output, next, x, first, start, stop, sums);
    else
        for (int o = 0; o < 4; o += 2)
            some_outputs<DTYPE, NR, 2, AHEAD>(tile, output + o, next + o * tile.stride, x, first, start, stop, sums);
}

template <Dtype DTYPE, bool AHEAD>
inline int of_rows(const PlainTile& tile, int output, int outputs, const uint8_t* next, const FloatRows& x, int64_t first, int64_t left,
                   int64_t start, int64_t stop, LaneSums& sums) {
    const int count = rows_of_pass(left, kPlainRows);
    switch (count) {
        case 1: four_outputs<DTYPE, 1, AHEAD>(tile, output, outputs, next, x, first, start, stop, sums); break;
        case 2: four_outputs<DTYPE, std::min(2, kPlainRows), AHEAD>(tile, output, outputs, next, x, first, start, stop, sums); break;
        case 4: four_outputs<DTYPE, std::min(4, kPlainRows), AHEAD>(tile, output, outputs, next, x, first, start, stop, sums); break;
        default: four_outputs<DTYPE, kPlainRows, AHEAD>(tile, output, outputs, next, x, first, start, stop, sums);
    }
    return count;
}

template <Dtype DTYPE>
void plain_tile(const PlainTile& tile, const FloatRows& x, int64_t rows, const Outputs& out) {
    LaneSums sums;
    for (int64_t r = 0; r < rows; r++) std::memset(sums.lanes[r], 0, sizeof sums.lanes[r]);
    constexpr int size = DTYPE == Dtype::f32 ? 4 : 2;
    const int64_t at_a_time = rows * x.inputs <= kFewActivations ? x.inputs : kPlainInputs;
    for (int64_t start = 0; start < x.inputs; start += at_a_time) {
        const int64_t stop = std::min(start + at_a_time, x.inputs);
        const uint8_t* later = stop < x.inputs ? tile.weights + stop * size : tile.weights + kTile * tile.stride;  // of the next tile
        for (int o = 0; o < out.count; o += 4) {
            const uint8_t* next = o + 4 < out.count ? tile.weights + (o + 4) * tile.stride + start * size : later;
            const int outputs = min_of(4, out.count - o);
            int64_t first = of_rows<DTYPE, true>(tile, o, outputs, next, x, 0, rows, start, stop, sums);
            while (first < rows) first += of_rows<DTYPE, false>(tile, o, outputs, next, x, first, rows - first, start, stop, sums);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        alignas(64) float totals[kTile];
        for (int o = 0; o < kTile; o += 4) {
            Floats four[4];
            for (int i = 0; i < 4; i++) four[i] = Isa::load(sums.lanes[r][o + i]);
            Isa::sum_four(four, totals + o);
        }
        store_outputs(out.at(r), out.dtype, Isa::load(totals), out.bias, out.count);
    }
}

void plain_product(const PlainTile& tile, const FloatRows& x, int64_t rows, const Outputs& out) {
    by_dtype(tile.dtype, [&](auto dtype) { plain_tile<Dtype(decltype(dtype)::value)>(tile, x, rows, out); });
}

}  // namespace
}  // namespace specache
