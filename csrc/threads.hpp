// Parallel regions in phases with a barrier between them.
//
// With OpenMP, use PyTorch's threads, whose runtime is loaded already: other threads would compete
// with PyTorch's workers, which spin for a while after every operation. Without OpenMP, use a small
// pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace specache {

// The shared state of the threads of one region.
class Team {
public:
    explicit Team(int threads) : threads_(threads), next_(new Next[size_t(kSlots) * size_t(threads)]) {}

    int threads_;

private:
    friend class Worker;
    friend void parallel(int, const std::function<void(class Worker&)>&);

    // A phase's counters, one per thread. Three phases suffice: once all threads have reached the
    // end of a phase, no thread reads the counters of the phase before.
    static constexpr int kSlots = 3;
    struct alignas(64) Next {
        std::atomic<int64_t> value{0};
    };

    void wait(int64_t phase);
    void fail() noexcept;

    std::unique_ptr<Next[]> next_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> finished_{0};  // phases
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// One thread of a region. Every thread calls `each` for the same phases in the same order.
class Worker {
public:
    Worker(Team& team, int id) : team_(team), id_(id) {}

    // Run tasks 0 to count - 1. A thread first takes the tasks of its own share, so that its caches
    // hold what it wrote in the phase before, then those that other threads have left. Returns when
    // all tasks are done; after an exception the rest is skipped.
    template <class Task>
    void each(int64_t count, const Task& task) {
        const int threads = team_.threads_;
        for (int i = 0; i < threads; i++) {
            int owner = (id_ + i) % threads;
            int64_t start = count * owner / threads, size = count * (owner + 1) / threads - start;
            std::atomic<int64_t>& next = team_.next_[phase_ % Team::kSlots * threads + owner].value;
            for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < size;) {
                if (team_.failed_.load(std::memory_order_relaxed)) break;
                try {
                    task(start + t);
                } catch (...) {
                    team_.fail();
                }
            }
        }
        team_.wait(phase_++);
    }

    // The same, and `first` if there is one, which the caller's thread takes before its share.
    template <class Task>
    void each_and(const std::function<void()>& first, int64_t count, const Task& task) {
        const int64_t more = first ? 1 : 0;
        each(count + more, [&](int64_t i) {
            if (i < more)
                first();
            else
                task(i - more);
        });
    }

private:
    Team& team_;
    int id_;
    int64_t phase_ = 0;
};

// Run body on `threads` threads, including the caller's. Rethrows a task's exception.
void parallel(int threads, const std::function<void(Worker&)>& body);

// Return at least `size` bytes of thread-local memory, aligned to 64, kept for the thread's next
// call.
void* scratch(size_t size);

}  // namespace specache
