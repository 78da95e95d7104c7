#include "in_place.hpp"

#include <cstring>
#include <stdexcept>

#include "elements.hpp"

namespace specache {
namespace {

const uint8_t* key_of(const StepTokens& tokens, int64_t b, int head) { return tokens.keys + b * tokens.key_batch + head * tokens.key_head; }
const uint8_t* value_of(const StepTokens& tokens, int64_t b, int head) {
    return tokens.values + b * tokens.value_batch + head * tokens.value_head;
}

void check_room(const StoredSequence& sequence, bool commits) {
    const StoredLayer& layer = *sequence.layer;
    if (sequence.low_bit > int64_t(layer.pages.size()) * kPage) throw std::invalid_argument("fewer pages than tokens");
    const int64_t stored = sequence.residual + (commits && !sequence.stored), tokens = sequence.low_bit + stored;
    if (stored > layer.residual_capacity) throw std::invalid_argument("the residual is full");
    if (sequence.on_disk) {
        if (!sequence.stored && commits && tokens > sequence.on_disk->on_disk() + kPage) throw std::invalid_argument("the block is full");
    } else if (tokens > layer.row_capacity) {
        throw std::invalid_argument("fewer rows than tokens");
    }
}

int64_t first_not_finite(const Layout& layout, const std::vector<StoredSequence>& sequences, const StepTokens& tokens) {
    for (size_t b = 0; b < sequences.size(); b++) {
        if (sequences[b].stored) continue;
        bool keys = true, values = true;
        for (int head = 0; head < layout.heads; head++) {
            keys &= all_finite(key_of(tokens, int64_t(b), head), tokens.dtype, layout.dim);
            values &= all_finite(value_of(tokens, int64_t(b), head), tokens.dtype, layout.dim);
        }
        if (!keys || !values) return int64_t(2 * b + keys);
    }
    return kAllFinite;
}

// Store a sequence's committed token behind its others.
void append(const Layout& layout, const StoredSequence& sequence, int64_t b, const StepTokens& tokens) {
    const StoredLayer& layer = *sequence.layer;
    const size_t bytes = size_t(layout.dim) * size_t(itemsize(tokens.dtype));
    const int64_t position = sequence.low_bit + sequence.residual;
    for (int head = 0; head < layout.heads; head++) {
        const uint8_t *key = key_of(tokens, b, head), *value = value_of(tokens, b, head);
        uint8_t* row = sequence.on_disk ? sequence.on_disk->tail_row(head, position) : const_cast<uint8_t*>(layer.rows.at(head, position));
        const int64_t newest = head * layer.residual_head + sequence.residual * layer.residual_token;
        std::memcpy(row, key, bytes);
        std::memcpy(row + bytes, value, bytes);
        std::memcpy(layer.keys + newest, key, bytes);
        std::memcpy(layer.values + newest, value, bytes);
    }
}

}  // namespace

int64_t begin_step(Step& step, const std::vector<StoredSequence>& sequences, const StepTokens& tokens, bool commits, std::vector<Recent>& recents) {
    const Layout& layout = *step.layout;
    for (const StoredSequence& sequence : sequences) check_room(sequence, commits);
    if (commits) {
        const int64_t bad = first_not_finite(layout, sequences, tokens);
        if (bad != kAllFinite) return bad;
    }
    for (size_t b = 0; b < sequences.size(); b++) {
        const StoredSequence& sequence = sequences[b];
        const StoredLayer& layer = *sequence.layer;
        const bool stores = commits && !sequence.stored;
        if (stores) append(layout, sequence, int64_t(b), tokens);
        step.low_bit_kvs.push_back({layer.pages.data(), sequence.low_bit, layer.weights});
        Recent recent{layer.keys, layer.values, sequence.residual + stores, layer.residual_head, layer.residual_token, sequence.pending, tokens.dtype};
        recent.own = step.rows - commits;
        recent.own_keys = key_of(tokens, int64_t(b), 0) + commits * tokens.key_token;
        recent.own_values = value_of(tokens, int64_t(b), 0) + commits * tokens.value_token;
        recent.own_key_head = tokens.key_head, recent.own_key_token = tokens.key_token;
        recent.own_value_head = tokens.value_head, recent.own_value_token = tokens.value_token;
        recents.push_back(recent);
    }
    return kAllFinite;
}

int64_t decode_in_place(const Engine& engine, Step step, const std::vector<StoredSequence>& sequences, const StepTokens& tokens,
                        bool commits, const TopK& top_k, const float* sinks) {
    const int heads = step.layout->heads;
    std::vector<Recent> recents;
    const int64_t bad = begin_step(step, sequences, tokens, commits, recents);
    if (bad != kAllFinite) return bad;
    std::vector<Rows> rows;
    for (const StoredSequence& sequence : sequences)
        for (int head = 0; head < heads; head++)
            rows.push_back({nullptr, tokens.dtype, 0, 0, sequence.layer->rows, head});
    LayerStep(engine, std::move(step), recents, top_k, sinks, true).run(rows, nullptr);
    return kAllFinite;
}

}  // namespace specache
