// Python bindings of steps in place, called by specache/kernels/cpu/in_place.py, which checks dtypes,
// shapes and strides.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings.hpp"
#include "elements.hpp"
#include "fetched_step.hpp"

namespace nb = nanobind;

namespace specache {
namespace {

struct OwnedStoredLayer {
    StoredLayer stored;

    // `layout` must outlive it.
    void set_pages(const OwnedLayout& layout, Addresses addresses, uintptr_t weights) {
        stored.layout = &layout.layout;
        stored.pages = pages_of(addresses);
        stored.weights = at<const float>(weights);
    }
    void set_residual(uintptr_t keys, uintptr_t values, int64_t head, int64_t token, int64_t capacity) {
        stored.keys = at<uint8_t>(keys), stored.values = at<uint8_t>(values);
        stored.residual_head = head, stored.residual_token = token, stored.residual_capacity = capacity;
    }
    // blocks: their addresses; capacity: the tokens of all of them.
    void set_rows(Addresses blocks, int shift, int64_t head, int64_t token, int64_t capacity) {
        stored.row_blocks = pages_of(blocks);
        stored.rows = {stored.row_blocks.data(), shift, head, token};
        stored.row_capacity = capacity;
    }
};

// The layout of the first sequence with pages: that of another has no offsets.
const Layout& layout_of(const std::vector<const OwnedStoredLayer*>& layers) {
    for (const OwnedStoredLayer* layer : layers)
        if (!layer->stored.pages.empty()) return *layer->stored.layout;
    return *layers.at(0)->stored.layout;
}

// What Python passes of a step. strides: in elements, four of queries, of keys and of values, whose
// last is 1. out [B, n, Hq, D] is contiguous, in the queries' dtype.
struct StepArguments {
    std::string isa;
    int threads;
    uintptr_t query;
    int query_dtype, groups, n;
    std::vector<int64_t> strides;
    uintptr_t keys, values;
    int dtype;
    bool commits;
    int64_t k;
    float scaling, softcap;
    uintptr_t sinks;
    int sink_dtype;
    uintptr_t out;

    Step step(const Layout& layout) const {
        const Dtype asked = Dtype(query_dtype);
        const int64_t size = itemsize(asked), width = layout.dim * size, query_heads = int64_t(layout.heads) * groups;
        Step step{&layout, {}, {at<const uint8_t>(query), asked, strides[0] * size, strides[1] * size, strides[2] * size}, groups, n, scaling, softcap};
        step.output = {at<uint8_t>(out), asked, n * query_heads * width, width, query_heads * width};
        return step;
    }
    StepTokens tokens() const {
        const int64_t size = itemsize(Dtype(dtype)), *s = strides.data();
        return {at<const uint8_t>(keys), at<const uint8_t>(values), s[4] * size, s[5] * size, s[6] * size, s[8] * size, s[9] * size, s[10] * size, Dtype(dtype)};
    }
    std::vector<float> sink_logits(const Layout& layout) const {
        std::vector<float> logits;
        if (sinks) {
            logits.resize(size_t(layout.heads) * size_t(groups));
            widen(at<const uint8_t>(sinks), Dtype(sink_dtype), int(logits.size()), logits.data());
        }
        return logits;
    }
};

StepArguments arguments_of(const std::string& isa, int threads, uintptr_t query, int query_dtype, int groups, int n, const std::vector<int64_t>& strides,
                           uintptr_t keys, uintptr_t values, int dtype, bool commits, int64_t k, float scaling, float softcap, uintptr_t sinks,
                           int sink_dtype, uintptr_t out) {
    if (strides.size() != 12) throw std::invalid_argument("strides");
    return {isa, threads, query, query_dtype, groups, n, strides, keys, values, dtype, commits, k, scaling, softcap, sinks, sink_dtype, out};
}

// counts: low-bit tokens and residual tokens per sequence. Return `decode_in_place`'s result.
int64_t py_decode_in_place(const StepArguments& arguments, const std::vector<const OwnedStoredLayer*>& layers, const std::vector<int64_t>& counts) {
    if (layers.empty() || counts.size() != 2 * layers.size()) throw std::invalid_argument("sequences");
    const Layout& layout = layout_of(layers);
    std::vector<StoredSequence> sequences;
    for (size_t b = 0; b < layers.size(); b++) sequences.push_back({&layers[b]->stored, counts[2 * b], counts[2 * b + 1]});
    const std::vector<float> sinks = arguments.sink_logits(layout);
    const Engine engine = engine_of(arguments.isa, arguments.threads);
    nb::gil_scoped_release released;
    return decode_in_place(engine, arguments.step(layout), sequences, arguments.tokens(), arguments.commits, arguments.k, sinks.empty() ? nullptr : sinks.data());
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
    const Layout& layout = layout_of(layers);
    std::vector<StoredSequence> sequences;
    for (size_t b = 0; b < layers.size(); b++) {
        const int64_t* of = counts.data() + 4 * b;
        sequences.push_back({&layers[b]->stored, of[0], of[1], of[2], of[3] != 0, on_disk.empty() ? nullptr : on_disk[b], hot[b]});
    }
    const std::vector<float> sinks = arguments.sink_logits(layout);
    const Engine engine = engine_of(arguments.isa, arguments.threads);
    std::vector<FetchCounts> fetched;
    int64_t result;
    {
        nb::gil_scoped_release released;
        result = decode_fetched(engine, arguments.step(layout), sequences, arguments.tokens(), arguments.commits, arguments.k,
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
        int query_dtype, int groups, int n, const std::vector<int64_t>& strides, uintptr_t keys, uintptr_t values, int dtype, bool commits, int64_t k,
        float scaling, float softcap, uintptr_t sinks, int sink_dtype, uintptr_t out) {
        new (made) StepArguments(arguments_of(isa, threads, query, query_dtype, groups, n, strides, keys, values, dtype, commits, k, scaling, softcap,
                                              sinks, sink_dtype, out));
    });
    m.def("decode_in_place", &py_decode_in_place);
    m.def("decode_fetched", &py_decode_fetched);
}

}  // namespace specache
