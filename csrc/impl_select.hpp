// The k tokens of largest mean probability, in time linear in the number of tokens. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

// ---- select -----------------------------------------------------------------------------------------------------------------

inline Floats scores_at(const float* scores, int64_t t, int64_t length) {
    return t + kTile <= length ? Isa::load(scores + t) : load_partial(scores + t, int(length - t), kLowest);
}

inline float largest_of(const float* scores, int64_t length) {
    Floats peak = Isa::splat(kLowest);
    for (int64_t t = 0; t < length; t += kTile) peak = Isa::max(peak, scores_at(scores, t, length));
    return Isa::largest(peak);
}

void select(const float* const* scores, const float* rest_lse, int groups, int64_t length, int64_t k, int64_t* positions,
            float* mass, int32_t* picked) {
    int64_t padded = (length + kTile - 1) / kTile * kTile;
    for (int g = 0; g < groups; g++) {
        float peak = largest_of(scores[g], length);
        Floats total = Isa::splat(0.0f), shift = Isa::splat(peak);
        for (int64_t t = 0; t < length; t += kTile) total = Isa::add(total, Isa::exp(Isa::sub(scores_at(scores[g], t, length), shift)));
        // log-sum-exp over the copy and what is outside of it
        float lse = peak + scalar_log(Isa::sum(total));
        float high = lse > rest_lse[g] ? lse : rest_lse[g], low = lse > rest_lse[g] ? rest_lse[g] : lse;
        float gap = low - high;
        float all = high + (gap > -80.0f ? scalar_log(1.0f + Isa::first(Isa::exp(Isa::splat(gap)))) : 0.0f);
        Floats factor = Isa::mul(Isa::exp(Isa::splat(peak - all)), Isa::splat(1.0f / float(groups)));
        for (int64_t t = 0; t < length; t += kTile) {
            Floats p = Isa::mul(Isa::exp(Isa::sub(scores_at(scores[g], t, length), shift)), factor);
            Isa::store(mass + t, g ? Isa::add(p, Isa::load(mass + t)) : p);
        }
    }
    for (int64_t t = length; t < padded; t++) mass[t] = -INFINITY;

    if (k >= length) {
        for (int64_t i = 0; i < k; i++) positions[i] = i < length ? i : -1;
        return;
    }
    // A value that at least k elements reach: the k-th largest of the blocks' largest.
    float bound = -INFINITY;
    alignas(64) float tops[4096];
    int64_t blocks = padded / kTile < 4096 ? padded / kTile : 4096;
    if (blocks >= 2 * k) {
        int64_t per_block = (padded / kTile + blocks - 1) / blocks;
        int64_t used = 0;
        for (int64_t t = 0; t < padded; used++) {
            Floats top = Isa::load(mass + t);
            int64_t stop = t + per_block * kTile < padded ? t + per_block * kTile : padded;
            for (t += kTile; t < stop; t += kTile) top = Isa::max(top, Isa::load(mass + t));
            tops[used] = Isa::largest(top);
        }
        if (used >= k) bound = kth_largest(tops, used, k);
    }
    int64_t found = 0;
    Floats least = Isa::splat(bound);
    for (int64_t t = 0; t < padded; t += kTile)
        for (uint32_t mask = Isa::not_less(Isa::load(mass + t), least); mask; mask &= mask - 1) {
            int64_t position = t + __builtin_ctz(mask);
            if (position < length) picked[found++] = int32_t(position);
        }
    float* values = mass + padded;  // of the candidates
    for (int64_t i = 0; i < found; i++) values[i] = mass[picked[i]];
    if (found < k) {  // a query that is not finite: no order, but nothing out of range either
        for (int64_t i = 0; i < k; i++) positions[i] = i;
        return;
    }
    float threshold = kth_largest(values, found, k);
    int64_t above = 0, taken = 0;
    for (int64_t i = 0; i < found; i++) above += mass[picked[i]] > threshold;
    int64_t equals = k - above;
    for (int64_t i = 0; i < found && taken < k; i++) {
        float x = mass[picked[i]];
        if (x > threshold || (x == threshold && equals-- > 0)) positions[taken++] = picked[i];
    }
    for (; taken < k; taken++) positions[taken] = -1;
}

}  // namespace
}  // namespace specache
