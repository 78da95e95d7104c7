// One layer of a decode step whose 16-bit rows are fetched into a hot set, in one call.
#pragma once

#include "in_place.hpp"

namespace specache {

constexpr int64_t kReadsFailed = -2;

// What a step fetched for one sequence.
struct FetchCounts {
    int64_t selected = 0, ready = 0;  // pairs of the real queries, and those that the hot set had
    int64_t fetched = 0;              // rows, for this step and the next
    double seconds = 0.0;             // for which rows were copied in memory
};

// Compute a step as `decode_in_place` does, through hot sets, which have room for the pairs of one
// step. The first `real` of a sequence's tokens get all pairs that they select, the others those that
// are there by then. `next`: what the last one selects for the next step [B, Hkv, k], fetched ahead,
// or null. Return `kReadsFailed` where rows cannot be read from a disk: the committed tokens are
// stored then, and there is no output.
int64_t decode_fetched(const Engine&, Step, const std::vector<StoredSequence>&, const StepTokens&, bool commits, const TopK& top_k, const float* sinks,
                       int real, int64_t* next, std::vector<FetchCounts>& counts);

}  // namespace specache
