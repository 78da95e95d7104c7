// Python bindings of steps in place, called by specache/kernels/cpu/in_place.py, which checks dtypes,
// shapes and strides.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings.hpp"
#include "step_arguments.hpp"

namespace nb = nanobind;

namespace specache {
namespace {

StepArguments arguments_of(const std::string& isa, int threads, uintptr_t query, int query_dtype, int groups, int n, const std::vector<int64_t>& strides,
                           uintptr_t keys, uintptr_t values, int dtype, bool commits, const TopKNumbers& top_k, float scaling, float softcap, uintptr_t sinks,
                           int sink_dtype, uintptr_t out) {
    if (strides.size() != 12) throw std::invalid_argument("strides");
    return {isa, threads, query, query_dtype, groups, n, strides, keys, values, dtype, commits, top_k_of(top_k), scaling, softcap, sinks, sink_dtype, out};
}

// counts: low-bit tokens and residual tokens per sequence. Return `decode_in_place`'s result.
int64_t py_decode_in_place(const StepArguments& arguments, const std::vector<const OwnedStoredLayer*>& layers, const std::vector<int64_t>& counts) {
    if (layers.empty() || counts.size() != 2 * layers.size()) throw std::invalid_argument("sequences");
    const Layout& layout = layout_of(layers.data(), layers.size());
    std::vector<StoredSequence> sequences;
    for (size_t b = 0; b < layers.size(); b++) sequences.push_back({&layers[b]->stored, counts[2 * b], counts[2 * b + 1]});
    const std::vector<float> sinks = arguments.sink_logits(layout);
    const Engine engine = engine_of(arguments.isa, arguments.threads);
    nb::gil_scoped_release released;
    return decode_in_place(engine, arguments.step(layout), sequences, arguments.tokens(), arguments.commits, arguments.top_k, sinks.empty() ? nullptr : sinks.data());
}

// counts: low-bit, residual and pending tokens, and whether the committed token is stored already, per
// sequence. on_disk: one per sequence, or none. next: 0 or [B, Hkv, k]. Return `decode_fetched`'s
// result, and selected, ready and fetched rows and the seconds of copying, per sequence.
using FetchedCounts = std::vector<std::tuple<int64_t, int64_t, int64_t, double>>;
std::tuple<int64_t, FetchedCounts> py_decode_fetched(const StepArguments& arguments, const std::vector<const OwnedStoredLayer*>& layers,
                                                     const std::vector<int64_t>& counts, const std::vector<HotSet*>& hot,
                                                     const std::vector<DiskRows*>& on_disk, int real, uintptr_t next) {
    if (layers.empty() || counts.size() != 4 * layers.size() || hot.size() != layers.size() || (!on_disk.empty() && on_disk.size() != layers.size()))
        throw std::invalid_argument("sequences");
    const Layout& layout = layout_of(layers.data(), layers.size());
    const std::vector<StoredSequence> sequences = sequences_of(layers.data(), counts.data(), hot.data(), on_disk.empty() ? nullptr : on_disk.data(), layers.size());
    const std::vector<float> sinks = arguments.sink_logits(layout);
    const Engine engine = engine_of(arguments.isa, arguments.threads);
    std::vector<FetchCounts> fetched;
    int64_t result;
    {
        nb::gil_scoped_release released;
        result = decode_fetched(engine, arguments.step(layout), sequences, arguments.tokens(), arguments.commits, arguments.top_k,
                                sinks.empty() ? nullptr : sinks.data(), real, at<int64_t>(next), fetched);
    }
    FetchedCounts sums;
    for (const FetchCounts& one : fetched) sums.emplace_back(one.selected, one.ready, one.fetched, one.seconds);
    return {result, sums};
}

}  // namespace

void bind_in_place(nb::module_& m) {
    nb::class_<OwnedStoredLayer>(m, "StoredLayer")
        .def(nb::init<>())
        .def("set_pages", &OwnedStoredLayer::set_pages, nb::keep_alive<1, 2>())
        .def("set_residual", &OwnedStoredLayer::set_residual)
        .def("set_rows", &OwnedStoredLayer::set_rows);
    nb::class_<StepArguments>(m, "StepArguments").def("__init__", [](StepArguments* made, const std::string& isa, int threads, uintptr_t query,
        int query_dtype, int groups, int n, const std::vector<int64_t>& strides, uintptr_t keys, uintptr_t values, int dtype, bool commits, const TopKNumbers& top_k,
        float scaling, float softcap, uintptr_t sinks, int sink_dtype, uintptr_t out) {
        new (made) StepArguments(arguments_of(isa, threads, query, query_dtype, groups, n, strides, keys, values, dtype, commits, top_k, scaling, softcap,
                                              sinks, sink_dtype, out));
    });
    m.def("decode_in_place", &py_decode_in_place);
    m.def("decode_fetched", &py_decode_fetched);
}

}  // namespace specache
