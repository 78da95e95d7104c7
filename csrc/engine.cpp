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
    static constexpr size_t kKept = 12;
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
    int64_t floats = 2 * padded(length) + kTile;
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
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, step.heads(), [&](int64_t head) { queries.prepare(engine, head); });
        team.each(1, tasks.count(), [&](int64_t i) {
            score_task(engine, step, queries, tasks.head(i), tasks.batch(i), tasks.chunk(i), scores, size);
        });
    });
}

void select(const Engine& engine, const Step& step, const float* scores, int64_t size, const float* rest_lse, int64_t k,
            int64_t* positions) {
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, step.heads() * step.rows, [&](int64_t i) {
            select_task(engine, step, const_cast<float*>(scores), size, rest_lse, k, positions, i / step.rows, int(i % step.rows));
        });
    });
}

void rescore(const Engine& engine, const Step& step, const Fetched& fetched, float* scores, int64_t size) {
    Queries queries(step);
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, step.heads(), [&](int64_t head) {
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
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, tasks.count(), [&](int64_t i) {
            attend_task(engine, step, batches, fetched.positions, fetched.k, fetched.rows[size_t(tasks.head(i))], scores, size,
                        tasks.head(i), tasks.batch(i), tasks.chunk(i), partials.at(i));
        });
        team.each(1, step.heads() * step.queries(), [&](int64_t i) {
            int64_t head = i / step.queries();
            int query = int(i % step.queries()), batch = query / batches.size;
            std::vector<Partial> parts;
            for (int64_t c = 0; c < tasks.chunks; c++) parts.push_back(partials.at(tasks.index(head, batch, c)));
            std::vector<int> place(parts.size(), query - batches.first(batch));
            lse[i] = join(parts.data(), place.data(), tasks.chunks, step.layout->dim, -INFINITY, out + i * step.layout->dim);
        });
    });
}

void decode(const Engine& engine, const Step& step, const std::vector<Recent>& recents, const std::vector<Rows>& rows, int64_t k,
            const float* sinks, float* out) {
    const Layout& layout = *step.layout;
    const int64_t size = longest(step), heads = step.heads();
    k = std::min(k, size);
    Queries queries(step);
    const Batches& batches = queries.batches;
    Tasks scoring{heads, batches.count, chunks_of(size, kScoreChunk)};
    Tasks attending{heads, batches.count, chunks_of(size, kAttendChunk)};
    Partials copy_parts(step, attending.count()), recent_parts(step, heads * batches.count);
    Buffer<float> scores(heads * step.queries() * size), rest_lse(heads * step.queries());
    Buffer<int64_t> positions(heads * k);
    auto sink_of = [&](int64_t head, int query) {
        return sinks ? sinks[step.head_of(head) * step.groups + query] : -INFINITY;
    };
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, heads, [&](int64_t head) {
            queries.prepare(engine, head);
            const Recent& recent = recents[size_t(head / layout.heads)];
            for (int64_t b = 0; b < batches.count; b++) {
                const float* pointers[kMaxQueries];
                int count = queries.batch(head, b, pointers);
                Partial part = recent_parts.at(head * batches.count + b);
                auto* held = static_cast<float*>(scratch(size_t(kMaxQueries) * size_t(recent.count + kTile) * sizeof(float)));
                int64_t offset = step.head_of(head) * recent.head_stride;
                engine.kernels->exact(pointers, count, layout.dim, recent.keys + offset, recent.values + offset, recent.token_stride,
                                      recent.token_stride, recent.count, recent.dtype, step.scaling, step.softcap, held, part);
                for (int j = 0; j < count; j++) {
                    int query = batches.first(b) + j;
                    float lse = part.peak[j] + std::log(part.total[j]), sink = sink_of(head, query), most = std::max(lse, sink);
                    rest_lse[head * step.queries() + query] =
                        sink == -INFINITY ? lse : most + std::log(std::exp(lse - most) + std::exp(sink - most));
                }
            }
        });
        team.each(1, scoring.count(), [&](int64_t i) {
            score_task(engine, step, queries, scoring.head(i), scoring.batch(i), scoring.chunk(i), scores.get(), size);
        });
        team.each(2, heads, [&](int64_t head) {
            if (!k) return;
            select_task(engine, step, scores.get(), size, rest_lse.get(), k, positions.get(), head, 0);
            rescore_task(engine, step, queries, positions.get(), k, rows[size_t(head)], scores.get(), size, head, 0);
        });
        team.each(3, attending.count(), [&](int64_t i) {
            attend_task(engine, step, batches, positions.get(), k, rows[size_t(attending.head(i))], scores.get(), size,
                        attending.head(i), attending.batch(i), attending.chunk(i), copy_parts.at(i));
        });
        team.each(4, heads * step.queries(), [&](int64_t i) {
            int64_t head = i / step.queries();
            int query = int(i % step.queries()), batch = query / batches.size;
            std::vector<Partial> parts;
            for (int64_t c = 0; c < attending.chunks; c++) parts.push_back(copy_parts.at(attending.index(head, batch, c)));
            parts.push_back(recent_parts.at(head * batches.count + batch));
            std::vector<int> place(parts.size(), query - batches.first(batch));
            join(parts.data(), place.data(), int64_t(parts.size()), layout.dim, sink_of(head, query), out + i * layout.dim);
        });
    });
}

void quantise(const Engine& engine, const Layout& layout, const Copy& copy, const Prompt& prompt, int64_t start, int64_t count) {
    int64_t first_page = start / kPage, pages = (start + count + kPage - 1) / kPage - first_page;
    parallel(engine.threads, [&](Team& team, int) {
        team.each(0, pages * layout.heads, [&](int64_t i) {
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
