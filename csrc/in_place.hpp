// One layer of a decode step whose 16-bit rows lie in memory, in one call: store the committed token,
// then attend.
#pragma once

#include <cstdint>
#include <vector>

#include "disk_rows.hpp"
#include "engine.hpp"

namespace specache {

// One layer of one sequence, kept from step to step. The memory is the caller's. Strides are in
// bytes.
struct StoredLayer {
    const Layout* layout = nullptr;
    std::vector<const uint8_t*> pages;
    const float* weights = nullptr;  // key scales of the rotated code
    uint8_t *keys = nullptr, *values = nullptr;  // the residual [Hkv, R + g, D]
    int64_t residual_head = 0, residual_token = 0, residual_capacity = 0;
    std::vector<const uint8_t*> row_blocks;  // of `rows`
    StoredRows rows;
    int64_t row_capacity = 0;  // tokens
};

// One sequence of a step: the tokens that its layer holds before.
struct StoredSequence {
    const StoredLayer* layer;
    int64_t low_bit, residual;
    int64_t pending = 0;          // residual tokens that are quantised after the step, its own included
    bool stored = false;          // whether the committed token is in the residual already
    DiskRows* on_disk = nullptr;  // where its row goes if not to the layer's rows in memory
    HotSet* hot = nullptr;        // through which rows are copied; null where they are read in place
};

// Keys and values [B, Hkv, n, D] of the step's tokens; strides in bytes.
struct StepTokens {
    const uint8_t *keys, *values;
    int64_t key_batch, key_head, key_token, value_batch, value_head, value_token;
    Dtype dtype;
};

constexpr int64_t kAllFinite = -1;

// Store the committed tokens, complete `step`, and return its recent tokens in `recents`. Return as
// `decode_in_place` does.
int64_t begin_step(Step& step, const std::vector<StoredSequence>&, const StepTokens&, bool commits, std::vector<Recent>& recents);

// Compute a step into its `output`. With `commits` the first of a sequence's n tokens is appended to
// residual and rows first. Return `kAllFinite`, or, where the committed keys of sequence b are not
// finite, 2 b, and 2 b + 1 where its values are not: then nothing was written.
int64_t decode_in_place(const Engine&, Step, const std::vector<StoredSequence>&, const StepTokens&, bool commits, const TopK& top_k, const float* sinks);

}  // namespace specache
