// One layer's rows on a disk, on their way into its hot set. For one thread at a time.
#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "hot_set.hpp"
#include "row_queue.hpp"

namespace specache {

class DiskRows;

// The reads of one sequence: those of a step, and those ahead of the next one, oldest first.
struct DiskReads {
    explicit DiskReads(unsigned entries) : queue(entries) {}
    RowQueue queue;
    std::vector<DiskRows*> ahead;  // layers whose rows for the next step are being read
};

// What reading cost, in seconds of `specache/tiers/base.py`: Fetch.
struct ReadCounts {
    int64_t rows = 0, waits = 0;
    double read_s = 0.0, wait_s = 0.0;
};

class DiskRows {
public:
    // The hot set must outlive it.
    DiskRows(std::shared_ptr<DiskReads> reads, HotSet& hot) : reads_(std::move(reads)), hot_(hot) {}
    ~DiskRows() { cancel(); }
    DiskRows(const DiskRows&) = delete;
    DiskRows& operator=(const DiskRows&) = delete;

    // Where the rows are from now on: tokens [0, on_disk) in files, those behind them in memory, in
    // `tail` [Hkv, 64, 2 D] (strides in bytes).
    void use(std::shared_ptr<const StoredRowFiles> files, const QueueRules& rules, uint8_t* tail, int64_t tail_head, int64_t tail_token,
             int64_t on_disk);
    HotSet& hot() { return hot_; }
    int64_t on_disk() const { return on_disk_; }
    uint8_t* tail_row(int64_t head, int64_t position) const { return tail_ + head * tail_head_ + (position - on_disk_) * tail_token_; }

    // Start to fetch what the hot set has reserved, `count` (head, position) pairs in the order of the
    // reservation. Return false where the reads cannot be started: the reservation is undone then.
    bool begin(const int64_t* heads, const int64_t* positions, int64_t count);
    // Wait for these rows and store them. Return false if a read failed: the reservation is undone then.
    bool finish();

    // Begin to fetch those of positions [heads, k] that the hot set lacks, for the next step, which the
    // hot set counts from now on. Where that cannot be started, the next step fetches them.
    void begin_ahead(const int64_t* positions, int64_t k);
    // Wait for these rows and store them. Return false if a read failed, also where `collect` stored
    // them: `failed` then has their positions.
    bool finish_ahead();
    // Whether rows are read that `finish_ahead` has not stored.
    bool reading_ahead() const { return bool(ahead_.batch); }
    // The positions [heads, k] that `finish_ahead` failed to read, -1 elsewhere; k.
    const std::vector<int64_t>& failed() const { return failed_; }

    // Drop what is being fetched. Return when no read is running.
    void cancel();
    // Return what was counted since the last call.
    ReadCounts take_counts() { return std::exchange(counts_, {}); }

private:
    using Time = std::chrono::steady_clock::time_point;
    struct Flight {
        std::unique_ptr<RowBatch> batch;
        Time begun, seen_running;  // the kernel does not say when a read ended
    };

    static Flight flight(std::unique_ptr<RowBatch> batch);
    void collect();
    void end(Flight& flight);
    void store_ahead();
    void leave_ahead();

    const std::shared_ptr<DiskReads> reads_;
    HotSet& hot_;
    std::shared_ptr<const StoredRowFiles> files_;
    QueueRules rules_{};
    uint8_t* tail_ = nullptr;
    int64_t tail_head_ = 0, tail_token_ = 0, on_disk_ = 0;
    Flight now_, ahead_;
    std::vector<std::size_t> reserved_of_;  // of the rows of `now_`: their number in the reservation
    bool has_ahead_ = false;
    std::vector<int64_t> ahead_positions_, failed_;   // [heads, k]
    std::vector<std::size_t> ahead_of_, of_tail_;      // of the rows of `ahead_`, and of those of the tail: their number in the reservation
    std::vector<uint8_t> tail_rows_;                   // copied at once: the tail moves on
    ReadCounts counts_;
};

}  // namespace specache
