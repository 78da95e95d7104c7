// What Python passes of a layer of a step: addresses of tensors, whose dtypes, shapes and strides it has
// checked.
#pragma once

#include <string>
#include <vector>

#include "bindings.hpp"
#include "elements.hpp"
#include "fetched_step.hpp"

namespace specache {

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
inline const Layout& layout_of(const OwnedStoredLayer* const* layers, size_t count) {
    for (size_t b = 0; b < count; b++)
        if (!layers[b]->stored.pages.empty()) return *layers[b]->stored.layout;
    return *layers[0]->stored.layout;
}

// counts: low-bit, residual and pending tokens, and whether the committed token is stored already, per
// sequence. hot, on_disk: one per sequence, or null.
inline std::vector<StoredSequence> sequences_of(const OwnedStoredLayer* const* layers, const int64_t* counts, HotSet* const* hot,
                                                DiskRows* const* on_disk, size_t count) {
    std::vector<StoredSequence> sequences;
    for (size_t b = 0; b < count; b++) {
        const int64_t* of = counts + 4 * b;
        sequences.push_back({&layers[b]->stored, of[0], of[1], of[2], of[3] != 0, on_disk ? on_disk[b] : nullptr, hot ? hot[b] : nullptr});
    }
    return sequences;
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
    TopK top_k;
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

}  // namespace specache
