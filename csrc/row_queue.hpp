// Reads of rows under way, of all layers of one sequence, through one ring. For one thread at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "ring.hpp"
#include "row_plan.hpp"

namespace specache {

// A `RowFiles` that owns what it points to.
class StoredRowFiles {
public:
    StoredRowFiles(std::vector<int64_t> starts, std::vector<int64_t> shifts, std::vector<int64_t> fds, std::vector<uint64_t> salts,
                   std::vector<uint64_t> multipliers, const RowFiles& sizes);
    StoredRowFiles(const StoredRowFiles&) = delete;
    StoredRowFiles& operator=(const StoredRowFiles&) = delete;
    const RowFiles& view() const { return view_; }

private:
    std::vector<int64_t> starts_, shifts_, fds_;
    std::vector<uint64_t> salts_, multipliers_;
    RowFiles view_;
};

class RowQueue;

// Rows that are being read together. The destructor waits for the reads.
class RowBatch {
public:
    RowBatch(RowQueue& queue, std::shared_ptr<const StoredRowFiles> files) : queue_(queue), files_(std::move(files)) {}
    ~RowBatch();
    RowBatch(const RowBatch&) = delete;
    RowBatch& operator=(const RowBatch&) = delete;

    // Whether all reads have ended, as far as the queue has collected results.
    bool ended() const { return running_ == 0; }
    // Call `take(row, words)` for every row, after all reads have ended. Return false if a read or a
    // checksum failed; some rows may have been taken then.
    template <class Take>
    bool rows(const Take& take) const {
        return good_ && take_rows(spans_, rows_, files_->view(), buffer_, take);
    }

private:
    friend class RowQueue;
    RowQueue& queue_;
    std::shared_ptr<const StoredRowFiles> files_;
    std::vector<Row> rows_;
    std::vector<Span> spans_;
    std::vector<Read> reads_;
    uint8_t* buffer_ = nullptr;
    int64_t buffer_bytes_ = 0;
    uint32_t tag_ = 0;
    unsigned running_ = 0;
    bool good_ = true;
};

// How a batch is read.
struct QueueRules {
    ReadRules reads;
    int64_t most_bytes;  // of a batch's buffer
};

// Throws std::runtime_error where the kernel lacks or forbids io_uring. Outlives its batches.
class RowQueue {
public:
    explicit RowQueue(unsigned entries);
    ~RowQueue();
    RowQueue(const RowQueue&) = delete;
    RowQueue& operator=(const RowQueue&) = delete;

    // Start to read rows of `count` (head, token) pairs. Return null where their reads do not fit a
    // buffer or the kernel does not take them; nothing is running then.
    std::unique_ptr<RowBatch> begin(std::shared_ptr<const StoredRowFiles> files, const QueueRules& rules, const int64_t* heads,
                                    const int64_t* positions, int64_t count);
    // Collect the results that are there.
    void collect();
    // Wait until all of a batch's reads have ended. In a forked process they count as failed.
    void wait(RowBatch& batch);
    // Bytes of the buffers of all batches.
    int64_t held_bytes() const { return held_bytes_; }
    // False in a forked process, which shares the ring with its parent and leaves it alone.
    bool is_ours() const;

private:
    friend class RowBatch;
    bool plan(RowBatch& batch, const QueueRules& rules);
    void take_buffer(RowBatch& batch, int64_t size);
    void release(RowBatch& batch);

    Ring ring_;
    long process_;
    std::vector<RowBatch*> batches_;  // by tag, null where a tag is free
    std::vector<Ring::Result> results_;
    struct Memory {
        uint8_t* data;
        int64_t bytes;
    };
    std::vector<Memory> free_;  // buffers for the next batches
    int64_t held_bytes_ = 0;
};

}  // namespace specache
