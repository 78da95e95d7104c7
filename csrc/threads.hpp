// Parallel regions in phases with a barrier between them.
//
// With OpenMP the threads are PyTorch's own, whose runtime is loaded already: threads of ours would share the cores with its workers,
// which go on spinning for a while after every operation. Without it, a small pool of our own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace specache {

constexpr int kMaxPhases = 8;

// The threads of one region. Every thread calls `each` with the same phases in the same order.
class Team {
public:
    explicit Team(int threads) : threads_(threads) {
        for (auto& next : next_) next.store(0, std::memory_order_relaxed);
    }

    // Tasks 0 to count - 1, whoever is free takes the next; returns when all are done.
    template <class Task>
    void each(int phase, int64_t count, const Task& task) {
        for (int64_t i; (i = next_[phase].fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        if (threads_ > 1) wait(phase);
    }

private:
    void wait(int phase);
    friend void parallel(int, const std::function<void(Team&, int)>&);

    int threads_;
    std::atomic<int64_t> next_[kMaxPhases];
    std::atomic<int> arrived_[kMaxPhases] = {};
};

// Run body(team, thread) on `threads` threads, the caller's among them.
void parallel(int threads, const std::function<void(Team&, int)>& body);

// At least `size` bytes of the calling thread's own, aligned to 64, kept for its next call.
void* scratch(size_t size);

}  // namespace specache
