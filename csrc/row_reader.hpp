// Scattered 16-bit rows from files, past the interpreter: one call plans, reads, checks and copies (layout: specache/tiers/disk/row_layout.py).
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace specache {

// Where a layer's blocks lie, and what its rows are checked with. `runs` neighbouring blocks of a file each.
struct RowFiles {
    const int64_t* starts;   // first block of the sequence, ascending
    const int64_t* shifts;   // from a block of the sequence to one of the file
    const int64_t* fds;
    const uint64_t* salts;   // [runs, heads]
    int64_t runs, heads;
    int64_t block_bytes, stride, words;  // of a row without its checksum: `words` 64-bit words
    const uint64_t* multipliers;         // [words]
    uint64_t position_salt, block_salt;
};

// How reads are made of rows.
struct ReadRules {
    int64_t alignment;  // of offsets and lengths
    int64_t gap;        // nearer rows share a read
    int64_t split;      // longest read
};

class Ring;
class RowReader;

// Rows that are being read since `RowReader::begin`, by nobody else's thread. Files may be closed meanwhile; the buffer may go when this
// is gone, which waits for the reads.
class RowsInFlight {
public:
    struct State;
    explicit RowsInFlight(std::unique_ptr<State> state);
    ~RowsInFlight();
    RowsInFlight(const RowsInFlight&) = delete;
    RowsInFlight& operator=(const RowsInFlight&) = delete;

    bool arrived() const;
    // Wait for them, once -> to `out` [count, words]; false as from `gather`.
    bool take(uint64_t* out);

private:
    std::unique_ptr<State> state_;
};

// Reads through io_uring; any number of threads at a time, each with a ring of its own. Throws std::runtime_error where there is none.
class RowReader {
public:
    explicit RowReader(unsigned entries);
    ~RowReader();
    RowReader(const RowReader&) = delete;
    RowReader& operator=(const RowReader&) = delete;

    // Rows of `count` (head, token) pairs to `out` [count, words]. `buffer` is aligned memory of `size` bytes.
    // False if anything is not as it should be (a short read, a wrong checksum, no ring): the caller asks again in a way that says what.
    bool gather(const RowFiles& files, const ReadRules& rules, const int64_t* heads, const int64_t* positions, int64_t count,
                uint8_t* buffer, int64_t size, uint64_t* out);

    // The same without waiting; the reader must outlive what is returned. Null, and nothing runs, where the reads are more than the
    // kernel takes at once, or the buffer, and where `most` are in flight already.
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
