// What the kernels share and no instruction set changes.
#include <cmath>

#include "kernels.hpp"

namespace specache {

float scalar_tanh(float x) { return std::tanh(x); }

ScalarFunction scalar_function(ElementOp op) {
    switch (op) {
        case ElementOp::root: return [](float x) { return std::sqrt(x); };
        case ElementOp::reciprocal_root: return [](float x) { return 1.0f / std::sqrt(x); };
        case ElementOp::exponential: return [](float x) { return std::exp(x); };
        case ElementOp::sigmoid: return [](float x) { return 1.0f / (1.0f + std::exp(-x)); };
        case ElementOp::tanh: return scalar_tanh;
        default: return [](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); };
    }
}

const Levels& normal_levels(int bits) {
    static const Levels one = {{-1, 1}, 0.7979f, 1};
    static const Levels two = {{-10, -3, 3, 10}, 0.151f, 10};
    static const Levels four = {{-63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63}, 2.733f / 63, 63};
    return bits == 1 ? one : bits == 2 ? two : four;
}

}  // namespace specache
