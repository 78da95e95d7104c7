// NEON of every 64-bit Arm: a block is four registers.
#include <arm_neon.h>

#include "kernels.hpp"

namespace specache {
namespace {

struct Isa {
    static constexpr const char* name = "neon";
    static constexpr int sums = 4, kProductSums = 4;
    static constexpr int kQueriesPerPass = 4;
    static constexpr bool matrix = false;
    static constexpr bool by_tile = false;

    struct Bytes { uint8x16_t v[4]; };
    struct Ints { int32x4_t v[4]; };
    struct Floats { float32x4_t v[4]; };

    static Bytes load_bytes(const uint8_t* p) {
        return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    }
    static Bytes load_table(const uint8_t* p) {
        uint8x16_t x = vld1q_u8(p);
        return {{x, x, x, x}};
    }
    static Bytes low_nibbles(Bytes x) {
        for (auto& v : x.v) v = vandq_u8(v, vdupq_n_u8(15));
        return x;
    }
    static Bytes high_nibbles(Bytes x) {
        for (auto& v : x.v) v = vshrq_n_u8(v, 4);
        return x;
    }
    static Bytes lookup(Bytes table, Bytes index) {
        for (int i = 0; i < 4; i++) index.v[i] = vqtbl1q_u8(table.v[i], index.v[i]);
        return index;
    }

    static Ints zero() {
        int32x4_t x = vdupq_n_s32(0);
        return {{x, x, x, x}};
    }
    static int32x4_t dot(int32x4_t acc, uint8x16_t u, int8x16_t s) {
        int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), vmovl_s8(vget_low_s8(s)));
        int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u))), vmovl_s8(vget_high_s8(s)));
        return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
    static Ints splat_int(int32_t x) {
        int32x4_t y = vdupq_n_s32(x);
        return {{y, y, y, y}};
    }
    static constexpr int32_t weight_offset = 0;
    using Weights = Bytes;
    static Weights weights(Bytes x) { return x; }
    static Ints dot_weights(Ints acc, Weights w, int32_t four) {
        int8x16_t s = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; i++) {
            int8x16_t x = vreinterpretq_s8_u8(w.v[i]);
            int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(s)), high = vmull_s8(vget_high_s8(x), vget_high_s8(s));
            acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
        }
        return acc;
    }
    static Ints dot_us(Ints acc, Bytes u, int32_t four) {
        int8x16_t s = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; i++) acc.v[i] = dot(acc.v[i], u.v[i], s);
        return acc;
    }
    static Ints dot_su(Ints acc, int32_t four, Bytes s) {
        uint8x16_t u = vreinterpretq_u8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; i++) acc.v[i] = dot(acc.v[i], u, vreinterpretq_s8_u8(s.v[i]));
        return acc;
    }

    static Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    static void store(float* p, Floats x) {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
    }
    static Floats load_half(const uint16_t* p) {
        Floats x;
        for (int i = 0; i < 4; i++) x.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
        return x;
    }
    static Floats load_bf16(const uint16_t* p) {
        Floats x;
        for (int i = 0; i < 4; i++) x.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
        return x;
    }
    static void store_bf16(uint16_t* p, Floats x) {
        for (int i = 0; i < 4; i++) {
            const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
            vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(vceqq_f32(x.v[i], x.v[i]), rounded, vdupq_n_u32(0x7FC0))));
        }
    }
    static void load_bf16_pairs(const uint16_t* p, Floats& even, Floats& odd) {
        for (int i = 0; i < 4; i++) {
            const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
            even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
            odd.v[i] = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xFFFF0000)));
        }
    }
    static Floats splat(float x) {
        float32x4_t y = vdupq_n_f32(x);
        return {{y, y, y, y}};
    }
    static Floats to_float(Ints x) {
        Floats y;
        for (int i = 0; i < 4; i++) y.v[i] = vcvtq_f32_s32(x.v[i]);
        return y;
    }
#define SPECACHE_LANES(name, intrinsic)                                             \
    static Floats name(Floats a, Floats b) {                                        \
        for (int i = 0; i < 4; i++) a.v[i] = intrinsic(a.v[i], b.v[i]);             \
        return a;                                                                   \
    }
    SPECACHE_LANES(add, vaddq_f32)
    SPECACHE_LANES(sub, vsubq_f32)
    SPECACHE_LANES(mul, vmulq_f32)
    SPECACHE_LANES(div, vdivq_f32)
    SPECACHE_LANES(max, vmaxq_f32)
    SPECACHE_LANES(min, vminq_f32)
#undef SPECACHE_LANES
    static Floats fma(Floats a, Floats b, Floats c) {
        for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
        return c;
    }
    static float32x4_t exp(float32x4_t a) {
        float32x4_t x = vmaxq_f32(a, vdupq_n_f32(-88.0f));
        int32x4_t n = vcvtnq_s32_f32(vmulq_n_f32(x, 1.44269504f));
        float32x4_t whole = vcvtq_f32_s32(n);
        float32x4_t r = vfmsq_f32(x, whole, vdupq_n_f32(0.693359375f));
        r = vfmaq_f32(r, whole, vdupq_n_f32(2.12194440e-4f));
        float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
        p = vfmaq_f32(vdupq_n_f32(1.3981999507e-3f), p, r);
        p = vfmaq_f32(vdupq_n_f32(8.3334519073e-3f), p, r);
        p = vfmaq_f32(vdupq_n_f32(4.1665795894e-2f), p, r);
        p = vfmaq_f32(vdupq_n_f32(1.6666665459e-1f), p, r);
        p = vfmaq_f32(vdupq_n_f32(5.0000001201e-1f), p, r);
        p = vfmaq_f32(vaddq_f32(r, vdupq_n_f32(1.0f)), p, vmulq_f32(r, r));
        return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)));
    }
    static Floats exp(Floats x) {
        for (auto& v : x.v) v = exp(v);
        return x;
    }
    static void sum_four(const Floats* x, float* out) {
        for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
    }
    static float sum(Floats x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
    static float largest(Floats x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
    static float first(Floats x) { return vgetq_lane_f32(x.v[0], 0); }
    static Ints count_not_less(Ints count, Floats a, Floats b) {
        for (int i = 0; i < 4; i++) count.v[i] = vsubq_s32(count.v[i], vreinterpretq_s32_u32(vcgeq_f32(a.v[i], b.v[i])));
        return count;
    }
    static uint32_t not_less(Floats a, Floats b) {
        const uint32x4_t bit = {1, 2, 4, 8};
        uint32_t mask = 0;
        for (int i = 0; i < 4; i++) mask |= vaddvq_u32(vandq_u32(vcgeq_f32(a.v[i], b.v[i]), bit)) << (4 * i);
        return mask;
    }
    static void store_rounded(uint8_t* p, Floats x) {
        uint16x4_t w[4];
        for (int i = 0; i < 4; i++) w[i] = vqmovn_u32(vcvtnq_u32_f32(x.v[i]));
        vst1q_u8(p, vcombine_u8(vqmovn_u16(vcombine_u16(w[0], w[1])), vqmovn_u16(vcombine_u16(w[2], w[3]))));
    }
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& neon_kernels() { return kTable; }
}  // namespace specache
