// The vector operations of AVX-512 with VNNI: a block is one register.
#pragma once

#include <immintrin.h>

#include "kernels.hpp"

namespace specache {
namespace {

struct Wide {
    static constexpr int sums = 8;  // blocks of sums that stay in registers beside the operands, without moves between them
    static constexpr int kProductSums = 16;  // the same of `impl_product.hpp`, whose loops are smaller
    static constexpr bool by_tile = false;

    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    static Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(uint8_t* p, Bytes x) { _mm512_store_si512(p, x); }
    static Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Bytes load_table(const uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
    static Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

    static Ints zero() { return _mm512_setzero_si512(); }
    static Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
    // Signed weights as unsigned bytes, `weight_offset` above: the instruction takes one signed operand.
    static constexpr int32_t weight_offset = 128;
    using Weights = Bytes;
    static Weights weights(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80))); }
    static Ints dot_weights(Ints acc, Weights w, int32_t four) { return dot_us(acc, w, four); }
    static Ints dot_us(Ints acc, Bytes u, int32_t four) { return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(four)); }
    static Ints dot_su(Ints acc, int32_t four, Bytes s) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four), s); }

    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    static Floats load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Floats load_bf16(const uint16_t* p) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    // Round to nearest even.
    static void store_bf16(uint16_t* p, Floats x) {
        const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0))));
    }
    // 32 elements: the even ones, and the odd ones.
    static void load_bf16_pairs(const uint16_t* p, Floats& even, Floats& odd) {
        const __m512i x = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000))));
    }
    static Floats splat(float x) { return _mm512_set1_ps(x); }
    static Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // exp(x) = 2^n 2^r for x from -86 to 88, n whole and |r| <= 1/2: a polynomial of least relative
    // error, 2e-7.
    static Floats exp(Floats a) {
        const Floats log2e = _mm512_set1_ps(1.44269504f);
        const Floats whole = _mm512_set1_ps(12582912.0f);  // 1.5 2^23: leaves n in the low bits
        const Floats x = _mm512_max_ps(a, _mm512_set1_ps(-86.0f));
        const Floats shifted = _mm512_fmadd_ps(x, log2e, whole);
        const Floats r = _mm512_fmsub_ps(x, log2e, _mm512_sub_ps(shifted, whole));
        Floats p = _mm512_set1_ps(1.3276472e-3f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6755410e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507131e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022120e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314694e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
        const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
    }
    // Sum each of four blocks, with fewer shuffles than four single sums.
    static void sum_four(const Floats* x, float* out) {
        const Floats a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const Floats b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
        const Floats four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    static float sum(Floats x) { return _mm512_reduce_add_ps(x); }
    static float largest(Floats x) { return _mm512_reduce_max_ps(x); }
    static float first(Floats x) { return _mm512_cvtss_f32(x); }
    static uint32_t not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    // count + 1 where a is not less than b.
    static Ints count_not_less(Ints count, Floats a, Floats b) {
        return _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), count, _mm512_set1_epi32(1));
    }
    static void store_rounded(uint8_t* p, Floats x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
    }
};

}  // namespace
}  // namespace specache
