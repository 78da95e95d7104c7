#include "elements.hpp"

#include <cstring>

namespace specache {
namespace {

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = float(int(fraction)) * (1.0f / 16777216.0f);  // 2^-24
    return sign ? -small : small;
}

uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);   // not a number
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));  // subnormal: units of 2^-24
    return uint16_t(sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

uint16_t float_to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // not a number
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void widen(const uint8_t* from, Dtype dtype, int count, float* to) {
    if (dtype == Dtype::f32) {
        std::memcpy(to, from, size_t(count) * sizeof(float));
        return;
    }
    for (int i = 0; i < count; i++) {
        uint16_t h;
        std::memcpy(&h, from + 2 * i, 2);
        to[i] = dtype == Dtype::bf16 ? float_of(uint32_t(h) << 16) : half_to_float(h);
    }
}

void narrow(const float* from, Dtype dtype, int count, uint8_t* to) {
    if (dtype == Dtype::f32) {
        std::memcpy(to, from, size_t(count) * sizeof(float));
        return;
    }
    for (int i = 0; i < count; i++) {
        const uint16_t h = dtype == Dtype::bf16 ? float_to_bf16(from[i]) : float_to_half(from[i]);
        std::memcpy(to + 2 * i, &h, 2);
    }
}

bool all_finite(const uint8_t* numbers, Dtype dtype, int count) {
    const uint32_t exponent = dtype == Dtype::f32 ? 0x7F800000 : dtype == Dtype::bf16 ? 0x7F80 : 0x7C00;
    bool finite = true;
    if (dtype == Dtype::f32)
        for (int i = 0; i < count; i++) {
            uint32_t bits;
            std::memcpy(&bits, numbers + 4 * i, 4);
            finite &= (bits & exponent) != exponent;
        }
    else
        for (int i = 0; i < count; i++) {
            uint16_t bits;
            std::memcpy(&bits, numbers + 2 * i, 2);
            finite &= (bits & exponent) != exponent;
        }
    return finite;
}

}  // namespace specache
