// AVX-512 with VNNI: a block is one register.
#include <immintrin.h>

#include "kernels.hpp"

namespace specache {
namespace {

struct Isa {
    static constexpr const char* name = "avx512";
    static constexpr int sums = 16;  // blocks of sums that stay in registers, beside what they are made from

    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    static Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Bytes load_table(const uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
    static Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

    static Ints zero() { return _mm512_setzero_si512(); }
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
    static Floats splat(float x) { return _mm512_set1_ps(x); }
    static Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats exp(Floats a) {
        Floats x = _mm512_max_ps(a, _mm512_set1_ps(-88.0f));
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
        Floats whole = _mm512_cvtepi32_ps(n);
        Floats r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
        r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), r);
        Floats p = _mm512_set1_ps(1.9875691500e-4f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
        p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
        __m512i scale = _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23);
        return _mm512_mul_ps(p, _mm512_castsi512_ps(scale));
    }
    static float sum(Floats x) { return _mm512_reduce_add_ps(x); }
    static float largest(Floats x) { return _mm512_reduce_max_ps(x); }
    static float first(Floats x) { return _mm512_cvtss_f32(x); }
    static uint32_t not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static void store_rounded(uint8_t* p, Floats x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
    }
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& avx512_kernels() { return kTable; }
}  // namespace specache
