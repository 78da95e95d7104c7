// The part of Linux's io_uring that batches of reads need. For one thread at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace specache {

struct Read {
    int fd;
    int64_t offset;
    uint8_t* into;
    uint32_t length;
};

class Ring {
public:
    explicit Ring(unsigned entries);  // throws std::runtime_error where the kernel lacks or forbids it
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Submit reads, which must not change until `end`; none may be running. Return how many the
    // kernel took.
    unsigned begin(const Read* reads, unsigned count);
    // Return whether all submitted reads have completed.
    bool ended() const;
    // Wait for all submitted reads. Return false if one failed or was short.
    bool end();

    // Submit reads and wait for all of them. Return false if one failed or was short.
    bool read(const std::vector<Read>& reads);

private:
    void unmap();

    int fd_ = -1;
    unsigned entries_ = 0, results_ = 0;
    uint8_t* rings_ = nullptr;
    uint8_t* requests_ = nullptr;
    uint64_t rings_bytes_ = 0, requests_bytes_ = 0;
    uint32_t *request_head_ = nullptr, *request_tail_ = nullptr, *result_head_ = nullptr, *result_tail_ = nullptr;
    uint8_t* result_list_ = nullptr;
    const Read* reads_ = nullptr;
    unsigned running_ = 0;  // submitted reads whose results were not collected yet
};

}  // namespace specache
