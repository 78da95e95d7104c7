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
    for (size_t first = 0; first < reads.size(); first += entries_)
        good = some(reads.data() + first, unsigned(std::min<size_t>(entries_, reads.size() - first))) && good;
    return good;
}

bool Ring::some(const Read* reads, unsigned count) {
    auto* requests = reinterpret_cast<io_uring_sqe*>(requests_);
    const auto* results = reinterpret_cast<const io_uring_cqe*>(result_list_);
    uint32_t tail = *request_tail_;
    for (unsigned i = 0; i < count; i++, tail++) {
        io_uring_sqe& request = requests[tail % entries_];
        std::memset(&request, 0, sizeof request);
        request.opcode = IORING_OP_READ;
        request.fd = reads[i].fd;
        request.off = uint64_t(reads[i].offset);
        request.addr = reinterpret_cast<uint64_t>(reads[i].into);
        request.len = reads[i].length;
        request.user_data = i;
    }
    __atomic_store_n(request_tail_, tail, __ATOMIC_RELEASE);
    const uint32_t head = *result_head_;
    unsigned submitted = 0;
    bool refused = false;
    for (;;) {  // what the kernel took must end before we return: it writes into the caller's memory
        const unsigned awaited = refused ? submitted : count;
        const unsigned done = __atomic_load_n(result_tail_, __ATOMIC_ACQUIRE) - head;
        if (done == awaited) break;
        const long took = syscall(SYS_io_uring_enter, fd_, awaited - submitted, awaited, IORING_ENTER_GETEVENTS, nullptr, 0);
        if (took > 0) submitted += unsigned(took);
        const bool again = errno == EINTR || ((errno == EAGAIN || errno == EBUSY) && submitted > done);
        if (took < 0 && !again) refused = true;
    }
    bool good = !refused;
    const uint32_t end = __atomic_load_n(result_tail_, __ATOMIC_ACQUIRE);
    for (uint32_t i = head; i != end; i++) {
        const io_uring_cqe& result = results[i % results_];
        good = good && result.res >= 0 && uint32_t(result.res) == reads[result.user_data].length;
    }
    __atomic_store_n(result_head_, end, __ATOMIC_RELEASE);
    if (refused) __atomic_store_n(request_tail_, __atomic_load_n(request_head_, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    return good;
}

}  // namespace specache
#else
namespace specache {

Ring::Ring(unsigned) { throw std::runtime_error("this system has no io_uring"); }
Ring::~Ring() = default;
void Ring::unmap() {}
bool Ring::read(const std::vector<Read>&) { return false; }
bool Ring::some(const Read*, unsigned) { return false; }

}  // namespace specache
#endif
