// Quantise and pack, for both codes. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

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
    const int bounds = (1 << layout.bits) - 1;
    Floats bound[15], jump[15];  // between two levels, and what the upper one has more, in steps
    for (int i = 0; i < bounds; i++) {
        bound[i] = Isa::splat((float(levels.steps[i]) * levels.unit + float(levels.steps[i + 1]) * levels.unit) / 2);
        jump[i] = Isa::splat(float(levels.steps[i + 1] - levels.steps[i]));
    }
    const Floats zero = Isa::splat(0.0f), one = Isa::splat(1.0f), huge = Isa::splat(1e38f), lowest = Isa::splat(float(levels.steps[0]));
    Floats squares = zero;
    for (int d = 0; d < layout.dim; d++) {
        Floats y = Isa::load(x + d * kTile);
        squares = Isa::fma(y, y, squares);
    }
    alignas(64) float rms[kTile], unit_squares[kTile], product[kTile];
    Isa::store(rms, squares);
    for (int t = 0; t < kTile; t++) rms[t] = root(rms[t] / float(layout.dim));
    const Floats size = Isa::max(Isa::load(rms), Isa::splat(1.17549435e-38f));
    Floats sum_squares = zero, sum_products = zero;
    for (int d = 0; d < layout.dim; d++) {
        Floats u = Isa::div(Isa::load(x + d * kTile), size), code = zero, step = lowest;
        for (int i = 0; i < bounds; i++) {
            Floats over = Isa::min(Isa::max(Isa::mul(Isa::sub(u, bound[i]), huge), zero), one);  // 1 above the bound
            code = Isa::add(code, over);
            step = Isa::fma(over, jump[i], step);
        }
        Isa::store_rounded(codes + d * kPage, code);
        sum_squares = Isa::fma(u, u, sum_squares);
        sum_products = Isa::fma(u, step, sum_products);
    }
    Isa::store(unit_squares, sum_squares);
    Isa::store(product, Isa::mul(sum_products, Isa::splat(levels.unit)));
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

}  // namespace
}  // namespace specache
