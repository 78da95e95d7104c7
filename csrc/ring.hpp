// Linux's io_uring, as far as batches of reads need it. One thread at a time.
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
    explicit Ring(unsigned entries);  // throws std::runtime_error where the kernel has none, or forbids it
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Hand over reads, which must stay as they are until `end`; none may be running -> how many the kernel took.
    unsigned begin(const Read* reads, unsigned count);
    // Whether all that were handed over have ended.
    bool ended() const;
    // Wait for them; false if one failed or came short. None is running any more when this returns.
    bool end();

    // Complete all reads; false if one failed or came short. None is running any more when this returns.
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
    unsigned running_ = 0;  // reads handed over, whose results were not looked at yet
};

}  // namespace specache
