#include "layer_chain.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "step.hpp"

namespace specache {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void check(const MadeView& view, const ChainLayer& layer) {
    if (view.buffer < 0 || size_t(view.buffer) >= layer.made_bytes.size() || view.strides[3] != 1) throw std::invalid_argument("view");
}

// Wait for the rows that the last step fetched ahead. Return whether all could be read.
bool begin_rows(const std::vector<StoredSequence>& sequences) {
    for (const StoredSequence& sequence : sequences) {
        if (!sequence.hot) continue;
        if (sequence.on_disk && !sequence.on_disk->finish_ahead()) return false;
        sequence.hot->keep_ahead();
        sequence.hot->step++;
    }
    return true;
}

// Compute the attention of layer i. bases: of its program; made: the first that it makes. Append what
// it fetched to `counts`. Return as `decode_fetched` does.
int64_t attend(const Engine& engine, const ChainLayer& layer, const ChainStep& step, size_t i, size_t batch, const std::vector<uintptr_t>& bases,
               size_t made, std::vector<FetchCounts>& counts) {
    const size_t first = i * batch;
    const Layout& layout = layout_of(step.layers.data() + first, batch);
    const std::vector<StoredSequence> sequences =
        sequences_of(step.layers.data() + first, step.counts.data() + 4 * first, step.hot.empty() ? nullptr : step.hot.data() + first,
                     step.on_disk.empty() ? nullptr : step.on_disk.data() + first, batch);
    StepArguments of = layer.attention;
    const auto at_view = [&](const MadeView& view) { return bases[made + size_t(view.buffer)] + uintptr_t(view.offset); };
    of.query = at_view(layer.query), of.keys = at_view(layer.keys), of.values = at_view(layer.values);
    of.out = bases[made + layer.made_bytes.size()];
    const std::vector<float> sinks = of.sink_logits(layout);
    const float* logits = sinks.empty() ? nullptr : sinks.data();
    std::vector<FetchCounts> fetched(batch);
    int64_t code = kReadsFailed;
    if (step.hot.empty())
        code = decode_in_place(engine, of.step(layout), sequences, of.tokens(), step.commits, step.top_k, logits);
    else if (begin_rows(sequences))
        code = decode_fetched(engine, of.step(layout), sequences, of.tokens(), step.commits, step.top_k, logits, step.real,
                              step.next.empty() ? nullptr : at<int64_t>(step.next[i]), fetched);
    if (code == kAllFinite) counts.insert(counts.end(), fetched.begin(), fetched.end());
    return code;
}

}  // namespace

void LayerChain::add(ChainLayer layer) {
    for (const MadeView* view : {&layer.query, &layer.keys, &layer.values}) check(*view, layer);
    if (!layer.program || layer.result < 0 || size_t(layer.result) >= layer.made_bytes.size() || layer.attention.strides.size() != 12 ||
        layer.middle < 0 || layer.middle > layer.program->size())
        throw std::invalid_argument("layer");
    layers_.push_back(std::move(layer));
}

ChainResult LayerChain::run(const Engine& engine, uintptr_t hidden, const std::vector<uintptr_t>& inputs, uintptr_t results, int64_t result_bytes,
                            const ChainStep& step) const {
    const size_t batch = layers_.empty() ? 0 : step.layers.size() / layers_.size(), all = batch * layers_.size();
    if (layers_.empty() || step.layers.size() != all || step.counts.size() != 4 * all || (!step.hot.empty() && step.hot.size() != all) ||
        (!step.on_disk.empty() && (step.on_disk.size() != all || step.hot.empty())) || (!step.next.empty() && step.next.size() != layers_.size()))
        throw std::invalid_argument("chain");
    int64_t most = 0;
    for (const ChainLayer& layer : layers_) {
        int64_t bytes = aligned(layer.scratch_bytes) + aligned(layer.attended_bytes);
        for (int64_t made : layer.made_bytes) bytes += aligned(made);
        most = std::max(most, bytes);
        if (layer.made_bytes[size_t(layer.result)] != result_bytes) throw std::invalid_argument("result");
    }
    Buffer<uint8_t> memory(most);
    ChainResult result;
    std::vector<uintptr_t> bases;
    for (size_t i = 0; i < layers_.size(); i++) {
        const ChainLayer& layer = layers_[i];
        auto place = uintptr_t(memory.get());
        const auto take = [&](int64_t bytes) { return std::exchange(place, place + uintptr_t(aligned(bytes))); };
        bases.assign({take(layer.scratch_bytes), hidden});
        bases.insert(bases.end(), inputs.begin(), inputs.end());
        const size_t made = bases.size();
        for (int64_t bytes : layer.made_bytes) bases.push_back(take(bytes));
        hidden = bases[made + size_t(layer.result)] = results + i * uintptr_t(result_bytes);
        const uintptr_t attended = take(layer.attended_bytes);
        bases.push_back(attended);  // behind the buffers that are made
        bases.insert(bases.end(), layer.weights.begin(), layer.weights.end());
        layer.program->run(engine.threads, 0, layer.middle, bases);

        const auto started = std::chrono::steady_clock::now();
        if (batch) {
            result.code = attend(engine, layer, step, i, batch, bases, made, result.counts);
            if (result.code != kAllFinite) return result;
        } else {
            std::memset(at<uint8_t>(attended), 0, size_t(layer.attended_bytes));
        }
        result.attention_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();

        layer.program->run(engine.threads, layer.middle, layer.program->size(), bases);
        result.layers++;
    }
    return result;
}

}  // namespace specache
