// Elementwise operations and norms of rows in a model's dtypes, computed in float32 and rounded once.
// A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

inline Floats load_strided(const Elements& x, int64_t first, int count) {
    const int64_t size = itemsize(x.dtype);
    if (x.stride == size) return load_elements(x.data + first * size, x.dtype, count);
    if (x.stride == 0) return Isa::splat(scalar_of(x.data, x.dtype));
    alignas(64) float values[kTile];
    for (int i = 0; i < kTile; i++) values[i] = i < count ? scalar_of(x.data + (first + i) * x.stride, x.dtype) : 0.0f;
    return Isa::load(values);
}

inline void store_strided(const Written& out, int64_t first, int count, Floats x) {
    const int64_t size = itemsize(out.dtype);
    if (out.stride == size) return store_outputs(out.data + first * size, out.dtype, x, nullptr, count);
    alignas(64) uint8_t packed[kTile * sizeof(float)];
    store_outputs(packed, out.dtype, x, nullptr, kTile);
    for (int i = 0; i < count; i++) std::memcpy(out.data + (first + i) * out.stride, packed + i * size, size_t(size));
}

// x / (1 + exp(-y)); NaN and infinity of x stay.
inline Floats gated(Floats x, Floats y) {
    const Floats bounded = Isa::min(Isa::splat(88.0f), Isa::sub(Isa::splat(0.0f), y));
    return Isa::div(x, Isa::add(Isa::splat(1.0f), Isa::exp(bounded)));
}

inline Floats one_by_one(Floats x, float (*function)(float)) {
    alignas(64) float values[kTile];
    Isa::store(values, x);
    for (int i = 0; i < kTile; i++) values[i] = function(values[i]);
    return Isa::load(values);
}

inline Floats applied(ElementOp op, Floats a, Floats b) {
    switch (op) {
        case ElementOp::negate: return Isa::sub(Isa::splat(-0.0f), a);
        case ElementOp::square: return Isa::mul(a, a);
        case ElementOp::silu: return gated(a, a);
        case ElementOp::gelu_tanh: {
            const Floats cube = Isa::mul(Isa::mul(a, a), a);
            const Floats inner = Isa::mul(Isa::splat(0.7978845608f), Isa::add(a, Isa::mul(Isa::splat(0.044715f), cube)));
            return gated(a, Isa::add(inner, inner));
        }
        case ElementOp::relu: return Isa::max(Isa::splat(0.0f), a);  // in this order NaN stays
        case ElementOp::at_least: return Isa::max(b, a);
        case ElementOp::at_most: return Isa::min(b, a);
        case ElementOp::reciprocal_root:
        case ElementOp::root:
        case ElementOp::exponential:
        case ElementOp::sigmoid:
        case ElementOp::tanh:
        case ElementOp::gelu: return one_by_one(a, scalar_function(op));
        case ElementOp::add: return Isa::add(a, b);
        case ElementOp::subtract: return Isa::sub(a, b);
        case ElementOp::multiply: return Isa::mul(a, b);
        case ElementOp::divide: return Isa::div(a, b);
        case ElementOp::copy: break;
    }
    return a;
}

void elementwise(ElementOp op, int64_t count, const Elements& a, const Elements& b, const Written& out) {
    for (int64_t i = 0; i < count; i += kTile) {
        const int here = min_of(kTile, count - i);
        store_strided(out, i, here, applied(op, load_strided(a, i, here), load_strided(b, i, here)));
    }
}

float mean_of(int64_t count, const Elements& x) {
    Floats sum = Isa::splat(0.0f);
    for (int64_t i = 0; i < count; i += kTile) sum = Isa::add(sum, load_strided(x, i, min_of(kTile, count - i)));
    return Isa::sum(sum) / float(count);
}

void layer_norm(int64_t count, const Elements& x, const Elements& weight, const Elements& bias, float epsilon, const Written& out) {
    const float mean = mean_of(count, x);
    float squares = 0.0f;
    for (int64_t i = 0; i < count; i += kTile) {
        const int here = min_of(kTile, count - i);
        alignas(64) float off[kTile];
        Isa::store(off, Isa::sub(load_strided(x, i, here), Isa::splat(mean)));
        for (int j = 0; j < here; j++) squares += off[j] * off[j];
    }
    const Floats scale = Isa::splat(1.0f / root(squares / float(count) + epsilon));
    for (int64_t i = 0; i < count; i += kTile) {
        const int here = min_of(kTile, count - i);
        Floats y = Isa::mul(Isa::sub(load_strided(x, i, here), Isa::splat(mean)), scale);
        if (weight.data) y = Isa::mul(y, load_strided(weight, i, here));
        if (bias.data) y = Isa::add(y, load_strided(bias, i, here));
        store_strided(out, i, here, y);
    }
}

}  // namespace
}  // namespace specache
