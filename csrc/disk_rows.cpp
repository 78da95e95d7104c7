#include "disk_rows.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace specache {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

void DiskRows::use(std::shared_ptr<const StoredRowFiles> files, const QueueRules& rules, uint8_t* tail, int64_t tail_head,
                   int64_t tail_token, int64_t on_disk) {
    if (files && (files->view().words * 8 != hot_.row_bytes() || files->view().heads != hot_.heads()))
        throw std::invalid_argument("rows of another layer");
    files_ = std::move(files), rules_ = rules, tail_ = tail, tail_head_ = tail_head, tail_token_ = tail_token, on_disk_ = on_disk;
}

bool DiskRows::begin(const int64_t* heads, const int64_t* positions, int64_t count) {
    std::vector<int64_t> file_heads, file_positions;
    reserved_of_.clear();
    const auto& reserved = hot_.reserved();
    for (int64_t i = 0; i < count; i++) {
        if (positions[i] < on_disk_) {
            file_heads.push_back(heads[i]), file_positions.push_back(positions[i]), reserved_of_.push_back(size_t(i));
        } else {
            const auto [head, slot] = reserved[size_t(i)];
            std::memcpy(hot_.row(head, slot), tail_row(head, positions[i]), size_t(hot_.row_bytes()));
        }
    }
    counts_.rows += count;
    if (reserved_of_.empty()) return true;
    collect();
    now_ = flight(reads_->queue.begin(files_, rules_, file_heads.data(), file_positions.data(), int64_t(file_heads.size())));
    if (!now_.batch) {
        hot_.forget_reserved();
        return false;
    }
    return true;
}

bool DiskRows::finish() {
    bool good = true;
    if (now_.batch) {
        const Time asked = Clock::now();
        end(now_);
        const auto& reserved = hot_.reserved();
        good = now_.batch->rows([&](const Row& row, const uint64_t* words) {
            const auto [head, slot] = reserved[reserved_of_[size_t(row.index)]];
            std::memcpy(hot_.row(head, slot), words, size_t(hot_.row_bytes()));
        });
        now_.batch.reset();
        const double waited = seconds(Clock::now() - asked);
        counts_.waits++, counts_.wait_s += waited, counts_.read_s += waited;
    }
    if (good)
        hot_.keep_reserved();
    else
        hot_.forget_reserved();
    return good;
}

void DiskRows::begin_ahead(const int64_t* positions, int64_t k) {
    hot_.step++;  // rows of the next step take precedence over those of this one
    const int64_t pairs = hot_.heads() * k;
    std::vector<int64_t> heads(static_cast<size_t>(pairs)), tokens(static_cast<size_t>(pairs));
    ahead_positions_.resize(size_t(pairs));
    hot_.missing(positions, k, ahead_positions_.data(), heads.data(), tokens.data());
    ahead_of_.clear(), of_tail_.clear(), tail_rows_.clear();
    size_t count = 0, files = 0;
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t position = ahead_positions_[size_t(i)];
        if (position < 0) continue;
        if (position < on_disk_) {
            heads[files] = i / k, tokens[files] = position, files++;
            ahead_of_.push_back(count);
        } else {
            const uint8_t* row = tail_row(i / k, position);
            tail_rows_.insert(tail_rows_.end(), row, row + hot_.row_bytes());
            of_tail_.push_back(count);
        }
        count++;
    }
    if (files) {
        // a disk that is slower than the steps: no more memory than for a few layers' rows
        while (!reads_->ahead.empty() && reads_->queue.held_bytes() > rules_.most_bytes / 2) reads_->ahead.front()->store_ahead();
        ahead_ = flight(reads_->queue.begin(files_, rules_, heads.data(), tokens.data(), int64_t(files)));
        if (!ahead_.batch) return;
        reads_->ahead.push_back(this);
    }
    has_ahead_ = count > 0;
    counts_.rows += int64_t(count);
}

bool DiskRows::finish_ahead() {
    if (has_ahead_) store_ahead();
    return failed_.empty();
}

void DiskRows::cancel() {
    if (now_.batch) hot_.forget_reserved();  // else it may be someone else's
    now_.batch.reset();
    leave_ahead();
    ahead_.batch.reset();
    has_ahead_ = false;
    failed_.clear();
}

DiskRows::Flight DiskRows::flight(std::unique_ptr<RowBatch> batch) {
    const Time now = Clock::now();
    return {std::move(batch), now, now};
}

// Note which reads have ended, and store what was read ahead. Its order is that of the layers.
void DiskRows::collect() {
    reads_->queue.collect();
    while (!reads_->ahead.empty() && reads_->ahead.front()->ahead_.batch->ended()) reads_->ahead.front()->store_ahead();
    const Time now = Clock::now();
    for (DiskRows* other : reads_->ahead) other->ahead_.seen_running = now;
}

// Wait for a flight, and count for how long it was seen running before.
void DiskRows::end(Flight& flight) {
    reads_->queue.collect();
    if (!flight.batch->ended()) flight.seen_running = Clock::now();
    counts_.read_s += seconds(flight.seen_running - flight.begun);
    reads_->queue.wait(*flight.batch);
}

// Store what was fetched ahead. It may be long before the layer's next step.
void DiskRows::store_ahead() {
    const Time asked = Clock::now();
    has_ahead_ = false;
    if (ahead_.batch) {
        counts_.waits += !ahead_.batch->ended();
        end(ahead_);
        leave_ahead();
    }
    const std::unique_ptr<RowBatch> batch = std::move(ahead_.batch);
    std::vector<int64_t> slots(ahead_positions_.size());
    hot_.reserve_all(ahead_positions_.data(), int64_t(ahead_positions_.size()) / hot_.heads(), slots.data());
    const auto& reserved = hot_.reserved();
    const auto store = [&](size_t number, const void* row) {
        const auto [head, slot] = reserved[number];
        if (slot >= 0) std::memcpy(hot_.row(head, slot), row, size_t(hot_.row_bytes()));
    };
    for (size_t i = 0; i < of_tail_.size(); i++) store(of_tail_[i], tail_rows_.data() + i * size_t(hot_.row_bytes()));
    if (!batch || batch->rows([&](const Row& row, const uint64_t* words) { store(ahead_of_[size_t(row.index)], words); })) {
        for (const auto& [head, slot] : reserved)
            if (slot >= 0) hot_.mark_ahead(head, slot);
        hot_.keep_reserved();
    } else {
        hot_.forget_reserved();
        failed_ = ahead_positions_;
    }
    const double waited = seconds(Clock::now() - asked);
    counts_.wait_s += waited, counts_.read_s += waited;
}

void DiskRows::leave_ahead() {
    auto& all = reads_->ahead;
    all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

}  // namespace specache
