// Python bindings of steps in place, called by specache/kernels/cpu/in_place.py, which checks dtypes,
// shapes and strides.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "elements.hpp"
#include "in_place.hpp"

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

// counts: low-bit tokens and residual tokens per sequence. strides: in elements, four of queries, of
// keys and of values, whose last is 1. out [B, n, Hq, D] is contiguous, in the queries' dtype. Return
// `decode_in_place`'s result.
int64_t py_decode_in_place(const std::string& isa, int threads, const std::vector<const OwnedStoredLayer*>& layers,
                           const std::vector<int64_t>& counts, uintptr_t query, int query_dtype, int groups, int n,
                           const std::vector<int64_t>& strides, uintptr_t keys, uintptr_t values, int dtype, bool commits, int64_t k,
                           float scaling, float softcap, uintptr_t sinks, int sink_dtype, uintptr_t out) {
    if (layers.empty() || counts.size() != 2 * layers.size() || strides.size() != 12) throw std::invalid_argument("sequences");
    const Layout& layout = layout_of(layers);
    std::vector<StoredSequence> sequences;
    for (size_t b = 0; b < layers.size(); b++) sequences.push_back({&layers[b]->stored, counts[2 * b], counts[2 * b + 1]});
    const Dtype asked = Dtype(query_dtype), kept = Dtype(dtype);
    const int64_t of_query = itemsize(asked), of_key = itemsize(kept), *s = strides.data(), width = layout.dim * of_query;
    Step step{&layout, {}, {at<const uint8_t>(query), asked, s[0] * of_query, s[1] * of_query, s[2] * of_query}, groups, n, scaling, softcap};
    const int64_t heads = int64_t(layout.heads) * groups;
    step.output = {at<uint8_t>(out), asked, n * heads * width, width, heads * width};
    const StepTokens tokens{at<const uint8_t>(keys), at<const uint8_t>(values), s[4] * of_key, s[5] * of_key, s[6] * of_key,
                            s[8] * of_key, s[9] * of_key, s[10] * of_key, kept};
    std::vector<float> sink_logits;
    if (sinks) {
        sink_logits.resize(size_t(heads));
        widen(at<const uint8_t>(sinks), Dtype(sink_dtype), int(heads), sink_logits.data());
    }
    const Engine engine = engine_of(isa, threads);
    nb::gil_scoped_release released;
    return decode_in_place(engine, std::move(step), sequences, tokens, commits, k, sinks ? sink_logits.data() : nullptr);
}

}  // namespace

void bind_in_place(nb::module_& m) {
    nb::class_<OwnedStoredLayer>(m, "StoredLayer")
        .def(nb::init<>())
        .def("set_pages", &OwnedStoredLayer::set_pages, nb::keep_alive<1, 2>())
        .def("set_residual", &OwnedStoredLayer::set_residual)
        .def("set_rows", &OwnedStoredLayer::set_rows);
    m.def("decode_in_place", &py_decode_in_place);
}

}  // namespace specache
