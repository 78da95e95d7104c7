// AVX2 with FMA and F16C: a block is two registers. Products of bytes go through 16 bits, which
// levels never overflow.
#include <immintrin.h>

#include "kernels.hpp"

namespace specache {
namespace {

struct Isa {
    static constexpr const char* name = "avx2";
    static constexpr int sums = 4, kProductSums = 4;
    static constexpr int kQueriesPerPass = 4;
    static constexpr bool matrix = false;
    static constexpr bool by_tile = true;

    struct Bytes { __m256i a, b; };
    struct Ints { __m256i a, b; };
    struct Floats { __m256 a, b; };

    static Bytes load_bytes(const uint8_t* p) {
        auto q = reinterpret_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
    }
    static Bytes load_table(const uint8_t* p) {
        __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {x, x};
    }
    static Bytes low_nibbles(Bytes x) {
        __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
    }
    static Bytes high_nibbles(Bytes x) {
        return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
    }
    static Bytes lookup(Bytes table, Bytes index) {
        return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
    }

    static Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static __m256i dot(__m256i acc, __m256i u, __m256i s) {
        __m256i pairs = _mm256_maddubs_epi16(u, s);
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    // Signed weights as sizes and signs: pairs of products of -127 to 127 fit into 16 bits, those
    // of 0 to 255 would saturate.
    static constexpr int32_t weight_offset = 0;
    struct Weights { Bytes size, sign; };
    static Weights weights(Bytes x) { return {{_mm256_abs_epi8(x.a), _mm256_abs_epi8(x.b)}, x}; }
    static Ints dot_weights(Ints acc, const Weights& w, int32_t four) {
        __m256i s = _mm256_set1_epi32(four);
        return {dot(acc.a, w.size.a, _mm256_sign_epi8(s, w.sign.a)), dot(acc.b, w.size.b, _mm256_sign_epi8(s, w.sign.b))};
    }
    static Ints dot_us(Ints acc, Bytes u, int32_t four) {
        __m256i s = _mm256_set1_epi32(four);
        return {dot(acc.a, u.a, s), dot(acc.b, u.b, s)};
    }
    static Ints dot_su(Ints acc, int32_t four, Bytes s) {
        __m256i u = _mm256_set1_epi32(four);
        return {dot(acc.a, u, s.a), dot(acc.b, u, s.b)};
    }

    // Have sums added up in the order written: GCC balances them otherwise, and runs out of registers.
    static void keep(__m256i& sum) { asm("" : "+x"(sum)); }
    static __m256i lower_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    // Products of the `count` blocks of one tile with NQ rows of bytes: acc [NQ]. One register of a
    // block after the other, so that sums stay in registers. The products of `planes` planes are added
    // up in 16 bits, each of two levels at most: at 2 bits 4 x 2 x 20 x 127 or 4 x 2 x 10 x 255, at 1
    // bit 8 x 2 x 2 x 127 or 8 x 2 x 255.
    template <int BITS, int NQ, bool KEYS>
    static void tile_dots(const uint8_t* blocks, int count, const uint8_t* rows, int row_stride, const Bytes* tables,
                          const uint8_t* ahead, Ints* acc) {
        constexpr int P = 8 / BITS, per_nibble = 4 / BITS, planes = BITS == 1 ? 8 : BITS == 2 ? 4 : 1;
        const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i sums[NQ];
            for (__m256i& x : sums) x = _mm256_setzero_si256();
            for (int c = 0; c < count; c++) {
                const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks + 64 * c + 32 * half));
                if (!half) __builtin_prefetch(ahead + 64 * c, 0, 2);
                const __m256i low = lower_nibbles(x), high = lower_nibbles(_mm256_srli_epi16(x, 4));
                __m256i pairs[NQ];
#pragma GCC unroll 8
                for (int m = 0; m < P; m++) {
                    const __m256i levels = _mm256_shuffle_epi8(tables[m % per_nibble].a, m < per_nibble ? low : high);
#pragma GCC unroll 4
                    for (int j = 0; j < NQ; j++) {
                        int32_t bytes;
                        __builtin_memcpy(&bytes, rows + j * row_stride + 4 * (P * c + m), 4);
                        const __m256i four = _mm256_set1_epi32(bytes);
                        const __m256i products = KEYS ? _mm256_maddubs_epi16(levels, four) : _mm256_maddubs_epi16(four, levels);
                        pairs[j] = m % planes ? _mm256_add_epi16(pairs[j], products) : products;
                        keep(pairs[j]);
                        if (m % planes == planes - 1) sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs[j], ones));
                    }
                }
            }
#pragma GCC unroll 4
            for (int j = 0; j < NQ; j++) (half ? acc[j].b : acc[j].a) = sums[j];
        }
    }

    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, Floats x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static Floats load_half(const uint16_t* p) {
        auto q = reinterpret_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
    }
    static __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
    static Floats load_bf16(const uint16_t* p) {
        auto q = reinterpret_cast<const __m128i*>(p);
        return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
    }
    static __m256i rounded_bf16(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    }
    static void store_bf16(uint16_t* p, Floats x) {
        const __m256i pairs = _mm256_packus_epi32(rounded_bf16(x.a), rounded_bf16(x.b));  // in the order 0, 2, 1, 3 of four elements each
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xD8));
    }
    static void load_bf16_pairs(const uint16_t* p, Floats& even, Floats& odd) {
        auto q = reinterpret_cast<const __m256i*>(p);
        const __m256i x = _mm256_loadu_si256(q), y = _mm256_loadu_si256(q + 1), high = _mm256_set1_epi32(int(0xFFFF0000));
        even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
        odd = {_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high))};
    }
    static Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static Floats fma(Floats x, Floats y, Floats z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static __m256 exp(__m256 a) {
        __m256 x = _mm256_max_ps(a, _mm256_set1_ps(-88.0f));
        __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)));
        __m256 whole = _mm256_cvtepi32_ps(n);
        __m256 r = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), x);
        r = _mm256_fmadd_ps(whole, _mm256_set1_ps(2.12194440e-4f), r);
        __m256 p = _mm256_set1_ps(1.9875691500e-4f);
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
        p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
        __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(p, _mm256_castsi256_ps(scale));
    }
    static Floats exp(Floats x) { return {exp(x.a), exp(x.b)}; }
    static void sum_four(const Floats* x, float* out) {
        for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
    }
    static float sum(Floats x) {
        __m256 y = _mm256_add_ps(x.a, x.b);
        __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
        z = _mm_add_ps(z, _mm_movehl_ps(z, z));
        return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
    }
    static float largest(Floats x) {
        __m256 y = _mm256_max_ps(x.a, x.b);
        __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
        z = _mm_max_ps(z, _mm_movehl_ps(z, z));
        return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
    }
    static float first(Floats x) { return _mm256_cvtss_f32(x.a); }
    static Ints count_not_less(Ints count, Floats x, Floats y) {
        return {_mm256_sub_epi32(count.a, _mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))),
                _mm256_sub_epi32(count.b, _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)))};
    }
    static uint32_t not_less(Floats x, Floats y) {
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
               uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
    }
    static void store_rounded(uint8_t* p, Floats x) {
        __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
        words = _mm256_permute4x64_epi64(words, 0xD8);
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& avx2_kernels() { return kTable; }
}  // namespace specache
