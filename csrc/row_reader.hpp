// Read scattered 16-bit rows from files: one call plans, reads, checks and copies, without the
// Python interpreter. The layout is declared in specache/tiers/disk/row_layout.py.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "row_plan.hpp"

namespace specache {

class RowReader;

// Rows whose read `RowReader::begin` started; the kernel reads them without a thread of ours. Files
// may be closed meanwhile. The destructor waits for the reads; free the buffer only afterwards.
class RowsInFlight {
public:
    struct State;
    explicit RowsInFlight(std::unique_ptr<State> state);
    ~RowsInFlight();
    RowsInFlight(const RowsInFlight&) = delete;
    RowsInFlight& operator=(const RowsInFlight&) = delete;

    bool arrived() const;
    // Wait for the rows and copy them to `out` [count, words]. Call it once. Returns false as
    // `gather` does.
    bool take(uint64_t* out);

private:
    std::unique_ptr<State> state_;
};

// Reads through io_uring from any number of threads, each with its own ring. Throws
// std::runtime_error where io_uring is not available.
class RowReader {
public:
    explicit RowReader(unsigned entries);
    ~RowReader();
    RowReader(const RowReader&) = delete;
    RowReader& operator=(const RowReader&) = delete;

    // Read the rows of `count` (head, token) pairs to `out` [count, words]. `buffer`: aligned
    // memory of `size` bytes. Returns false on a short read, a wrong checksum or a missing ring:
    // the caller then reads in a way that reports the cause.
    bool gather(const RowFiles& files, const ReadRules& rules, const int64_t* heads, const int64_t* positions, int64_t count,
                uint8_t* buffer, int64_t size, uint64_t* out);

    // Perform reads that nothing checks. Returns false on a failed or short read, or a missing ring:
    // the caller then repeats all of them in a way that reports the cause.
    bool read(const std::vector<Read>& reads);

    // Start the same read as `gather` without waiting. The reader must outlive the result. Returns null, with
    // nothing started, where the reads exceed the ring or the buffer, or `most` reads are in flight
    // already.
    std::unique_ptr<RowsInFlight> begin(const RowFiles& files, const ReadRules& rules, const int64_t* heads, const int64_t* positions,
                                        int64_t count, uint8_t* buffer, int64_t size, int most);

private:
    friend struct RowsInFlight::State;
    std::unique_ptr<Ring> take();
    void give(std::unique_ptr<Ring> ring);

    unsigned entries_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Ring>> idle_;
    std::atomic<int> in_flight_{0};
};

}  // namespace specache
