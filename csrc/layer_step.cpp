// A layer of a step in one call, or in several around the fetching of rows.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "layer_tasks.hpp"

namespace specache {

// With `at_once` a few KV heads (a wave) go through all phases before the next, so that their
// weights stay in the caches. Otherwise all heads go through each phase, because all wait for their
// rows. The heads of a wave take turns within a phase: they are neighbours in every page.
class LayerStep::State : LayerTasks {
public:
    using LayerTasks::LayerTasks;
    using LayerTasks::rescore;
    using LayerTasks::select_next;

    int64_t next_k() const { return next_k_; }

    void run(const std::vector<Rows>& stored, float* out) {
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { queries_.prepare(engine_, head); });
            for (int64_t first = 0; first < step_.heads(); first += wave_) {
                score(worker, first);
                if (size_ && k_) choose(worker, first);
                attend_wave(worker, first, stored, positions_.get(), nullptr, out);
            }
        });
    }

    std::vector<CopyCounts> run(const std::vector<CopiedRows>& copied, int real, int64_t* next, float* out) {
        std::vector<CopyCounts> counts(size_t(step_.heads()));
        Buffer<int64_t> used(rows_of(wave_) * k_), slots(rows_of(wave_) * k_);
        std::vector<Rows> rows;
        for (int64_t head = 0; head < step_.heads(); head++) {
            const CopiedRows& of = copied[size_t(head / layout_.heads)];
            rows.push_back({of.hot->row(step_.head_of(head), 0), of.dtype, 0, of.hot->row_bytes()});
        }
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { queries_.prepare(engine_, head); });
            for (int64_t first = 0; first < step_.heads(); first += wave_) {
                score(worker, first);
                if (size_) {
                    if (k_) choose(worker, first);
                    worker.each(wave_heads(first), [&](int64_t slot) {
                        const int64_t head = first + slot, from = slot * step_.rows * k_;
                        copy_rows(copied[size_t(head / layout_.heads)], head, real, positions_.get() + from, used.get() + from,
                                  slots.get() + from, counts[size_t(head)]);
                    });
                }
                attend_wave(worker, first, rows, used.get(), slots.get(), out);
                if (next)
                    worker.each(wave_heads(first), [&](int64_t slot) {
                        const int64_t head = first + slot;
                        select_next(first, slot, next + head * next_k_);
                        copy_ahead(copied[size_t(head / layout_.heads)], head, next + head * next_k_, counts[size_t(head)]);
                    });
            }
        });
        if (next)
            for (const CopiedRows& of : copied) of.hot->step++;  // rows of the next step take precedence over those of this one
        return counts;
    }

    void score() {
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { queries_.prepare(engine_, head); });
            score(worker, 0);
        });
    }

    void rescore(const Fetched& fetched) {
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(rows_of(step_.heads()), [&](int64_t i) {
                const int64_t head = i / step_.rows;
                rescore(head, int(i % step_.rows), fetched.rows[size_t(head)], fetched.positions + i * fetched.k, fetched.k);
            });
        });
    }

    void select(int64_t* positions) {
        if (!k_) return;
        parallel(engine_.threads, [&](Worker& worker) { choose(worker, 0); });
        std::copy_n(positions_.get(), rows_of(step_.heads()) * k_, positions);
    }

    void select_next(int64_t* positions) {
        if (!next_k_) return;
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(step_.heads(), [&](int64_t head) { select_next(0, head, positions + head * next_k_); });
        });
    }

    // The phases of `attend_wave` that need no rows.
    void attend_low_bit(const int64_t* positions, int64_t k, const Meanwhile& meanwhile) {
        if (!size_) return meanwhile ? meanwhile() : void();
        parallel(engine_.threads, [&](Worker& worker) {
            worker.each(rows_of(step_.heads()), [&](int64_t i) { leave_out(i / step_.rows, int(i % step_.rows), positions + i * k, k); });
            attend_chunks(worker, 0, meanwhile);
            worker.each(batches_of(step_.heads()), [&](int64_t i) { add_chunks(i / batches_of(1), i % batches_of(1)); });
        });
    }

    void attend_fetched(const Fetched& fetched, float* out, const Meanwhile& meanwhile) {
        if (!size_ && meanwhile) meanwhile();
        parallel(engine_.threads, [&](Worker& worker) {
            if (size_)
                worker.each_and(meanwhile, rows_of(step_.heads()), [&](int64_t i) {
                    const int64_t head = i / step_.rows, *slots = fetched.slots ? fetched.slots + i * fetched.k : nullptr;
                    attend_exactly(0, head, int(i % step_.rows), fetched.rows[size_t(head)], fetched.positions + i * fetched.k, slots, fetched.k);
                });
            worker.each(batches_of(step_.heads()), [&](int64_t i) { finish(0, i / batches_of(1), i % batches_of(1), out); });
        });
    }

private:
    // Score a wave's heads. With the first wave, attend to the recent tokens of all heads.
    void score(Worker& worker, int64_t first) {
        const int64_t batches = queries_.batches.count, heads = wave_heads(first), recent = first ? 0 : step_.heads();
        worker.each(recent + stretches_ * heads * batches, [&](int64_t i) {
            if (i < recent) return attend_recent(i);  // these take longest
            i -= recent;
            exp_scores(first, i / batches % heads, i / (heads * batches), i % batches);
        });
    }

    void choose(Worker& worker, int64_t first) {
        const int64_t heads = wave_heads(first), rows = step_.rows;
        worker.each(heads * count_, [&](int64_t i) { normalise(first, i / count_, int(i % count_)); });
        worker.each(chunks_ * heads * rows,
                    [&](int64_t i) { add_mean_prob(first, i / rows % heads, i / (heads * rows), int(i % rows)); });
        worker.each(heads * rows, [&](int64_t i) { top_k(first, i / rows, int(i % rows)); });
    }

    // Which of two kinds of tasks task i is. Each thread's share of both has those of the first kind in
    // front.
    struct Part {
        bool second;
        int64_t index;
    };
    Part part_of(int64_t i, int64_t first, int64_t second) const {
        for (int64_t thread = 0; thread < engine_.threads; thread++) {
            const auto share = [&](int64_t count) { return count * (thread + 1) / engine_.threads - count * thread / engine_.threads; };
            if (i < share(first)) return {false, first * thread / engine_.threads + i};
            i -= share(first);
            if (i < share(second)) return {true, second * thread / engine_.threads + i};
            i -= share(second);
        }
        throw std::out_of_range("task");
    }

    // Ask for the rows of positions [k] (-1: none), which are scattered, at their `places` as of
    // `attend_exactly`.
    void ask_for(const Rows& rows, int row, const int64_t* positions, const int64_t* places) const {
        const int64_t bytes = 2 * int64_t(layout_.dim) * itemsize(rows.dtype);
        for (int64_t i = 0; i < k_; i++) {
            if (positions[i] < 0) continue;
            const uint8_t* from = rows.at(row, places ? places[i] : i, positions[i]);
            for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(from + d, 0, 2);
        }
    }

    // positions, slots: of the wave's heads, as in `Fetched`.
    void attend_wave(Worker& worker, int64_t first, const std::vector<Rows>& rows, const int64_t* positions, const int64_t* slots, float* out) {
        const int64_t heads = wave_heads(first);
        if (size_) {
            const auto of = [&](int64_t i) { return slots ? slots + i * k_ : nullptr; };
            worker.each(rows_of(heads), [&](int64_t i) {
                leave_out(i / step_.rows, int(i % step_.rows), positions + i * k_, k_);
                ask_for(rows[size_t(first + i / step_.rows)], int(i % step_.rows), positions + i * k_, of(i));
            });
            // Each thread begins with the rows that it asked for. A thread that is done early takes chunks of the
            // low-bit KV off another: those rows would be in the other's caches.
            const int64_t batches = batches_of(1), exact = rows_of(heads), chunks = chunks_ * heads * batches;
            worker.each(exact + chunks, [&](int64_t i) {
                const Part part = part_of(i, exact, chunks);
                if (part.second) return attend_chunk(first, part.index / batches % heads, part.index / (heads * batches), part.index % batches);
                const int64_t slot = part.index / step_.rows;
                attend_exactly(first, slot, int(part.index % step_.rows), rows[size_t(first + slot)], positions + part.index * k_, of(part.index), k_);
            });
        }
        worker.each(batches_of(heads), [&](int64_t i) {
            if (size_) add_chunks(i / batches_of(1), i % batches_of(1));
            finish(first, i / batches_of(1), i % batches_of(1), out);
        });
    }

    // Copy what the first `real` rows select of `selected` [n, k] and the hot set lacks. `used` and
    // `slots` [n, k]: the positions that each row gets, and where they are.
    void copy_rows(const CopiedRows& from, int64_t head, int real, const int64_t* selected, int64_t* used, int64_t* slots, CopyCounts& counts) {
        const int64_t all = step_.rows * k_, wanted = real * k_, step = from.hot->step;
        const int of = step_.head_of(head);
        counts.ready = from.hot->find(of, selected, wanted, step, slots);
        for (int64_t i = 0; i < wanted; i++) counts.selected += selected[i] >= 0;
        copy_missing(from, of, selected, wanted, step, slots, false, counts);
        from.hot->find(of, selected + wanted, all - wanted, step, slots + wanted);
        for (int64_t i = 0; i < all; i++) used[i] = slots[i] >= 0 ? selected[i] : -1;
    }

    // Copy positions [next_k] that the hot set lacks, for the next step.
    void copy_ahead(const CopiedRows& from, int64_t head, const int64_t* positions, CopyCounts& counts) {
        auto* slots = static_cast<int64_t*>(scratch(size_t(next_k_) * sizeof(int64_t)));
        const int of = step_.head_of(head);
        from.hot->find(of, positions, next_k_, from.hot->step + 1, slots);
        copy_missing(from, of, positions, next_k_, from.hot->step + 1, slots, true, counts);
    }

    // Copy the positions [count] whose slot is -1.
    void copy_missing(const CopiedRows& from, int head, const int64_t* positions, int64_t count, int64_t step, int64_t* slots, bool ahead,
                      CopyCounts& counts) {
        std::vector<int64_t> missing;
        for (int64_t i = 0; i < count; i++)
            if (positions[i] >= 0 && slots[i] < 0) missing.push_back(i);
        if (missing.empty()) return;
        const auto started = std::chrono::steady_clock::now();
        from.hot->reserve(head, positions, count, step, slots);
        for (int64_t i : missing) {  // rows are scattered: ask for all of them
            const uint8_t* row = from.stored.at(head, positions[i]);
            for (int64_t d = 0; d < from.hot->row_bytes(); d += 64) __builtin_prefetch(row + d);
        }
        for (int64_t i : missing) {
            if (slots[i] < 0) throw std::invalid_argument("a hot set without room for one step");
            if (ahead) from.hot->mark_ahead(head, slots[i]);
            std::memcpy(from.hot->row(head, slots[i]), from.stored.at(head, positions[i]), size_t(from.hot->row_bytes()));
        }
        counts.copied += int64_t(missing.size());
        counts.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count() /
                          double(std::min<int64_t>(engine_.threads, step_.heads()));
    }

    void attend_chunks(Worker& worker, int64_t first, const Meanwhile& meanwhile = {}) {
        const int64_t batches = batches_of(1), heads = wave_heads(first);
        worker.each_and(meanwhile, chunks_ * heads * batches,
                        [&](int64_t i) { attend_chunk(first, i / batches % heads, i / (heads * batches), i % batches); });
    }
};


LayerStep::LayerStep(const Engine& engine, Step step, const std::vector<Recent>& recents, const TopK& top_k, const float* sinks, bool at_once)
    : state_(new State(engine, std::move(step), recents, top_k, sinks, at_once)) {}
LayerStep::~LayerStep() = default;
void LayerStep::run(const std::vector<Rows>& stored, float* out) { state_->run(stored, out); }
std::vector<CopyCounts> LayerStep::run(const std::vector<CopiedRows>& copied, int real, int64_t* next, float* out) {
    return state_->run(copied, real, next, out);
}
void LayerStep::score() { state_->score(); }
void LayerStep::rescore(const Fetched& fetched) { state_->rescore(fetched); }
void LayerStep::select(int64_t* positions) { state_->select(positions); }
void LayerStep::select_next(int64_t* positions) { state_->select_next(positions); }
int64_t LayerStep::next_k() const { return state_->next_k(); }
void LayerStep::attend_low_bit(const int64_t* positions, int64_t k, const Meanwhile& meanwhile) {
    state_->attend_low_bit(positions, k, meanwhile);
}
void LayerStep::attend_fetched(const Fetched& fetched, float* out, const Meanwhile& meanwhile) {
    state_->attend_fetched(fetched, out, meanwhile);
}

}  // namespace specache
