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

    // The result of a submitted read: what it was submitted with, and the bytes read, or an error below
    // 0.
    struct Result {
        uint32_t tag, index;
        int32_t bytes;
    };

    // Submit reads with numbers `index` and following, beside those that are running. Return how many
    // the kernel took, which are the first. Where these are fewer than `count`, it may take more once
    // results have been collected.
    unsigned submit(const Read* reads, unsigned count, uint32_t tag, uint32_t index);
    unsigned running() const { return running_; }
    // Append the results that are there, each of which is returned once.
    void collect(std::vector<Result>& results);
    // Wait for a result. A read must be running.
    void wait() { wait_for(1); }

    // The same for one batch at a time, of at most `entries` reads. They must not change until `end`;
    // no others may be running.
    unsigned begin(const Read* reads, unsigned count);
    // Return whether all submitted reads have completed.
    bool ended() const { return results_there() == running_; }
    // Wait for all submitted reads. Return false if one failed or was short.
    bool end();

    // Submit reads and wait for all of them. Return false if one failed or was short.
    bool read(const std::vector<Read>& reads);

private:
    void unmap();
    unsigned results_there() const;
    void wait_for(unsigned results);

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
