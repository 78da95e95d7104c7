// What a layer of a step computes, task by task: each may run on any thread. layer_step.cpp says in
// which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "engine.hpp"
#include "step.hpp"
#include "threads.hpp"

namespace specache {

// Bytes of weights per thread and wave: as many as a second-level cache holds beside the codes.
constexpr int64_t kWaveBytes = 512 << 10;
// An exact score may be above the peak of the low-bit scores, whose weights are at most 1.
constexpr float kMostAbovePeak = 60.0f;

// `slot`: a head's place in its wave, which begins with head `first`.
class LayerTasks {
public:
    LayerTasks(const Engine& engine, Step step, const std::vector<Recent>& recents, const TopK& top_k, const float* sinks, bool at_once)
        : engine_(engine), kernels_(*engine.kernels), step_(std::move(step)), layout_(*step_.layout), recents_(recents), sinks_(sinks),
          top_k_(top_k), size_((longest(step_) + kPage - 1) / kPage * kPage), k_(top_k.of(longest(step_))),
          next_k_(top_k.of(longest_next(step_, recents))), most_pending_(most_pending(recents)), count_(step_.queries()),
          stretches_(chunks_of(size_, kStretch)), chunks_(chunks_of(size_, kAttendChunk)), wave_(at_once ? heads_per_wave() : step_.heads()),
          per_top_(kernels_.blocks_per_top(size_, k_)), tops_(chunks_ * (kAttendChunk / kStretch) * tops_of_stretch()), queries_(engine_, step_),
          row_batches_(step_.groups, kernels_.queries_per_pass), recent_parts_(step_, queries_.batches, step_.heads() * queries_.batches.count),
          low_bit_parts_(step_, queries_.batches, wave_ * queries_.batches.count * chunks_),
          exact_parts_(step_, row_batches_, wave_ * step_.rows * row_batches_.count),
          weights_(wave_ * count_ * size_), peaks_(wave_ * count_ * stretches_), totals_(wave_ * count_ * stretches_),
          factors_(wave_ * count_ * stretches_), mean_prob_(wave_ * step_.rows * size_), top_values_(wave_ * step_.rows * tops_),
          rest_lse_(step_.heads() * count_), pending_(step_.heads() * step_.groups * most_pending_),
          positions_(wave_ * step_.rows * k_) {}

protected:
    int64_t wave_heads(int64_t first) const { return std::min(wave_, step_.heads() - first); }
    int64_t rows_of(int64_t heads) const { return heads * step_.rows; }
    int64_t batches_of(int64_t heads) const { return heads * queries_.batches.count; }

    int64_t heads_per_wave() const {
        int64_t fit = engine_.threads * kWaveBytes / std::max<int64_t>(1, count_ * size_ * int64_t(sizeof(float)));
        return std::min(step_.heads(), std::max<int64_t>(engine_.threads, fit));
    }
    int64_t tops_of_stretch() const { return chunks_of(kStretch / kTile, per_top_) * kTile; }

    float sink(int64_t head, int query) const {
        return sinks_ ? sinks_[step_.head_of(head) * step_.groups + query / step_.rows] : -INFINITY;
    }
    float* weights(int64_t slot, int query) { return weights_.get() + (slot * count_ + query) * size_; }
    float* of_stretches(Buffer<float>& numbers, int64_t slot, int query) { return numbers.get() + (slot * count_ + query) * stretches_; }
    // exp(score - peak) of the pending tokens, of the last row's query in a group.
    float* pending(int64_t head, int group) { return pending_.get() + (head * step_.groups + group) * most_pending_; }
    float* tops(int64_t slot, int row) { return top_values_.get() + (slot * step_.rows + row) * tops_; }
    Partial low_bit_part(int64_t slot, int64_t chunk, int64_t batch) {
        return low_bit_parts_.at((slot * chunks_ + chunk) * queries_.batches.count + batch);
    }
    Partial exact_part(int64_t slot, int row, int64_t batch) { return exact_parts_.at((slot * step_.rows + row) * row_batches_.count + batch); }
    Partial recent_part(int64_t head, int64_t batch) { return recent_parts_.at(head * queries_.batches.count + batch); }

    void attend_recent(int64_t head) {
        const Recent& recent = recents_[size_t(head / layout_.heads)];
        const int64_t offset = step_.head_of(head) * recent.head_stride, all = recent.all();
        const int64_t bytes = int64_t(layout_.dim) * itemsize(recent.dtype), weights = kMaxQueries * (all + kTile) * int64_t(sizeof(float));
        auto* held = static_cast<float*>(scratch(size_t(weights + (recent.own ? 2 * all * bytes : 0))));
        const uint8_t *keys = recent.keys + offset, *values = recent.values + offset;
        int64_t stride = recent.token_stride;
        if (recent.own) {
            auto* joined = reinterpret_cast<uint8_t*>(held) + weights;
            join_own(recent, step_.head_of(head), bytes, joined);
            keys = joined, values = joined + all * bytes, stride = bytes;
        }
        for (int64_t batch = 0; batch < queries_.batches.count; batch++) {
            const float* pointers[kMaxQueries];
            int64_t seen[kMaxQueries];
            int count = queries_.batch(head, batch, pointers);
            for (int j = 0; j < count; j++)  // an earlier row does not see the tokens of later ones
                seen[j] = std::max<int64_t>(0, all - (step_.rows - 1 - (queries_.batches.first(batch) + j) % step_.rows));
            Partial part = recent_part(head, batch);
            kernels_.exact(pointers, count, layout_.dim, keys, values, stride, stride, all, seen, recent.dtype, step_.scaling,
                           step_.softcap, held, part);
            for (int j = 0; j < count; j++) {
                int query = queries_.batches.first(batch) + j;
                rest_lse_[head * count_ + query] = log_add(part.peak[j] + std::log(part.total[j]), sink(head, query));
                if (query % step_.rows == step_.rows - 1)
                    std::copy_n(held + j * (all + kTile), recent.pending, pending(head, query / step_.rows));
            }
        }
    }

    // Copy a head's recent keys [all, D], then values, with the step's own tokens at the end.
    static void join_own(const Recent& recent, int head, int64_t bytes, uint8_t* joined) {
        const uint8_t *keys = recent.keys + head * recent.head_stride, *values = recent.values + head * recent.head_stride;
        const uint8_t *own_keys = recent.own_keys + head * recent.own_key_head, *own_values = recent.own_values + head * recent.own_value_head;
        uint8_t *to_keys = joined, *to_values = joined + recent.all() * bytes;
        for (int64_t t = 0; t < recent.all(); t++, to_keys += bytes, to_values += bytes) {
            const int64_t own = t - recent.count;
            std::memcpy(to_keys, own < 0 ? keys + t * recent.token_stride : own_keys + own * recent.own_key_token, size_t(bytes));
            std::memcpy(to_values, own < 0 ? values + t * recent.token_stride : own_values + own * recent.own_value_token, size_t(bytes));
        }
    }

    void exp_scores(int64_t first, int64_t slot, int64_t stretch, int64_t batch) {
        const LowBitKV& low_bit_kv = step_.low_bit_of(first + slot);
        const int64_t start = stretch * kStretch, tokens = std::min<int64_t>(kStretch, low_bit_kv.length - start);
        float *out[kMaxQueries], peak[kMaxQueries], total[kMaxQueries];
        const int low = queries_.batches.first(batch), count = queries_.batches.length(batch);
        for (int j = 0; j < count; j++) out[j] = weights(slot, low + j), peak[j] = -INFINITY, total[j] = 0.0f;
        if (tokens > 0)
            kernels_.exp_scores(layout_, low_bit_kv, step_.head_of(first + slot), queries_.prepared(first + slot, batch), start, tokens,
                                step_.scaling, step_.softcap, out, peak, total);
        for (int j = 0; j < count; j++) {
            of_stretches(peaks_, slot, low + j)[stretch] = peak[j];
            of_stretches(totals_, slot, low + j)[stretch] = total[j];
        }
    }

    // The log-sum-exp of everything that a query sees.
    float log_sum(int64_t first, int64_t slot, int query) {
        const float *peak = of_stretches(peaks_, slot, query), *total = of_stretches(totals_, slot, query);
        const float rest = rest_lse_[(first + slot) * count_ + query];
        float high = rest, sum = 0.0f;
        for (int64_t s = 0; s < stretches_; s++)
            if (total[s] > 0.0f) high = std::max(high, peak[s]);
        if (high == -INFINITY) return high;
        for (int64_t s = 0; s < stretches_; s++)
            if (total[s] > 0.0f) sum += total[s] * std::exp(peak[s] - high);
        return high + std::log(sum + std::exp(rest - high));
    }

    // Replace the weights of the fetched `positions` [k] (-1: none) by those of their exact scores.
    void rescore(int64_t head, int row, const Rows& rows, const int64_t* positions, int64_t k) {
        std::vector<const float*> query(size_t(step_.groups));
        std::vector<float*> of_group(size_t(step_.groups));
        auto* before = static_cast<float*>(scratch(size_t(k) * size_t(step_.groups) * sizeof(float)));
        for (int g = 0; g < step_.groups; g++) {
            query[size_t(g)] = queries_.at(head, g * step_.rows + row), of_group[size_t(g)] = weights(head, g * step_.rows + row);
            for (int64_t i = 0; i < k; i++)
                if (positions[i] >= 0) before[g * k + i] = of_group[size_t(g)][positions[i]];
        }
        kernels_.rescore(query.data(), step_.groups, layout_.dim, rows, row, positions, k, step_.scaling, step_.softcap,
                         of_group.data());
        for (int g = 0; g < step_.groups; g++) {
            const float* peak = of_stretches(peaks_, head, g * step_.rows + row);
            float* total = of_stretches(totals_, head, g * step_.rows + row);
            for (int64_t i = 0; i < k; i++) {
                if (positions[i] < 0) continue;
                const int64_t stretch = positions[i] / kStretch;
                float& weight = of_group[size_t(g)][positions[i]];
                weight = std::exp(std::min(weight - peak[stretch], kMostAbovePeak));
                total[stretch] = std::max(0.0f, total[stretch] + weight - before[g * k + i]);
            }
        }
    }

    // The last query's choice among the low-bit tokens and the pending ones, which follow them.
    void select_next(int64_t first, int64_t slot, int64_t* positions) {
        const int64_t head = first + slot;
        const int64_t length = step_.low_bit_of(head).length, pending = recents_[size_t(head / layout_.heads)].pending;
        const int last = step_.rows - 1;
        if (!pending) {
            std::fill(std::copy_n(positions_.get() + (slot * step_.rows + last) * k_, k_, positions), positions + next_k_, -1);
            return;
        }
        const int64_t all = length + pending;
        auto* mean_prob = static_cast<float*>(scratch(size_t(padded(all)) * (2 * sizeof(float) + sizeof(int32_t))));
        float* values = mean_prob + padded(all);
        std::fill(mean_prob + length, mean_prob + padded(all), 0.0f);
        if (k_) std::copy_n(mean_prob_.get() + (slot * step_.rows + last) * size_, length, mean_prob);
        for (int g = 0; g < step_.groups; g++) {
            const int query = g * step_.rows + last, batch = query / queries_.batches.size;
            const float peak = recent_part(head, batch).peak[query - queries_.batches.first(batch)];
            const float factor = std::exp(peak - log_sum(first, slot, query)) / float(step_.groups);
            for (int64_t t = 0; t < pending; t++) mean_prob[length + t] += factor * this->pending(head, g)[t];
        }
        largest(mean_prob, all, nullptr, next_k_, positions, values, reinterpret_cast<int32_t*>(values + padded(all)));
    }

    // Compute the factors that turn a stretch's weights into shares of the mean probability over
    // the queries of a KV head.
    void normalise(int64_t first, int64_t slot, int query) {
        const float* peak = of_stretches(peaks_, slot, query);
        const float all = log_sum(first, slot, query);
        float* factor = of_stretches(factors_, slot, query);
        for (int64_t s = 0; s < stretches_; s++) factor[s] = std::exp(peak[s] - all) / float(step_.groups);
    }

    void add_mean_prob(int64_t first, int64_t slot, int64_t chunk, int row) {
        const int64_t length = step_.low_bit_of(first + slot).length;
        float* mean_prob = mean_prob_.get() + (slot * step_.rows + row) * size_;
        std::vector<const float*> of_group(size_t(step_.groups));
        std::vector<float> factor(size_t(step_.groups));
        for (int g = 0; g < step_.groups; g++) of_group[size_t(g)] = weights(slot, g * step_.rows + row);
        for (int64_t i = 0; i < kAttendChunk / kStretch; i++) {
            const int64_t stretch = chunk * (kAttendChunk / kStretch) + i, start = stretch * kStretch;
            float* top = tops(slot, row) + stretch * tops_of_stretch();
            std::fill(top, top + tops_of_stretch(), -INFINITY);
            if (start >= length) continue;
            for (int g = 0; g < step_.groups; g++) factor[size_t(g)] = of_stretches(factors_, slot, g * step_.rows + row)[stretch];
            kernels_.add_mean_prob(of_group.data(), factor.data(), step_.groups, start,
                                   std::min<int64_t>(kStretch, length - start), per_top_, mean_prob, top);
        }
    }

    void top_k(int64_t first, int64_t slot, int row) {
        const int64_t length = step_.low_bit_of(first + slot).length;
        int64_t* chosen = positions_.get() + (slot * step_.rows + row) * k_;
        auto* held = static_cast<float*>(scratch(size_t(padded(length)) * (sizeof(float) + sizeof(int32_t))));
        largest(mean_prob_.get() + (slot * step_.rows + row) * size_, length, tops(slot, row), k_, chosen, held,
                reinterpret_cast<int32_t*>(held + padded(length)));
    }

    // The positions of the largest of `length` numbers, as many as a sequence of that length selects,
    // then -1 up to `width`.
    void largest(const float* mean_prob, int64_t length, const float* tops, int64_t width, int64_t* positions, float* values, int32_t* places) const {
        const int64_t k = top_k_.of(length);
        if (k) kernels_.top_k(mean_prob, length, tops, tops ? tops_ : 0, k, positions, values, places);
        std::fill(positions + k, positions + width, -1);
    }

    // Set the weights of the fetched `positions` [k] (-1: none) to zero.
    void leave_out(int64_t slot, int row, const int64_t* positions, int64_t k) {
        for (int group = 0; group < step_.groups; group++) {
            float* weight = weights(slot, group * step_.rows + row);
            for (int64_t i = 0; i < k; i++)
                if (positions[i] >= 0) weight[positions[i]] = 0.0f;
        }
    }

    // Attend to the exact rows of the fetched `positions` [k] (-1: none), at their `places` [k] in
    // `rows` (null: i).
    void attend_exactly(int64_t first, int64_t slot, int row, const Rows& rows, const int64_t* positions, const int64_t* places, int64_t k) {
        auto* held = static_cast<int64_t*>(scratch(size_t(k) * 2 * sizeof(int64_t) + size_t(kMaxQueries) * size_t(k + kTile) * sizeof(float)));
        int64_t *chosen = held, *slots = held + k, count = 0;
        for (int64_t i = 0; i < k; i++)
            if (positions[i] >= 0) chosen[count] = positions[i], slots[count] = places ? places[i] : i, count++;
        for (int64_t batch = 0; batch < row_batches_.count; batch++) {
            const float* query[kMaxQueries];
            for (int j = 0; j < row_batches_.length(batch); j++)
                query[j] = queries_.at(first + slot, (row_batches_.first(batch) + j) * step_.rows + row);
            kernels_.exact_rows(query, row_batches_.length(batch), layout_.dim, rows, row, chosen, slots, count, step_.scaling,
                                step_.softcap, reinterpret_cast<float*>(held + 2 * k), exact_part(slot, row, batch));
        }
    }

    void attend_chunk(int64_t first, int64_t slot, int64_t chunk, int64_t batch) {
        const LowBitKV& low_bit_kv = step_.low_bit_of(first + slot);
        const int64_t start = chunk * kAttendChunk, tokens = std::min<int64_t>(kAttendChunk, low_bit_kv.length - start);
        const int low = queries_.batches.first(batch), count = queries_.batches.length(batch);
        Partial part = low_bit_part(slot, chunk, batch);
        const float *of_query[kMaxQueries], *peaks[kMaxQueries];
        for (int j = 0; j < count; j++) {
            of_query[j] = weights(slot, low + j), peaks[j] = of_stretches(peaks_, slot, low + j);
            part.peak[j] = -INFINITY, part.total[j] = 0.0f;
        }
        if (tokens > 0)
            kernels_.attend_with_weights(layout_, low_bit_kv, step_.head_of(first + slot), start, tokens, of_query, count, peaks,
                                         part);
        else
            std::fill(part.out, part.out + count * part.stride, 0.0f);
    }

    // Add the parts of all chunks of the low-bit KV to that of its first chunk.
    void add_chunks(int64_t slot, int64_t batch) {
        const int count = queries_.batches.length(batch);
        Partial low_bit_kv = low_bit_part(slot, 0, batch);
        for (int64_t chunk = 1; chunk < chunks_; chunk++)
            for (int j = 0; j < count; j++) add(low_bit_part(slot, chunk, batch), low_bit_kv, j);
        kernels_.rotate_back(layout_, count, low_bit_kv);
    }

    // Join the parts of the low-bit KV, the exact rows and the recent tokens.
    void finish(int64_t first, int64_t slot, int64_t batch, float* out) {
        const int64_t head = first + slot;
        const int count = queries_.batches.length(batch), low = queries_.batches.first(batch);
        Partial low_bit_kv = low_bit_part(slot, 0, batch);
        for (int j = 0; j < count; j++) {
            const int query = low + j, group = query / step_.rows;
            Partial parts[] = {recent_part(head, batch), low_bit_kv, exact_part(slot, query % step_.rows, group / row_batches_.size)};
            const int place[] = {j, j, group % row_batches_.size};
            float narrowed[kMaxDim];
            const bool elsewhere = step_.output.data;
            float* to = elsewhere ? narrowed : out + (head * count_ + query) * layout_.dim;
            join(parts, place, size_ ? 3 : 1, layout_.dim, sink(head, query), to);
            if (elsewhere) narrow(narrowed, step_.output.dtype, layout_.dim, step_.place(step_.output, head, query));
        }
    }

    // Add query j's part to `sum`.
    static void add(const Partial& part, const Partial& sum, int j) {
        if (part.total[j] == 0.0f) return;
        const float peak = std::max(part.peak[j], sum.peak[j]), theirs = std::exp(part.peak[j] - peak);
        const float mine = sum.total[j] == 0.0f ? 0.0f : std::exp(sum.peak[j] - peak);
        const float* from = part.out + j * part.stride;
        float* to = sum.out + j * sum.stride;
        if (mine == 0.0f)
            for (int d = 0; d < part.stride; d++) to[d] = theirs * from[d];
        else
            for (int d = 0; d < part.stride; d++) to[d] = mine * to[d] + theirs * from[d];
        sum.total[j] = mine * sum.total[j] + theirs * part.total[j];
        sum.peak[j] = peak;
    }

    static int64_t most_pending(const std::vector<Recent>& recents) {
        int64_t most = 0;
        for (const Recent& recent : recents) most = std::max(most, recent.pending);
        return most;
    }
    // Low-bit tokens of the next step.
    static int64_t longest_next(const Step& step, const std::vector<Recent>& recents) {
        int64_t length = 0;
        for (size_t b = 0; b < recents.size(); b++) length = std::max(length, step.low_bit_kvs[b].length + recents[b].pending);
        return length;
    }

    static float log_add(float a, float b) {
        float high = std::max(a, b);
        return high == -INFINITY ? high : high + std::log(std::exp(a - high) + std::exp(b - high));
    }

    const Engine engine_;
    const Kernels& kernels_;
    const Step step_;
    const Layout& layout_;
    const std::vector<Recent> recents_;
    const float* sinks_;
    const TopK top_k_;
    const int64_t size_, k_, next_k_, most_pending_, count_, stretches_, chunks_, wave_, per_top_, tops_;
    Queries queries_;
    const Batches row_batches_;
    Partials recent_parts_, low_bit_parts_, exact_parts_;
    Buffer<float> weights_, peaks_, totals_, factors_, mean_prob_, top_values_, rest_lse_, pending_;
    Buffer<int64_t> positions_;
};

}  // namespace specache
