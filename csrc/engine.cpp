#include "engine.hpp"

#include <algorithm>
#include <cmath>

#include "step.hpp"
#include "threads.hpp"

namespace specache {
namespace {

constexpr int64_t kScoreChunk = 2048;  // tokens of a task: whole pages, for any number of threads

// Tasks (head, chunk of tokens, batch) of a step. Each sequence has as many chunks as the longest
// one.
struct Tasks {
    int64_t heads, batches, chunks;
    int64_t count() const { return heads * batches * chunks; }
    int64_t head(int64_t i) const { return i / (batches * chunks); }
    int64_t chunk(int64_t i) const { return i / batches % chunks; }
    int64_t batch(int64_t i) const { return i % batches; }  // innermost: the chunk's codes stay in the cache
    int64_t index(int64_t head, int64_t batch, int64_t chunk) const { return (head * chunks + chunk) * batches + batch; }
};

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

// Point `out` to the G rows of scores of row `row` of head `head`.
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
    auto* mean_prob = static_cast<float*>(scratch(size_t(floats + length + kTile) * 4));
    engine.kernels->select(of_group.data(), rest.data(), step.groups, length, k, positions + (head * step.rows + row) * k,
                           mean_prob, reinterpret_cast<int32_t*>(mean_prob + floats));
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

}  // namespace

void score(const Engine& engine, const Step& step, float* scores, int64_t size) {
    Queries queries(engine, step);
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
    Queries queries(engine, step);
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(step.heads(), [&](int64_t head) {
            queries.pad(head);
            for (int row = 0; row < step.rows; row++)
                rescore_task(engine, step, queries, fetched.positions, fetched.k, fetched.rows[size_t(head)], scores, size, head, row);
        });
    });
}

void attend(const Engine& engine, const Step& step, const Fetched& fetched, const float* scores, int64_t size, float* out, float* lse) {
    Batches batches(step.queries(), engine.kernels->queries_per_pass);
    Tasks tasks{step.heads(), batches.count, std::max<int64_t>(1, chunks_of(size, kAttendChunk))};
    Partials partials(step, batches, tasks.count());
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
