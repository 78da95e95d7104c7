#include "layer_program.hpp"

#include <stdexcept>
#include <utility>

#include "product.hpp"

namespace specache {
namespace {

using Bases = std::vector<uintptr_t>;

uint8_t* address(const Bases& bases, const Operand& operand) {
    return operand.buffer < 0 ? nullptr : reinterpret_cast<uint8_t*>(bases[size_t(operand.buffer)]) + operand.offset;
}

Elements elements(const Bases& bases, const Operand& operand, int64_t offset, int row) {
    if (operand.buffer < 0) return {};
    return {address(bases, operand) + offset, operand.dtype, operand.strides[row]};
}

int64_t offset_of(const Operand& operand, const int64_t* index, int outer) {
    int64_t offset = 0;
    for (int d = 0; d < outer; d++) offset += index[d] * operand.strides[d];
    return offset;
}

// Call body(index) for every row: all dimensions but the last.
template <class Body>
void each_row(const Operation& operation, const Body& body) {
    const int outer = operation.dims - 1;
    int64_t index[kDims] = {};
    for (;;) {
        body(index);
        int d = outer - 1;
        while (d >= 0 && ++index[d] == operation.sizes[d]) index[d--] = 0;
        if (d < 0) return;
    }
}

void run_elementwise(const Kernels& kernels, const Operation& operation, const Bases& bases) {
    const int row = operation.dims - 1;
    const Operand &a = operation.inputs[0], &out = operation.out;
    const Operand* b = operation.inputs.size() > 1 ? &operation.inputs[1] : nullptr;
    const Elements number{reinterpret_cast<const uint8_t*>(&operation.number), Dtype::f32, 0};
    each_row(operation, [&](const int64_t* index) {
        const Elements second = b ? elements(bases, *b, offset_of(*b, index, row), row) : number;
        const Elements first = a.buffer < 0 ? number : elements(bases, a, offset_of(a, index, row), row);
        kernels.elementwise(operation.op, operation.sizes[row], first, second,
                            {address(bases, out) + offset_of(out, index, row), out.dtype, out.strides[row]});
    });
}

void run_mean(const Kernels& kernels, const Operation& operation, const Bases& bases) {
    const int row = operation.dims - 1;
    const Operand &x = operation.inputs[0], &out = operation.out;
    each_row(operation, [&](const int64_t* index) {
        const float mean = kernels.mean_of(operation.sizes[row], elements(bases, x, offset_of(x, index, row), row));
        kernels.elementwise(ElementOp::copy, 1, {reinterpret_cast<const uint8_t*>(&mean), Dtype::f32, 0}, {reinterpret_cast<const uint8_t*>(&mean), Dtype::f32, 0},
                            {address(bases, out) + offset_of(out, index, row), out.dtype, 0});
    });
}

void run_layer_norm(const Kernels& kernels, const Operation& operation, const Bases& bases) {
    const int row = operation.dims - 1;
    const Operand &x = operation.inputs[0], &weight = operation.inputs[1], &bias = operation.inputs[2], &out = operation.out;
    each_row(operation, [&](const int64_t* index) {
        kernels.layer_norm(operation.sizes[row], elements(bases, x, offset_of(x, index, row), row), elements(bases, weight, 0, row),
                           elements(bases, bias, 0, row), operation.number,
                           {address(bases, out) + offset_of(out, index, row), out.dtype, out.strides[row]});
    });
}

// Run an operation on rows: any but a product.
void run_rows(const Kernels& kernels, const Operation& operation, const Bases& bases) {
    switch (operation.kind) {
        case Operation::Kind::elementwise: return run_elementwise(kernels, operation, bases);
        case Operation::Kind::mean: return run_mean(kernels, operation, bases);
        default: return run_layer_norm(kernels, operation, bases);
    }
}

void run_product(Worker& worker, const Engine& engine, const Operation& operation, const Bases& bases) {
    const std::vector<Operand>& in = operation.inputs;
    const bool packed = operation.kind == Operation::Kind::packed_product;
    const LinearRows rows{address(bases, in[0]), in[0].dtype,  operation.sizes[0], operation.sizes[1],
                          operation.sizes[2],    address(bases, in.back()), address(bases, operation.out)};
    if (packed)
        packed_linear(worker, engine, rows, address(bases, in[1]), reinterpret_cast<const uint16_t*>(address(bases, in[2])),
                      reinterpret_cast<const uint16_t*>(address(bases, in[3])));
    else
        plain_linear(worker, engine, rows, address(bases, in[1]), in[1].dtype, in[1].strides[0]);
}

}  // namespace

void LayerProgram::add(Operation operation) {
    static constexpr size_t most[] = {2, 1, 3, 3, 5};
    const size_t inputs = operation.inputs.size(), wanted = most[int(operation.kind)];
    if (operation.out.buffer < 0 || operation.dims < 1 || inputs > wanted || inputs < (operation.kind == Operation::Kind::elementwise ? 1 : wanted))
        throw std::invalid_argument("operation");
    if (operation.is_product() && (operation.dims != 3 || operation.sizes[0] > kProductRows ||
                    (operation.kind == Operation::Kind::packed_product && operation.sizes[1] % kProductBlock)))
        throw std::invalid_argument("product");
    for (const Operand& operand : operation.inputs) buffers_ = operand.buffer >= buffers_ ? operand.buffer + 1 : buffers_;
    buffers_ = operation.out.buffer >= buffers_ ? operation.out.buffer + 1 : buffers_;
    operations_.push_back(std::move(operation));
}

void LayerProgram::run(int threads, int64_t start, int64_t stop, const Bases& bases) const {
    if (start < 0 || stop > size() || int(bases.size()) < buffers_) throw std::invalid_argument("run");
    const Engine engine{kernels_, threads};
    parallel(threads, [&](Worker& worker) {
        for (int64_t i = start; i < stop;) {
            if (operations_[size_t(i)].is_product()) {
                run_product(worker, engine, operations_[size_t(i++)], bases);
                continue;
            }
            int64_t end = i;
            while (end < stop && !operations_[size_t(end)].is_product()) end++;
            worker.each(1, [&](int64_t) {  // these are short: one thread runs them
                for (int64_t o = i; o < end; o++) run_rows(*kernels_, operations_[size_t(o)], bases);
            });
            i = end;
        }
    });
}

}  // namespace specache
