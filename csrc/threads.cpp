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

constexpr int kSpins = 4000;  // some 20 microseconds before a thread sleeps or yields

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
    void run(int threads, const std::function<void(Team&, int)>& body) {
        std::lock_guard<std::mutex> one_region(region_);
        while (int(workers_.size()) < threads - 1) {
            int id = int(workers_.size()) + 1;
            workers_.emplace_back([this, id] { work(id); });
            workers_.back().detach();  // they end with the process
        }
        Team team(threads);
        team_ = &team, body_ = &body;
        busy_.store(threads - 1);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            wanted_ = threads;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        body(team, 0);
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
            (*body_)(*team_, id);
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
    const std::function<void(Team&, int)>* body_ = nullptr;
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

void Team::wait(int phase) {
    arrived_[phase].fetch_add(1, std::memory_order_acq_rel);
    for (int i = 0; arrived_[phase].load(std::memory_order_acquire) < threads_; i++) {
        pause();
        if (i > kSpins) std::this_thread::yield();
    }
}

void parallel(int threads, const std::function<void(Team&, int)>& body) {
    if (threads <= 1) {
        Team team(1);
        body(team, 0);
        return;
    }
#if defined(_OPENMP)
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.threads_ = omp_get_num_threads();  // it may give fewer
        body(team, omp_get_thread_num());
    }
#else
    pool().run(threads, body);
#endif
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
