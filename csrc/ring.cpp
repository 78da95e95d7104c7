#include "ring.hpp"

#include <algorithm>
#include <stdexcept>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace specache {

Ring::Ring(unsigned entries) {
    io_uring_params params{};
    fd_ = int(syscall(SYS_io_uring_setup, entries, &params));
    if (fd_ < 0) throw std::runtime_error("io_uring cannot be had");
    rings_bytes_ = std::max<uint64_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                      params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    requests_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    const auto map = [&](uint64_t size, off_t offset) {
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, offset);
        return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
    };
    if (params.features & IORING_FEAT_SINGLE_MMAP) {
        rings_ = map(rings_bytes_, IORING_OFF_SQ_RING);
        requests_ = map(requests_bytes_, IORING_OFF_SQES);
    }
    if (!rings_ || !requests_) {
        unmap();
        throw std::runtime_error("io_uring cannot be had");
    }
    entries_ = params.sq_entries, results_ = params.cq_entries;
    request_head_ = reinterpret_cast<uint32_t*>(rings_ + params.sq_off.head);
    request_tail_ = reinterpret_cast<uint32_t*>(rings_ + params.sq_off.tail);
    result_head_ = reinterpret_cast<uint32_t*>(rings_ + params.cq_off.head);
    result_tail_ = reinterpret_cast<uint32_t*>(rings_ + params.cq_off.tail);
    result_list_ = rings_ + params.cq_off.cqes;
    auto* order = reinterpret_cast<uint32_t*>(rings_ + params.sq_off.array);
    for (uint32_t i = 0; i < entries_; i++) order[i] = i;
}

Ring::~Ring() { unmap(); }

void Ring::unmap() {
    if (requests_) munmap(requests_, requests_bytes_);
    if (rings_) munmap(rings_, rings_bytes_);
    if (fd_ >= 0) close(fd_);
}

bool Ring::read(const std::vector<Read>& reads) {
    bool good = true;
    for (size_t first = 0; good && first < reads.size();) {
        const unsigned taken = begin(reads.data() + first, unsigned(std::min<size_t>(entries_, reads.size() - first)));
        good = end() && taken > 0;
        first += taken;
    }
    return good;
}

unsigned Ring::begin(const Read* reads, unsigned count) {
    reads_ = reads;
    return submit(reads, std::min(count, entries_), 0, 0);
}

unsigned Ring::submit(const Read* reads, unsigned count, uint32_t tag, uint32_t index) {
    auto* requests = reinterpret_cast<io_uring_sqe*>(requests_);
    count = std::min(count, results_ - running_);  // every result must have a place
    unsigned taken = 0;
    while (taken < count) {
        const unsigned more = std::min(count - taken, entries_);
        const uint32_t tail = *request_tail_;
        for (unsigned i = 0; i < more; i++) {
            const Read& read = reads[taken + i];
            io_uring_sqe& request = requests[(tail + i) % entries_];
            std::memset(&request, 0, sizeof request);
            request.opcode = IORING_OP_READ;
            request.fd = read.fd;
            request.off = uint64_t(read.offset);
            request.addr = reinterpret_cast<uint64_t>(read.into);
            request.len = read.length;
            request.user_data = uint64_t(tag) << 32 | (index + taken + i);
        }
        __atomic_store_n(request_tail_, tail + more, __ATOMIC_RELEASE);
        unsigned of_these = 0;
        while (of_these < more) {
            const long took = syscall(SYS_io_uring_enter, fd_, more - of_these, 0, 0, nullptr, 0);
            if (took > 0)
                of_these += unsigned(took);
            else if (took == 0 || errno != EINTR)
                break;
        }
        taken += of_these, running_ += of_these;
        if (of_these < more) {  // what it did not take, it shall not take later
            __atomic_store_n(request_tail_, __atomic_load_n(request_head_, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
            break;
        }
    }
    return taken;
}

unsigned Ring::results_there() const { return __atomic_load_n(result_tail_, __ATOMIC_ACQUIRE) - *result_head_; }

void Ring::wait_for(unsigned results) {
    while (results_there() < results) syscall(SYS_io_uring_enter, fd_, 0, results, IORING_ENTER_GETEVENTS, nullptr, 0);
}

void Ring::collect(std::vector<Result>& results) {
    const auto* there = reinterpret_cast<const io_uring_cqe*>(result_list_);
    const uint32_t head = *result_head_, count = results_there();
    for (uint32_t i = head; i != head + count; i++) {
        const io_uring_cqe& result = there[i % results_];
        results.push_back({uint32_t(result.user_data >> 32), uint32_t(result.user_data), result.res});
    }
    __atomic_store_n(result_head_, head + count, __ATOMIC_RELEASE);
    running_ -= count;
}

bool Ring::end() {
    wait_for(running_);
    std::vector<Result> results;
    collect(results);
    bool good = true;
    for (const Result& result : results) good = good && result.bytes >= 0 && uint32_t(result.bytes) == reads_[result.index].length;
    return good;
}

}  // namespace specache
#else
namespace specache {

Ring::Ring(unsigned) { throw std::runtime_error("this system has no io_uring"); }
Ring::~Ring() = default;
void Ring::unmap() {}
bool Ring::read(const std::vector<Read>&) { return false; }
unsigned Ring::begin(const Read*, unsigned) { return 0; }
unsigned Ring::submit(const Read*, unsigned, uint32_t, uint32_t) { return 0; }
unsigned Ring::results_there() const { return 0; }
void Ring::wait_for(unsigned) {}
void Ring::collect(std::vector<Result>&) {}
bool Ring::end() { return false; }

}  // namespace specache
#endif
