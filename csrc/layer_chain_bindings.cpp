// Python bindings of `LayerChain`, called by specache/engine/traced/layer_chain.py, which checks what
// tensors are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "layer_chain.hpp"

namespace nb = nanobind;

namespace specache {
namespace {

using ViewNumbers = std::tuple<int, int64_t, std::vector<int64_t>>;  // buffer, offset in bytes, strides in elements
using Counts = std::vector<std::tuple<int64_t, int64_t, int64_t, double>>;

MadeView view_of(const ViewNumbers& numbers) {
    const auto& [buffer, offset, strides] = numbers;
    MadeView view{buffer, offset, {}};
    if (strides.size() != 4) throw std::invalid_argument("strides");
    std::copy(strides.begin(), strides.end(), view.strides);
    return view;
}

// attention: dtype of queries and that of keys, groups, n, scaling, softcap, address and dtype of sinks
using AttentionNumbers = std::tuple<int, int, int, int, float, float, uintptr_t, int>;

void add(LayerChain& chain, const LayerProgram& program, int64_t middle, int64_t scratch_bytes, const std::vector<int64_t>& made_bytes, int result,
         const std::vector<ViewNumbers>& views, int64_t attended_bytes, const std::vector<uintptr_t>& weights, const AttentionNumbers& attention) {
    if (views.size() != 3) throw std::invalid_argument("views");
    ChainLayer layer{&program, middle, scratch_bytes, made_bytes, result, view_of(views[0]), view_of(views[1]), view_of(views[2]), attended_bytes,
                     weights, {}};
    StepArguments& of = layer.attention;
    std::tie(of.query_dtype, of.dtype, of.groups, of.n, of.scaling, of.softcap, of.sinks, of.sink_dtype) = attention;
    for (const MadeView* view : {&layer.query, &layer.keys, &layer.values}) of.strides.insert(of.strides.end(), view->strides, view->strides + 4);
    chain.add(std::move(layer));
}

std::tuple<int64_t, int64_t, Counts, double> run(const LayerChain& chain, const std::string& isa, int threads, uintptr_t hidden,
                                                 const std::vector<uintptr_t>& inputs, uintptr_t results, int64_t result_bytes,
                                                 const std::vector<const OwnedStoredLayer*>& layers, const std::vector<int64_t>& counts,
                                                 const std::vector<HotSet*>& hot, const std::vector<DiskRows*>& on_disk,
                                                 const std::vector<uintptr_t>& next, bool commits, const TopKNumbers& top_k, int real) {
    const Engine engine = engine_of(isa, threads);
    ChainResult result;
    {
        nb::gil_scoped_release released;
        result = chain.run(engine, hidden, inputs, results, result_bytes, {layers, counts, hot, on_disk, next, commits, top_k_of(top_k), real});
    }
    Counts sums;
    for (const FetchCounts& one : result.counts) sums.emplace_back(one.selected, one.ready, one.fetched, one.seconds);
    return {result.layers, result.code, sums, result.attention_s};
}

}  // namespace

void bind_layer_chain(nb::module_& m) {
    nb::class_<LayerChain>(m, "LayerChain")
        .def(nb::init<>())
        .def("add", &add, nb::keep_alive<1, 2>())
        .def("__len__", &LayerChain::size)
        .def("run", &run);
}

}  // namespace specache
