// Plain C++, for every processor. The other instruction sets are checked against it.
#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace specache {
namespace {

struct Isa {
    static constexpr const char* name = "generic";
    static constexpr int sums = 4, kProductSums = 4;
    static constexpr int kQueriesPerPass = 4;
    static constexpr bool matrix = false;
    static constexpr bool by_tile = false;

    struct Bytes { uint8_t v[64]; };
    struct Ints { int32_t v[16]; };
    struct Floats { float v[16]; };

    static Bytes load_bytes(const uint8_t* p) {
        Bytes x;
        std::memcpy(x.v, p, 64);
        return x;
    }
    static Bytes load_table(const uint8_t* p) {
        Bytes x;
        for (int i = 0; i < 64; i++) x.v[i] = p[i % 16];
        return x;
    }
    static Bytes low_nibbles(const Bytes& x) {
        Bytes y;
        for (int i = 0; i < 64; i++) y.v[i] = x.v[i] & 15;
        return y;
    }
    static Bytes high_nibbles(const Bytes& x) {
        Bytes y;
        for (int i = 0; i < 64; i++) y.v[i] = uint8_t(x.v[i] >> 4);
        return y;
    }
    static Bytes lookup(const Bytes& table, const Bytes& index) {
        Bytes y;
        for (int i = 0; i < 64; i++) y.v[i] = table.v[index.v[i]];
        return y;
    }

    static Ints zero() { return Ints{}; }
    static Ints splat_int(int32_t x) {
        Ints y;
        for (int i = 0; i < 16; i++) y.v[i] = x;
        return y;
    }
    static constexpr int32_t weight_offset = 0;
    using Weights = Bytes;
    static Weights weights(const Bytes& x) { return x; }
    static Ints dot_weights(Ints acc, const Weights& w, int32_t four) {
        int8_t s[4];
        std::memcpy(s, &four, 4);
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 4; k++) acc.v[i] += int(int8_t(w.v[4 * i + k])) * s[k];
        return acc;
    }
    // Per 32-bit lane: acc plus the products of four unsigned bytes with four signed ones.
    static Ints dot_us(Ints acc, const Bytes& u, int32_t four) {
        int8_t s[4];
        std::memcpy(s, &four, 4);
        for (int i = 0; i < 16; i++)
            acc.v[i] += int(u.v[4 * i]) * s[0] + int(u.v[4 * i + 1]) * s[1] + int(u.v[4 * i + 2]) * s[2] + int(u.v[4 * i + 3]) * s[3];
        return acc;
    }
    static Ints dot_su(Ints acc, int32_t four, const Bytes& s) {
        uint8_t u[4];
        std::memcpy(u, &four, 4);
        for (int i = 0; i < 16; i++)
            acc.v[i] += int(int8_t(s.v[4 * i])) * u[0] + int(int8_t(s.v[4 * i + 1])) * u[1] + int(int8_t(s.v[4 * i + 2])) * u[2] +
                        int(int8_t(s.v[4 * i + 3])) * u[3];
        return acc;
    }

    static Floats load(const float* p) {
        Floats x;
        std::memcpy(x.v, p, 64);
        return x;
    }
    static void store(float* p, const Floats& x) { std::memcpy(p, x.v, 64); }
    static Floats load_bf16(const uint16_t* p) {
        Floats x;
        for (int i = 0; i < 16; i++) {
            uint32_t bits = uint32_t(p[i]) << 16;
            std::memcpy(&x.v[i], &bits, 4);
        }
        return x;
    }
    static void store_bf16(uint16_t* p, const Floats& x) {
        for (int i = 0; i < 16; i++) {
            uint32_t bits;
            std::memcpy(&bits, &x.v[i], 4);
            p[i] = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        }
    }
    static void load_bf16_pairs(const uint16_t* p, Floats& even, Floats& odd) {
        for (int i = 0; i < 16; i++) {
            const uint32_t first = uint32_t(p[2 * i]) << 16, second = uint32_t(p[2 * i + 1]) << 16;
            std::memcpy(&even.v[i], &first, 4);
            std::memcpy(&odd.v[i], &second, 4);
        }
    }
    static Floats load_half(const uint16_t* p) {
        Floats x;
        for (int i = 0; i < 16; i++) {
            uint32_t h = p[i], sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
            float small = float(int(fraction)) * (1.0f / 16777216.0f), y;
            bits = exponent == 31 ? 0x7F800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
            if (!exponent) std::memcpy(&bits, &small, 4);
            bits |= sign;
            std::memcpy(&y, &bits, 4);
            x.v[i] = y;
        }
        return x;
    }
    static Floats splat(float x) {
        Floats y;
        for (int i = 0; i < 16; i++) y.v[i] = x;
        return y;
    }
    static Floats to_float(const Ints& x) {
        Floats y;
        for (int i = 0; i < 16; i++) y.v[i] = float(x.v[i]);
        return y;
    }
#define SPECACHE_LANES(name, expression)                       \
    static Floats name(const Floats& a, const Floats& b) {     \
        Floats y;                                              \
        for (int i = 0; i < 16; i++) y.v[i] = expression;      \
        return y;                                              \
    }
    SPECACHE_LANES(add, a.v[i] + b.v[i])
    SPECACHE_LANES(sub, a.v[i] - b.v[i])
    SPECACHE_LANES(mul, a.v[i] * b.v[i])
    SPECACHE_LANES(div, a.v[i] / b.v[i])
    SPECACHE_LANES(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
    SPECACHE_LANES(min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef SPECACHE_LANES
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        Floats y;
        for (int i = 0; i < 16; i++) y.v[i] = a.v[i] * b.v[i] + c.v[i];
        return y;
    }
    static Floats exp(const Floats& a) {
        Floats y;
        for (int i = 0; i < 16; i++) {
            float x = a.v[i] > -88.0f ? a.v[i] : -88.0f;
            float n = float(int(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f)));
            float r = x - n * 0.693359375f + n * 2.12194440e-4f;
            float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                       1.6666665459e-1f) * r + 5.0000001201e-1f;
            p = p * r * r + r + 1.0f;
            uint32_t bits = uint32_t(int(n) + 127) << 23;
            float scale;
            std::memcpy(&scale, &bits, 4);
            y.v[i] = p * scale;
        }
        return y;
    }
    static void sum_four(const Floats* x, float* out) {
        for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
    }
    static float sum(const Floats& x) {
        float s[8];
        for (int i = 0; i < 8; i++) s[i] = x.v[i] + x.v[i + 8];
        for (int i = 0; i < 4; i++) s[i] += s[i + 4];
        return (s[0] + s[2]) + (s[1] + s[3]);
    }
    static float largest(const Floats& x) {
        float y = x.v[0];
        for (int i = 1; i < 16; i++) y = x.v[i] > y ? x.v[i] : y;
        return y;
    }
    static float first(const Floats& x) { return x.v[0]; }
    static Ints count_not_less(Ints count, const Floats& a, const Floats& b) {
        for (int i = 0; i < 16; i++) count.v[i] += a.v[i] >= b.v[i];
        return count;
    }
    static uint32_t not_less(const Floats& a, const Floats& b) {
        uint32_t mask = 0;
        for (int i = 0; i < 16; i++) mask |= uint32_t(a.v[i] >= b.v[i]) << i;
        return mask;
    }
    // 16 floats of 0 to 255, rounded to bytes.
    static void store_rounded(uint8_t* p, const Floats& x) {
        for (int i = 0; i < 16; i++) p[i] = uint8_t(int(x.v[i] + 0.5f));
    }
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& generic_kernels() { return kTable; }
}  // namespace specache
