// A decoder layer's operations apart from its attention, as they were recorded from the model's own
// code (specache/engine/traced): products, elementwise operations, means, norms.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.hpp"

namespace specache {

constexpr int kDims = 5;

// A tensor in one of the buffers of a program, or, with a negative buffer, none.
struct Operand {
    int buffer = -1;
    Dtype dtype = Dtype::f32;
    int64_t offset = 0;            // bytes
    int64_t strides[kDims] = {};   // bytes
};

struct Operation {
    enum class Kind { elementwise, mean, layer_norm, plain_product, packed_product };
    Kind kind;
    ElementOp op;  // of kind `elementwise`
    int dims = 0;
    int64_t sizes[kDims] = {};  // the last one is a row's; of products: rows, inputs, outputs
    Operand out;
    // elementwise: a and b (if it is a tensor); norm: x, weight, bias; plain product: x, weight, bias;
    // packed product: x, codes, scales, zeros, bias
    std::vector<Operand> inputs;
    float number = 0.0f;  // elementwise: b if it is a number; norm: epsilon

    bool is_product() const { return kind == Kind::plain_product || kind == Kind::packed_product; }
};

class LayerProgram {
public:
    explicit LayerProgram(const Kernels* kernels) : kernels_(kernels) {}
    void add(Operation);
    int64_t size() const { return int64_t(operations_.size()); }
    // Run operations [start, stop). bases: the address of every buffer.
    void run(int threads, int64_t start, int64_t stop, const std::vector<uintptr_t>& bases) const;

private:
    const Kernels* kernels_;
    std::vector<Operation> operations_;
    int buffers_ = 0;
};

}  // namespace specache
