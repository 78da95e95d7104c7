// Python bindings of `LayerProgram`. specache/engine/traced checks what tensors are before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "layer_program.hpp"

namespace nb = nanobind;

namespace specache {
namespace {

using OperandNumbers = std::tuple<int, int, int64_t, std::vector<int64_t>>;  // buffer, dtype, offset, strides

Operand operand_of(const OperandNumbers& numbers, size_t dims) {
    const auto& [buffer, dtype, offset, strides] = numbers;
    Operand operand{buffer, Dtype(dtype), offset, {}};
    if (buffer >= 0 && strides.size() != dims) throw std::invalid_argument("strides");
    std::copy(strides.begin(), strides.end(), operand.strides);
    return operand;
}

void add(LayerProgram& program, int kind, int op, const std::vector<int64_t>& sizes, const OperandNumbers& out,
         const std::vector<OperandNumbers>& inputs, float number) {
    if (sizes.empty() || sizes.size() > size_t(kDims)) throw std::invalid_argument("sizes");
    Operation operation{Operation::Kind(kind), ElementOp(op), int(sizes.size()), {}, operand_of(out, sizes.size()), {}, number};
    std::copy(sizes.begin(), sizes.end(), operation.sizes);
    for (const OperandNumbers& input : inputs) operation.inputs.push_back(operand_of(input, sizes.size()));
    program.add(std::move(operation));
}

}  // namespace

void bind_layer_program(nb::module_& m) {
    nb::class_<LayerProgram>(m, "LayerProgram")
        .def("__init__", [](LayerProgram* made, const std::string& isa) { new (made) LayerProgram(engine_of(isa, 1).kernels); })
        .def("add", &add)
        .def("__len__", &LayerProgram::size)
        .def("run", [](const LayerProgram& program, int threads, int64_t start, int64_t stop, const std::vector<uintptr_t>& bases) {
            nb::gil_scoped_release released;
            program.run(threads, start, stop, bases);
        });
}

}  // namespace specache
