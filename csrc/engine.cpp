#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <cstdlib>
#include <memory>

#include "threads.hpp"

namespace specache {
namespace {

constexpr int64_t kScoreChunk = 2048;  // tokens of a task; whole pages, and the same for any number of threads

int64_t chunks_of(int64_t length, int64_t chunk) { return (length + chunk - 1) / chunk; }
int64_t padded(int64_t x) { return (x + kTile - 1) / kTile * kTile; }

// Queries of one KV head in batches of at most kMaxQueries, about equal.
struct Batches {
    int queries, count, size;
    explicit Batches(int queries) : queries(queries) {
        count = (queries + kMaxQueries - 1) / kMaxQueries;
        size = (queries + count - 1) / count;
    }
    int first(int64_t batch) const { return int(batch) * size; }
    int length(int64_t batch) const { return std::min(size, queries - first(batch)); }
};

// Memory of one call. The thread keeps it for its next call: fresh memory costs a page fault every 4 KB.
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

// The queries of all heads: padded with zeros to whole blocks, then rounded.
class Queries {
public:
    explicit Queries(const Step& step)
        : step_(step), batches(step.queries()), stride_(padded(step.layout->dim)),
          copied_(stride_ == step.layout->dim ? 0 : step.heads() * step.queries() * stride_),
          prepared_(step.heads() * batches.count) {}

    const float* at(int64_t head, int query) {
        if (stride_ == step_.layout->dim) return step_.query + (head * step_.queries() + query) * stride_;
        return copied_.get() + (head * step_.queries() + query) * stride_;
    }

    void pad(int64_t head) {
        int dim = step_.layout->dim;
        if (stride_ == dim) return;
        for (int j = 0; j < step_.queries(); j++) {
            float* to = copied_.get() + (head * step_.queries() + j) * stride_;
            std::memset(to, 0, size_t(stride_) * sizeof(float));
            std::memcpy(to, step_.query + (head * step_.queries() + j) * dim, size_t(dim) * sizeof(float));
        }
    }

    // Fills `pointers` with the queries of a batch.
    int batch(int64_t head, int64_t batch, const float** pointers) {
        for (int j = 0; j < batches.length(batch); j++) pointers[j] = at(head, batches.first(batch) + j);
        return batches.length(batch);
    }

    void prepare(const Engine& engine, int64_t head) {
        pad(head);
        if (!step_.copy_of(head).length) return;  // not even key weights yet
        const float* weights = step_.copy_of(head).weights;
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
    Buffer<float> copied_;
    Buffer<PreparedQuery> prepared_;
};

// Tasks (head, chunk of tokens, batch) of a step, with as many chunks for each as the longest sequence has.
struct Tasks {
    int64_t heads, batches, chunks;
    int64_t count() const { return heads * batches * chunks; }
    int64_t head(int64_t i) const { return i / (batches * chunks); }
    int64_t chunk(int64_t i) const { return i / batches % chunks; }
    int64_t batch(int64_t i) const { return i % batches; }  // those of a chunk one after the other: its codes are in the cache
    int64_t index(int64_t head, int64_t batch, int64_t chunk) const { return (head * chunks + chunk) * batches + batch; }
};

int64_t longest(const Step& step) {
    int64_t length = 0;
    for (const Copy& copy : step.copies) length = std::max(length, copy.length);
    return length;
}

void score_task(const Engine& engine, const Step& step, Queries& queries, int64_t head, int64_t batch, int64_t chunk, float* scores,
                int64_t size) {
    const Copy& copy = step.copy_of(head);
    int64_t first = chunk * kScoreChunk, stop = std::min(first + kScoreChunk, size), count = std::min(stop, copy.length) - first;
    float* out[kMaxQueries];
    for (int j = 0; j < queries.batches.length(batch); j++) {
        out[j] = scores + (head * step.queries() + queries.batches.first(batch) + j) * size;
        for (int64_t t = std::max(first, copy.length); t < stop; t++) out[j][t] = -INFINITY;
    }
    if (count > 0)
        engine.kernels->score(*step.layout, copy, step.head_of(head), queries.prepared(head, batch), first, count, step.scaling,
                              step.softcap, out);
}

// Row `row` of head `head`: its G score rows.
void score_rows(const Step& step, float* scores, int64_t size, int64_t head, int row, float** out) {
    for (int g = 0; g < step.groups; g++) out[g] = scores + (head * step.queries() + g * step.rows + row) * size;
}

void select_task(const Engine& engine, const Step& step, float* scores, int64_t size, const float* rest_lse, int64_t k,
                 int64_t* positions, int64_t head, int row) {
    int64_t length = std::min(step.copy_of(head).length, size);
    std::vector<float*> of_group(size_t(step.groups));
    std::vector<float> rest(size_t(step.groups));
    score_rows(step, scores, size, head, row, of_group.data());
    for (int g = 0; g < step.groups; g++) rest[size_t(g)] = rest_lse[head * step.queries() + g * step.rows + row];
    int64_t floats = 3 * padded(length) + kTile;
    auto* mass = static_cast<float*>(scratch(size_t(floats + length + kTile) * 4));
    engine.kernels->select(of_group.data(), rest.data(), step.groups, length, k, positions + (head * step.rows + row) * k, mass,
                           reinterpret_cast<int32_t*>(mass + floats));
}

void rescore_task(const Engine& engine, const Step& step, Queries& queries, const int64_t* positions, int64_t k, const Rows& rows,
                  float* scores, int64_t size, int64_t head, int row) {
    std::vector<float*> of_group(size_t(step.groups));
    std::vector<const float*> query(size_t(step.groups));
    score_rows(step, scores, size, head, row, of_group.data());
    for (int g = 0; g < step.groups; g++) query[size_t(g)] = queries.at(head, g * step.rows + row);
    engine.kernels->rescore(query.data(), step.groups, step.layout->dim, rows, row, positions + (head * step.rows + row) * k, k,
                            step.scaling, step.softcap, of_group.data());
}

// What the tasks of an attention found, to be joined in order.
class Partials {
public:
    Partials(const Step& step, int64_t tasks) : stride_(padded(step.layout->dim)), out_(tasks * kMaxQueries * stride_), numbers_(tasks * 2 * kMaxQueries) {}
    Partial at(int64_t task) {
        float* numbers = numbers_.get() + task * 2 * kMaxQueries;
        return {out_.get() + task * kMaxQueries * stride_, numbers, numbers + kMaxQueries, int(stride_)};
    }

private:
    int64_t stride_;
    Buffer<float> out_, numbers_;
};

void attend_task(const Engine& engine, const Step& step, const Batches& batches, const int64_t* positions, int64_t k,
                 const Rows& rows, const float* scores, int64_t size, int64_t head, int64_t batch, int64_t chunk, Partial out) {
    const Copy& copy = step.copy_of(head);
    int count = batches.length(batch);
    int64_t first = chunk * kAttendChunk, tokens = std::min<int64_t>(kAttendChunk, std::min(copy.length, size) - first);
    if (tokens <= 0) {
        for (int j = 0; j < count; j++) out.peak[j] = -INFINITY, out.total[j] = 0.0f;
        return;
    }
    const float* of_query[kMaxQueries];
    int row_of[kMaxQueries];
    for (int j = 0; j < count; j++) {
        int query = batches.first(batch) + j;
        of_query[j] = scores + (head * step.queries() + query) * size;
        row_of[j] = query % step.rows;
    }
    std::vector<const int64_t*> of_row(size_t(step.rows));
    for (int row = 0; row < step.rows; row++) of_row[size_t(row)] = positions + (head * step.rows + row) * k;
    auto* weights = static_cast<float*>(scratch(size_t(kMaxQueries) * (kAttendChunk + kPage) * sizeof(float)));
    engine.kernels->attend(*step.layout, copy, step.head_of(head), first, tokens, of_query, count, row_of, of_row.data(), k, rows,
                           weights, out);
}

// Join partial sums by their log-sum-exp: out [dim] normalised -> lse; `sink` takes probability and has no value.
float join(Partial* parts, const int* query, int64_t count, int dim, float sink, float* out) {
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

}  // namespace

void score(const Engine& engine, const Step& step, float* scores, int64_t size) {
    Queries queries(step);
    Tasks tasks{step.heads(), queries.batches.count, chunks_of(size, kScoreChunk)};
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(step.heads(), [&](int64_t head) { queries.prepare(engine, head); });
        worker.each(tasks.count(), [&](int64_t i) {
            score_task(engine, step, queries, tasks.head(i), tasks.batch(i), tasks.chunk(i), scores, size);
        });
    });
}

void select(const Engine& engine, const Step& step, const float* scores, int64_t size, const float* rest_lse, int64_t k,
            int64_t* positions) {
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(step.heads() * step.rows, [&](int64_t i) {
            select_task(engine, step, const_cast<float*>(scores), size, rest_lse, k, positions, i / step.rows, int(i % step.rows));
        });
    });
}

void rescore(const Engine& engine, const Step& step, const Fetched& fetched, float* scores, int64_t size) {
    Queries queries(step);
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(step.heads(), [&](int64_t head) {
            queries.pad(head);
            for (int row = 0; row < step.rows; row++)
                rescore_task(engine, step, queries, fetched.positions, fetched.k, fetched.rows[size_t(head)], scores, size, head, row);
        });
    });
}

void attend(const Engine& engine, const Step& step, const Fetched& fetched, const float* scores, int64_t size, float* out, float* lse) {
    Batches batches(step.queries());
    Tasks tasks{step.heads(), batches.count, std::max<int64_t>(1, chunks_of(size, kAttendChunk))};
    Partials partials(step, tasks.count());
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(tasks.count(), [&](int64_t i) {
            attend_task(engine, step, batches, fetched.positions, fetched.k, fetched.rows[size_t(tasks.head(i))], scores, size,
                        tasks.head(i), tasks.batch(i), tasks.chunk(i), partials.at(i));
        });
        worker.each(step.heads() * step.queries(), [&](int64_t i) {
            int64_t head = i / step.queries();
            int query = int(i % step.queries()), batch = query / batches.size;
            std::vector<Partial> parts;
            for (int64_t c = 0; c < tasks.chunks; c++) parts.push_back(partials.at(tasks.index(head, batch, c)));
            std::vector<int> place(parts.size(), query - batches.first(batch));
            lse[i] = join(parts.data(), place.data(), tasks.chunks, step.layout->dim, -INFINITY, out + i * step.layout->dim);
        });
    });
}

namespace {

// Bytes of weights that are worked on at a time, per thread: what a second-level cache holds beside the codes that pass through.
constexpr int64_t kWaveBytes = 512 << 10;

}  // namespace

// KV heads go through a step in one call a few at a time (a wave), so that their weights stay in the caches between phases; in two calls
// all of them wait for their rows.
class LayerStep::State {
public:
    State(const Engine& engine, Step step, const std::vector<Recent>& recents, int64_t k, const float* sinks, bool whole)
        : engine_(engine), kernels_(*engine.kernels), step_(std::move(step)), layout_(*step_.layout), recents_(recents), sinks_(sinks),
          size_((longest(step_) + kPage - 1) / kPage * kPage), k_(std::min(k, longest(step_))), count_(step_.queries()),
          stretches_(chunks_of(size_, kStretch)), chunks_(chunks_of(size_, kAttendChunk)), wave_(whole ? step_.heads() : heads_together()),
          per_top_(kernels_.blocks_per_top(size_, k_)), tops_(chunks_ * (kAttendChunk / kStretch) * tops_of_stretch()), queries_(step_),
          row_batches_(step_.groups), recent_parts_(step_, step_.heads() * queries_.batches.count),
          copy_parts_(step_, wave_ * queries_.batches.count * chunks_), exact_parts_(step_, wave_ * step_.rows * row_batches_.count),
          weights_(wave_ * count_ * size_), peaks_(wave_ * count_ * stretches_), totals_(wave_ * count_ * stretches_),
          factors_(wave_ * count_ * stretches_), mass_(wave_ * step_.rows * size_), top_values_(wave_ * step_.rows * tops_),
          rest_lse_(step_.heads() * count_), positions_(wave_ * step_.rows * k_) {}

    void run(const std::vector<Rows>& stored, float* out) {
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { attend_recent(head); });
            for (int64_t first = 0; first < step_.heads(); first += wave_) {
                if (k_) choose(worker, first);
                attend_wave(worker, first, stored, positions_.get(), k_, out);
            }
        });
    }

    void select(int64_t k, int64_t* positions) {
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { attend_recent(head); });
            if (k_) choose(worker, 0);
        });
        for (int64_t i = 0; i < step_.heads() * step_.rows; i++) {
            std::copy_n(positions_.get() + i * k_, k_, positions + i * k);
            std::fill(positions + i * k + k_, positions + (i + 1) * k, -1);
        }
    }

    void attend(const Fetched& fetched, float* out) {
        parallel(engine_.threads, [&](Worker& worker) { attend_wave(worker, 0, fetched.rows, fetched.positions, fetched.k, out); });
    }

private:
    int64_t wave_heads(int64_t first) const { return std::min(wave_, step_.heads() - first); }

    void choose(Worker& worker, int64_t first) {
        const int64_t heads = wave_heads(first), batches = queries_.batches.count, rows = step_.rows;
        worker.each(heads * stretches_ * batches,
                    [&](int64_t i) { weigh(first, i / (stretches_ * batches), i / batches % stretches_, i % batches); });
        worker.each(heads * count_, [&](int64_t i) { normalise(first, i / count_, int(i % count_)); });
        worker.each(heads * chunks_ * rows, [&](int64_t i) { add_mass(first, i / (chunks_ * rows), i / rows % chunks_, int(i % rows)); });
        worker.each(heads * rows, [&](int64_t i) { pick(first, i / rows, int(i % rows)); });
    }

    // positions [heads of the wave, n, k]
    void attend_wave(Worker& worker, int64_t first, const std::vector<Rows>& stored, const int64_t* positions, int64_t k, float* out) {
        const int64_t heads = wave_heads(first), batches = queries_.batches.count, rows = step_.rows;
        if (k_) {
            worker.each(heads * rows, [&](int64_t i) {
                attend_exactly(first, i / rows, int(i % rows), stored[size_t(first + i / rows)], positions + i * k, k);
            });
            worker.each(heads * chunks_ * batches,
                        [&](int64_t i) { attend_copy(first, i / (chunks_ * batches), i / batches % chunks_, i % batches); });
        }
        worker.each(heads * batches, [&](int64_t i) { finish(first, i / batches, i % batches, out); });
    }

    int64_t heads_together() const {
        int64_t fit = engine_.threads * kWaveBytes / std::max<int64_t>(1, count_ * size_ * int64_t(sizeof(float)));
        return std::min(step_.heads(), std::max<int64_t>(engine_.threads, fit));
    }
    int64_t tops_of_stretch() const { return chunks_of(kStretch / kTile, per_top_) * kTile; }

    float sink(int64_t head, int query) const {
        return sinks_ ? sinks_[step_.head_of(head) * step_.groups + query / step_.rows] : -INFINITY;
    }
    // `slot`: a head's place in the wave.
    float* weights(int64_t slot, int query) { return weights_.get() + (slot * count_ + query) * size_; }
    float* of_stretches(Buffer<float>& numbers, int64_t slot, int query) { return numbers.get() + (slot * count_ + query) * stretches_; }
    float* tops(int64_t slot, int row) { return top_values_.get() + (slot * step_.rows + row) * tops_; }
    Partial copy_part(int64_t slot, int64_t chunk, int64_t batch) {
        return copy_parts_.at((slot * chunks_ + chunk) * queries_.batches.count + batch);
    }
    Partial exact_part(int64_t slot, int row, int64_t batch) { return exact_parts_.at((slot * step_.rows + row) * row_batches_.count + batch); }
    Partial recent_part(int64_t head, int64_t batch) { return recent_parts_.at(head * queries_.batches.count + batch); }

    void attend_recent(int64_t head) {
        queries_.prepare(engine_, head);
        const Recent& recent = recents_[size_t(head / layout_.heads)];
        const int64_t offset = step_.head_of(head) * recent.head_stride;
        for (int64_t batch = 0; batch < queries_.batches.count; batch++) {
            const float* pointers[kMaxQueries];
            int64_t seen[kMaxQueries];
            int count = queries_.batch(head, batch, pointers);
            for (int j = 0; j < count; j++)  // an earlier row does not see the tokens of later ones
                seen[j] = std::max<int64_t>(0, recent.count - (step_.rows - 1 - (queries_.batches.first(batch) + j) % step_.rows));
            Partial part = recent_part(head, batch);
            auto* held = static_cast<float*>(scratch(size_t(kMaxQueries) * size_t(recent.count + kTile) * sizeof(float)));
            kernels_.exact(pointers, count, layout_.dim, recent.keys + offset, recent.values + offset, recent.token_stride,
                           recent.token_stride, recent.count, seen, recent.dtype, step_.scaling, step_.softcap, held, part);
            for (int j = 0; j < count; j++) {
                int query = queries_.batches.first(batch) + j;
                rest_lse_[head * count_ + query] = log_add(part.peak[j] + std::log(part.total[j]), sink(head, query));
            }
        }
    }

    void weigh(int64_t first, int64_t slot, int64_t stretch, int64_t batch) {
        const Copy& copy = step_.copy_of(first + slot);
        const int64_t start = stretch * kStretch, tokens = std::min<int64_t>(kStretch, copy.length - start);
        float *out[kMaxQueries], peak[kMaxQueries], total[kMaxQueries];
        const int low = queries_.batches.first(batch), count = queries_.batches.length(batch);
        for (int j = 0; j < count; j++) out[j] = weights(slot, low + j), peak[j] = -INFINITY, total[j] = 0.0f;
        if (tokens > 0)
            kernels_.weigh(layout_, copy, step_.head_of(first + slot), queries_.prepared(first + slot, batch), start, tokens,
                           step_.scaling, step_.softcap, out, peak, total);
        for (int j = 0; j < count; j++) {
            of_stretches(peaks_, slot, low + j)[stretch] = peak[j];
            of_stretches(totals_, slot, low + j)[stretch] = total[j];
        }
    }

    // What turns a stretch's weights into shares of the mean probability over a KV head's queries.
    void normalise(int64_t first, int64_t slot, int query) {
        const float *peak = of_stretches(peaks_, slot, query), *total = of_stretches(totals_, slot, query);
        float all = rest_lse_[(first + slot) * count_ + query], *factor = of_stretches(factors_, slot, query);
        for (int64_t s = 0; s < stretches_; s++)
            if (total[s] > 0.0f) all = log_add(all, peak[s] + std::log(total[s]));
        for (int64_t s = 0; s < stretches_; s++) factor[s] = std::exp(peak[s] - all) / float(step_.groups);
    }

    void add_mass(int64_t first, int64_t slot, int64_t chunk, int row) {
        const int64_t length = step_.copy_of(first + slot).length;
        float* mass = mass_.get() + (slot * step_.rows + row) * size_;
        std::vector<const float*> of_group(size_t(step_.groups));
        std::vector<float> factor(size_t(step_.groups));
        for (int g = 0; g < step_.groups; g++) of_group[size_t(g)] = weights(slot, g * step_.rows + row);
        for (int64_t i = 0; i < kAttendChunk / kStretch; i++) {
            const int64_t stretch = chunk * (kAttendChunk / kStretch) + i, start = stretch * kStretch;
            float* top = tops(slot, row) + stretch * tops_of_stretch();
            std::fill(top, top + tops_of_stretch(), -INFINITY);
            if (start >= length) continue;
            for (int g = 0; g < step_.groups; g++) factor[size_t(g)] = of_stretches(factors_, slot, g * step_.rows + row)[stretch];
            kernels_.add_mass(of_group.data(), factor.data(), step_.groups, start, std::min<int64_t>(kStretch, length - start), per_top_,
                              mass, top);
        }
    }

    void pick(int64_t first, int64_t slot, int row) {
        const int64_t length = step_.copy_of(first + slot).length;
        int64_t* chosen = positions_.get() + (slot * step_.rows + row) * k_;
        auto* held = static_cast<float*>(scratch(size_t(padded(length)) * (sizeof(float) + sizeof(int32_t))));
        kernels_.pick(mass_.get() + (slot * step_.rows + row) * size_, length, tops(slot, row), tops_, k_, chosen, held,
                      reinterpret_cast<int32_t*>(held + padded(length)));
    }

    // Attend to the exact rows of those of `positions` [k] that are there, and take these tokens out of the copy.
    void attend_exactly(int64_t first, int64_t slot, int row, const Rows& rows, const int64_t* positions, int64_t k) {
        auto* held = static_cast<int64_t*>(scratch(size_t(k) * 2 * sizeof(int64_t) + size_t(kMaxQueries) * size_t(k + kTile) * sizeof(float)));
        int64_t *chosen = held, *slots = held + k, count = 0;
        for (int64_t i = 0; i < k; i++)
            if (positions[i] >= 0) chosen[count] = positions[i], slots[count] = i, count++;
        for (int64_t batch = 0; batch < row_batches_.count; batch++) {
            const float* query[kMaxQueries];
            for (int j = 0; j < row_batches_.length(batch); j++) {
                int number = (row_batches_.first(batch) + j) * step_.rows + row;
                query[j] = queries_.at(first + slot, number);
                for (int64_t i = 0; i < count; i++) weights(slot, number)[chosen[i]] = 0.0f;
            }
            kernels_.exact_rows(query, row_batches_.length(batch), layout_.dim, rows, row, chosen, slots, count, step_.scaling,
                                step_.softcap, reinterpret_cast<float*>(held + 2 * k), exact_part(slot, row, batch));
        }
    }

    void attend_copy(int64_t first, int64_t slot, int64_t chunk, int64_t batch) {
        const Copy& copy = step_.copy_of(first + slot);
        const int64_t start = chunk * kAttendChunk, tokens = std::min<int64_t>(kAttendChunk, copy.length - start);
        const int low = queries_.batches.first(batch), count = queries_.batches.length(batch);
        Partial part = copy_part(slot, chunk, batch);
        const float *of_query[kMaxQueries], *peaks[kMaxQueries];
        for (int j = 0; j < count; j++) {
            of_query[j] = weights(slot, low + j), peaks[j] = of_stretches(peaks_, slot, low + j);
            part.peak[j] = -INFINITY, part.total[j] = 0.0f;
        }
        if (tokens > 0)
            kernels_.attend_weighed(layout_, copy, step_.head_of(first + slot), start, tokens, of_query, count, peaks, part);
        else
            std::fill(part.out, part.out + count * part.stride, 0.0f);
    }

    // Join what the chunks of the copy, the exact rows and the recent tokens give.
    void finish(int64_t first, int64_t slot, int64_t batch, float* out) {
        const int64_t head = first + slot;
        const int count = queries_.batches.length(batch), low = queries_.batches.first(batch);
        Partial copy = copy_part(slot, 0, batch);
        if (k_) {
            for (int64_t chunk = 1; chunk < chunks_; chunk++)
                for (int j = 0; j < count; j++) add(copy_part(slot, chunk, batch), copy, j);
            kernels_.rotate_back(layout_, count, copy);
        }
        for (int j = 0; j < count; j++) {
            const int query = low + j, group = query / step_.rows;
            Partial parts[] = {recent_part(head, batch), copy, exact_part(slot, query % step_.rows, group / row_batches_.size)};
            const int place[] = {j, j, group % row_batches_.size};
            join(parts, place, k_ ? 3 : 1, layout_.dim, sink(head, query), out + (head * count_ + query) * layout_.dim);
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
    const int64_t size_, k_, count_, stretches_, chunks_, wave_, per_top_, tops_;
    Queries queries_;
    const Batches row_batches_;
    Partials recent_parts_, copy_parts_, exact_parts_;
    Buffer<float> weights_, peaks_, totals_, factors_, mass_, top_values_, rest_lse_;
    Buffer<int64_t> positions_;
};

void decode(const Engine& engine, const Step& step, const std::vector<Recent>& recents, const std::vector<Rows>& rows, int64_t k,
            const float* sinks, float* out) {
    LayerStep::State(engine, step, recents, k, sinks, false).run(rows, out);
}

LayerStep::LayerStep(const Engine& engine, Step step, const std::vector<Recent>& recents, int64_t k, const float* sinks)
    : state_(new State(engine, std::move(step), recents, k, sinks, true)), k_(k) {}
LayerStep::~LayerStep() = default;
void LayerStep::select(int64_t* positions) { state_->select(k_, positions); }
void LayerStep::attend(const Fetched& fetched, float* out) { state_->attend(fetched, out); }

void quantise(const Engine& engine, const Layout& layout, const Copy& copy, const Prompt& prompt, int64_t start, int64_t count) {
    int64_t first_page = start / kPage, pages = (start + count + kPage - 1) / kPage - first_page;
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(pages * layout.heads, [&](int64_t i) {
            int head = int(i % layout.heads);
            int64_t page = first_page + i / layout.heads, low = std::max(start, page * kPage);
            int64_t stop = std::min(start + count, (page + 1) * kPage), token = low - start;
            auto* held = static_cast<float*>(scratch(size_t(kMaxDim) * kPage * (sizeof(float) + 1)));
            engine.kernels->quantise(layout, copy.weights ? copy.weights + int64_t(head) * layout.dim : nullptr, head,
                                     const_cast<uint8_t*>(copy.pages[page]), int(low - page * kPage), int(stop - low),
                                     prompt.keys + head * prompt.key_head_stride + token * prompt.key_token_stride,
                                     prompt.values + head * prompt.value_head_stride + token * prompt.value_token_stride,
                                     prompt.key_token_stride, prompt.value_token_stride, prompt.dtype, held);
        });
    });
}

}  // namespace specache
