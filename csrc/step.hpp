// Shared by the kernels over a whole step: queries in batches, memory for a call, and partial
// results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "elements.hpp"
#include "engine.hpp"

namespace specache {

inline int64_t chunks_of(int64_t length, int64_t chunk) { return (length + chunk - 1) / chunk; }
inline int64_t padded(int64_t x) { return (x + kTile - 1) / kTile * kTile; }

// Queries of one KV head in batches of at most `per_pass`, of about equal size.
struct Batches {
    int queries, count, size;
    Batches(int queries, int per_pass) : queries(queries) {
        count = (queries + per_pass - 1) / per_pass;
        size = (queries + count - 1) / count;
    }
    int first(int64_t batch) const { return int(batch) * size; }
    int length(int64_t batch) const { return std::min(size, queries - first(batch)); }
};

// Memory for one call. The thread keeps it for its next call: fresh memory costs a page fault every
// 4 KB.
class Block {
public:
    explicit Block(size_t size) {
        auto& kept = blocks();
        for (size_t i = 0; i < kept.size(); i++)
            if (kept[i].size >= size && kept[i].size < 4 * size + 65536) {
                held_ = kept[i];
                kept[i] = kept.back();
                kept.pop_back();
                return;
            }
        held_.size = (size + 4095) / 4096 * 4096;
        held_.data = std::aligned_alloc(64, held_.size);
        if (!held_.data) throw std::bad_alloc();
    }
    Block(const Block&) = delete;
    ~Block() {
        auto& kept = blocks();
        if (kept.size() == kKept) {
            std::free(kept.front().data);
            kept.erase(kept.begin());
        }
        kept.push_back(held_);
    }
    void* data() { return held_.data; }

private:
    struct Memory {
        void* data = nullptr;
        size_t size = 0;
    };
    struct Kept : std::vector<Memory> {
        ~Kept() {
            for (Memory& memory : *this) std::free(memory.data);
        }
    };
    static constexpr size_t kKept = 24;  // more than a step holds
    static Kept& blocks() {
        thread_local Kept kept;
        return kept;
    }
    Memory held_;
};

template <class T>
class Buffer {
public:
    explicit Buffer(int64_t size) : block_(size_t(std::max<int64_t>(size, 1)) * sizeof(T)) {}
    T* get() { return static_cast<T*>(block_.data()); }
    T& operator[](int64_t i) { return get()[i]; }

private:
    Block block_;
};

// The queries of all heads as float32, padded with zeros to whole blocks, then rounded.
class Queries {
public:
    Queries(const Engine& engine, const Step& step)
        : step_(step), batches(step.queries(), engine.kernels->queries_per_pass), stride_(padded(step.layout->dim)),
          copies_(stride_ != step.layout->dim || step.query.dtype != Dtype::f32),
          copied_(copies_ ? step.heads() * step.queries() * stride_ : 0), prepared_(step.heads() * batches.count) {}

    const float* at(int64_t head, int query) {
        if (!copies_) return reinterpret_cast<const float*>(step_.place(step_.query, head, query));
        return copied_.get() + (head * step_.queries() + query) * stride_;
    }

    void pad(int64_t head) {
        if (!copies_) return;
        const int dim = step_.layout->dim;
        for (int j = 0; j < step_.queries(); j++) {
            float* to = copied_.get() + (head * step_.queries() + j) * stride_;
            widen(step_.place(step_.query, head, j), step_.query.dtype, dim, to);
            std::fill(to + dim, to + stride_, 0.0f);
        }
    }

    // Fill `pointers` with the queries of a batch. Return their number.
    int batch(int64_t head, int64_t batch, const float** pointers) {
        for (int j = 0; j < batches.length(batch); j++) pointers[j] = at(head, batches.first(batch) + j);
        return batches.length(batch);
    }

    void prepare(const Engine& engine, int64_t head) {
        pad(head);
        if (!step_.low_bit_of(head).length) return;  // key scales do not exist yet either
        const float* weights = step_.low_bit_of(head).weights;
        if (weights) weights += int64_t(step_.head_of(head)) * step_.layout->dim;
        for (int64_t i = 0; i < batches.count; i++) {
            const float* pointers[kMaxQueries];
            int count = batch(head, i, pointers);
            engine.kernels->prepare(*step_.layout, weights, pointers, count, &prepared(head, i));
        }
    }

    PreparedQuery& prepared(int64_t head, int64_t batch) { return prepared_[head * batches.count + batch]; }

private:
    const Step& step_;

public:
    const Batches batches;

private:
    int64_t stride_;
    bool copies_;
    Buffer<float> copied_;
    Buffer<PreparedQuery> prepared_;
};

inline int64_t longest(const Step& step) {
    int64_t length = 0;
    for (const LowBitKV& low_bit_kv : step.low_bit_kvs) length = std::max(length, low_bit_kv.length);
    return length;
}

// Partial results of the tasks of an attention, to be joined in order.
class Partials {
public:
    Partials(const Step& step, const Batches& batches, int64_t tasks)
        : queries_(batches.size), stride_(padded(step.layout->dim)), out_(tasks * queries_ * stride_), numbers_(tasks * 2 * queries_) {}
    Partial at(int64_t task) {
        float* numbers = numbers_.get() + task * 2 * queries_;
        return {out_.get() + task * queries_ * stride_, numbers, numbers + queries_, int(stride_)};
    }

private:
    int64_t queries_, stride_;
    Buffer<float> out_, numbers_;
};

// Join partial sums by their log-sum-exp into out [dim], normalised. Return the log-sum-exp. `sink`
// takes probability and has no value.
inline float join(Partial* parts, const int* query, int64_t count, int dim, float sink, float* out) {
    float peak = sink;
    for (int64_t i = 0; i < count; i++) peak = std::max(peak, parts[i].peak[query[i]]);
    std::fill(out, out + dim, 0.0f);
    if (peak == -INFINITY) return -INFINITY;
    float total = std::exp(sink - peak);
    for (int64_t i = 0; i < count; i++) {
        float weight = std::exp(parts[i].peak[query[i]] - peak);
        if (weight == 0.0f || parts[i].total[query[i]] == 0.0f) continue;
        total += weight * parts[i].total[query[i]];
        const float* part = parts[i].out + query[i] * parts[i].stride;
        for (int d = 0; d < dim; d++) out[d] += weight * part[d];
    }
    for (int d = 0; d < dim; d++) out[d] /= total;
    return peak + std::log(total);
}

}  // namespace specache
