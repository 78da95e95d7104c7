// The decoder layers of a step in one call: each layer's program with its attention in the middle.
#pragma once

#include <cstdint>
#include <vector>

#include "layer_program.hpp"
#include "step_arguments.hpp"

namespace specache {

// A tensor [B, heads, n, D] in one of the buffers that a program makes; its last stride is 1.
struct MadeView {
    int buffer = 0;
    int64_t offset = 0;           // bytes
    int64_t strides[4] = {};      // elements
};

// One layer of a chain. The bases of its program are: the scratch memory, the layer's input, the
// other inputs of the call, the buffers that it makes, the attention's result, its weights.
struct ChainLayer {
    const LayerProgram* program = nullptr;
    int64_t middle = 0;  // operations before the attention
    int64_t scratch_bytes = 0;
    std::vector<int64_t> made_bytes;
    int result = 0;  // the buffer that is the next layer's input
    MadeView query, keys, values;
    int64_t attended_bytes = 0;
    std::vector<uintptr_t> weights;
    StepArguments attention;  // without addresses, threads, commits and top_k
};

// What one step's attention needs, of every layer and sequence, layer by layer. Without layers there is
// no attention: its results are zero.
struct ChainStep {
    std::vector<const OwnedStoredLayer*> layers;
    std::vector<int64_t> counts;      // four each, as of `sequences_of`
    std::vector<HotSet*> hot;         // none: rows are read in place
    std::vector<DiskRows*> on_disk;   // none: rows are in memory
    std::vector<uintptr_t> next;      // one per layer [B, Hkv, k], or none
    bool commits = false;
    TopK top_k;
    int real = 0;
};

struct ChainResult {
    int64_t layers = 0;                // that ran to their end
    int64_t code = kAllFinite;         // of the layer behind them, as `decode_fetched` returns it
    std::vector<FetchCounts> counts;   // per layer and sequence
    double attention_s = 0.0;
};

class LayerChain {
public:
    void add(ChainLayer layer);
    int64_t size() const { return int64_t(layers_.size()); }
    // hidden: the first layer's input; inputs: what all layers are given besides; results: where the
    // layers' results go, `result_bytes` each.
    ChainResult run(const Engine&, uintptr_t hidden, const std::vector<uintptr_t>& inputs, uintptr_t results, int64_t result_bytes,
                    const ChainStep&) const;

private:
    std::vector<ChainLayer> layers_;
};

}  // namespace specache
