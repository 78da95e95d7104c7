#include "threads.hpp"

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <pthread.h>
#endif

namespace specache {
namespace {

constexpr int kSpins = 4000;  // about 20 microseconds before a thread sleeps or yields

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#if !defined(_OPENMP)
class Pool {
public:
    void run(int threads, Team& team, const std::function<void(Worker&)>& body) {
        std::lock_guard<std::mutex> one_region(region_);
        while (int(workers_.size()) < threads - 1) {
            int id = int(workers_.size()) + 1;
            workers_.emplace_back([this, id] { work(id); });
            workers_.back().detach();  // they end with the process
        }
        team_ = &team, body_ = &body;
        busy_.store(threads - 1);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            wanted_ = threads;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        Worker worker(team, 0);
        body(worker);
        while (busy_.load()) pause();
    }

private:
    void work(int id) {
        for (uint64_t seen = 0;;) {
            for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; i++) pause();
            int wanted;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                wanted = wanted_;
            }
            if (id >= wanted) continue;
            Worker worker(*team_, id);
            (*body_)(worker);
            busy_.fetch_sub(1);
        }
    }

    std::mutex region_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> busy_{0};
    int wanted_ = 0;
    Team* team_ = nullptr;
    const std::function<void(Worker&)>* body_ = nullptr;
};

Pool* the_pool = nullptr;  // never destroyed: its threads may outlive static objects
std::mutex creation;

Pool& pool() {
    std::lock_guard<std::mutex> guard(creation);
    if (!the_pool) {
        the_pool = new Pool;
        static bool registered = false;  // a forked child has none of its parent's threads
        if (!registered) pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr, new (&creation) std::mutex; });
        registered = true;
    }
    return *the_pool;
}
#endif

}  // namespace

void Team::wait(int64_t phase) {
    if (threads_ > 1 && arrived_.fetch_add(1, std::memory_order_acq_rel) < threads_ - 1) {
        for (int i = 0; finished_.load(std::memory_order_acquire) <= phase; i++) {
            pause();
            if (i > kSpins) std::this_thread::yield();
        }
        return;
    }
    for (int t = 0; t < threads_; t++) next_[(phase + 2) % kSlots * threads_ + t].value.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    finished_.store(phase + 1, std::memory_order_release);
}

void Team::fail() noexcept {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true);
}

void parallel(int threads, const std::function<void(Worker&)>& body) {
    threads = threads < 1 ? 1 : threads;
    Team team(threads);
    if (threads == 1) {
        Worker worker(team, 0);
        body(worker);
    } else {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            team.threads_ = omp_get_num_threads();  // it may give fewer
            Worker worker(team, omp_get_thread_num());
            body(worker);
        }
#else
        pool().run(threads, team, body);
#endif
    }
    if (team.error_) std::rethrow_exception(team.error_);
}

void* scratch(size_t size) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < size) {
        std::free(buffer.data);
        buffer.size = (size + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace specache
