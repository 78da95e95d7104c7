// Softmax weights, and the k tokens of largest mean probability in time linear in the number of
// tokens. A part of kernels_impl.hpp.
#pragma once

namespace specache {
namespace {

// ---- select -----------------------------------------------------------------------------------------------------------------

inline Floats scores_at(const float* scores, int64_t t, int64_t length) {
    return t + kTile <= length ? Isa::load(scores + t) : load_partial(scores + t, int(length - t), kLowest);
}

inline float largest_of(const float* scores, int64_t length) {
    Floats peaks[4] = {Isa::splat(kLowest), Isa::splat(kLowest), Isa::splat(kLowest), Isa::splat(kLowest)};
    int64_t t = 0;
    for (; t + kPage <= length; t += kPage) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) peaks[i] = Isa::max(peaks[i], Isa::load(scores + t + i * kTile));
    }
    for (; t < length; t += kTile) peaks[0] = Isa::max(peaks[0], scores_at(scores, t, length));
    return Isa::largest(Isa::max(Isa::max(peaks[0], peaks[1]), Isa::max(peaks[2], peaks[3])));
}

// Return how many blocks share a row of `tops`, the largest `mean_prob` of each lane. The k-th
// largest of all tops is a lower bound that at least k tokens reach.
inline int64_t blocks_per_top(int64_t length, int64_t k) {
    int64_t wanted = 8 * k > 512 ? 8 * k : 512, per_top = length / wanted;
    return per_top < 1 ? 1 : per_top > kStretch / kTile ? kStretch / kTile : per_top;
}

// Return how many of x [whole blocks] are not less than a bound.
inline int64_t count_reaching(const float* x, int64_t length, float bound) {
    const Floats least = Isa::splat(bound);
    Ints counts = Isa::zero();
    for (int64_t t = 0; t < length; t += kTile) counts = Isa::count_not_less(counts, Isa::load(x + t), least);
    return int64_t(Isa::sum(Isa::to_float(counts)));  // below 2^24, so exact
}

// Return the k-th largest of x [whole blocks], whose numbers are not negative or -infinity, or a lower number
// that exactly k of them reach. After `halvings` of the range it is one that at least k reach. -infinity if there
// are fewer.
inline float kth_largest(const float* x, int64_t length, int64_t k, int halvings) {
    if (count_reaching(x, length, 0.0f) < k) return -INFINITY;
    uint32_t low = 0, high = 0x7F800001;  // bits of numbers in their order, 0 to above infinity
    for (int i = 0; i < halvings && high - low > 1; i++) {
        const uint32_t middle = low + (high - low) / 2;
        const int64_t count = count_reaching(x, length, float_of(middle));
        (count >= k ? low : high) = middle;
        if (count == k) break;
    }
    return float_of(low);
}

constexpr int kFewHalvings = 14;  // to 3%
constexpr int kAllHalvings = 32;

// Find the k positions of largest mean_prob, ascending, ties to the lower, -1 padding. mean_prob is
// padded with -infinity to whole blocks; tops [count], whole blocks: see `blocks_per_top`;
// candidates, values: scratch of `length` in whole blocks.
void top_k(const float* mean_prob, int64_t length, const float* tops, int64_t count, int64_t k, int64_t* positions, float* values,
           int32_t* candidates) {
    if (k >= length) {
        for (int64_t i = 0; i < k; i++) positions[i] = i < length ? i : -1;
        return;
    }
    const Floats least = Isa::splat(kth_largest(tops, count, k, kFewHalvings));
    int64_t found = 0;
    for (int64_t t = 0; t < length; t += kTile)
        for (uint32_t mask = Isa::not_less(Isa::load(mean_prob + t), least); mask; mask &= mask - 1) {
            int64_t position = t + __builtin_ctz(mask);
            if (position < length) candidates[found++] = int32_t(position);
        }
    for (int64_t i = 0; i < found; i++) values[i] = mean_prob[candidates[i]];
    for (int64_t i = found; i % kTile; i++) values[i] = -INFINITY;
    if (found < k) {  // a query is not finite: any k positions in range do
        for (int64_t i = 0; i < k; i++) positions[i] = i;
        return;
    }
    const float threshold = kth_largest(values, (found + kTile - 1) / kTile * kTile, k, kAllHalvings);
    int64_t above = 0, taken = 0;
    for (int64_t i = 0; i < found; i++) above += mean_prob[candidates[i]] > threshold;
    int64_t equals = k - above;
    for (int64_t i = 0; i < found && taken < k; i++) {
        float x = mean_prob[candidates[i]];
        if (x > threshold || (x == threshold && equals-- > 0)) positions[taken++] = candidates[i];
    }
    for (; taken < k; taken++) positions[taken] = -1;
}

void exp_scores(const Layout& layout, const LowBitKV& low_bit_kv, int head, const PreparedQuery& prepared, int64_t first, int64_t count,
                float scaling, float softcap, float* const* weights, float* peak, float* total) {
    score(layout, low_bit_kv, head, prepared, first, count, scaling, softcap, weights);
    for (int j = 0; j < prepared.count; j++) {
        float* row = weights[j] + first;
        peak[j] = largest_of(row, count);
        const Floats shift = Isa::splat(peak[j]);
        Floats sums[4] = {Isa::splat(0.0f), Isa::splat(0.0f), Isa::splat(0.0f), Isa::splat(0.0f)};
        int64_t t = 0;
        for (; t + kPage <= count; t += kPage) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                Floats p = Isa::exp(Isa::sub(Isa::load(row + t + i * kTile), shift));
                Isa::store(row + t + i * kTile, p);
                sums[i] = Isa::add(sums[i], p);
            }
        }
        for (; t < count; t += kTile) {
            Floats p = Isa::exp(Isa::sub(scores_at(row, t, count), shift));
            Isa::store(row + t, p);
            sums[0] = Isa::add(sums[0], p);
        }
        const Floats sum = Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3]));
        total[j] = Isa::sum(sum);
        for (int64_t t = count; t % kPage; t++) row[t] = 0.0f;
    }
}

void add_mean_prob(const float* const* weights, const float* factor, int groups, int64_t first, int64_t count, int64_t per_top,
                   float* mean_prob, float* tops) {
    for (int64_t t = first; t < first + count; tops += kTile) {
        Floats top = Isa::splat(-INFINITY);
        for (int64_t i = 0; i < per_top && t < first + count; i++, t += kTile) {
            Floats sum = Isa::mul(Isa::load(weights[0] + t), Isa::splat(factor[0]));
            for (int g = 1; g < groups; g++) sum = Isa::fma(Isa::load(weights[g] + t), Isa::splat(factor[g]), sum);
            Isa::store(mean_prob + t, sum);
            top = Isa::max(top, sum);
        }
        Isa::store(tops, top);
    }
}

}  // namespace
}  // namespace specache
