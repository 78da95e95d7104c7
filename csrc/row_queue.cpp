#include "row_queue.hpp"

#include <algorithm>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace specache {
namespace {

constexpr int64_t kBufferUnit = 64 << 10;  // bytes; sizes are rounded up, so that a buffer also fits a slightly larger batch
constexpr size_t kBufferAlignment = 4096;
constexpr size_t kKeptBuffers = 3;  // and no more bytes than twice the largest

long this_process() {
#if defined(__unix__) || defined(__APPLE__)
    return long(getpid());
#else
    return 0;
#endif
}

}  // namespace

StoredRowFiles::StoredRowFiles(std::vector<int64_t> starts, std::vector<int64_t> shifts, std::vector<int64_t> fds,
                               std::vector<uint64_t> salts, std::vector<uint64_t> multipliers, const RowFiles& sizes)
    : starts_(std::move(starts)), shifts_(std::move(shifts)), fds_(std::move(fds)), salts_(std::move(salts)),
      multipliers_(std::move(multipliers)), view_(sizes) {
    view_.starts = starts_.data(), view_.shifts = shifts_.data(), view_.fds = fds_.data();
    view_.salts = salts_.data(), view_.multipliers = multipliers_.data();
    view_.runs = int64_t(starts_.size());
}

RowBatch::~RowBatch() { queue_.release(*this); }

RowQueue::RowQueue(unsigned entries) : ring_(entries), process_(this_process()) {}

RowQueue::~RowQueue() {
    for (const Memory& memory : free_) std::free(memory.data);
}

bool RowQueue::is_ours() const { return process_ == this_process(); }

std::unique_ptr<RowBatch> RowQueue::begin(std::shared_ptr<const StoredRowFiles> files, const QueueRules& rules, const int64_t* heads,
                                          const int64_t* positions, int64_t count) {
    if (!is_ours()) return nullptr;
    auto batch = std::make_unique<RowBatch>(*this, std::move(files));
    batch->rows_ = in_file_order(batch->files_->view(), heads, positions, count);
    if (!plan(*batch, rules)) return nullptr;
    batch->tag_ = uint32_t(std::find(batches_.begin(), batches_.end(), nullptr) - batches_.begin());
    if (batch->tag_ == batches_.size()) batches_.push_back(nullptr);
    batches_[batch->tag_] = batch.get();
    const std::vector<Read>& reads = batch->reads_;
    for (size_t first = 0; first < reads.size();) {
        const unsigned taken = ring_.submit(reads.data() + first, unsigned(reads.size() - first), batch->tag_, uint32_t(first));
        batch->running_ += taken, first += taken;
        if (first == reads.size()) break;
        if (!ring_.running()) return nullptr;
        ring_.wait();
        collect();
    }
    return batch;
}

void RowQueue::collect() {
    if (!is_ours()) return;
    results_.clear();
    ring_.collect(results_);
    for (const Ring::Result& result : results_) {
        RowBatch& batch = *batches_[result.tag];
        batch.running_--;
        batch.good_ = batch.good_ && result.bytes >= 0 && uint32_t(result.bytes) == batch.reads_[result.index].length;
    }
}

void RowQueue::wait(RowBatch& batch) {
    if (!is_ours()) {
        batch.good_ = false;
        return;
    }
    for (collect(); batch.running_; collect()) ring_.wait();
}

// Reads of rows that lie close together are joined where the buffer has room for what lies between.
bool RowQueue::plan(RowBatch& batch, const QueueRules& rules) {
    ReadRules reads = rules.reads;
    for (int64_t gap : {reads.gap, int64_t(0)}) {
        reads.gap = gap;
        batch.spans_ = spans_of(batch.rows_, 0, batch.files_->view(), reads, rules.most_bytes);
        if (batch.spans_.empty() || batch.spans_.back().last < batch.rows_.size()) continue;
        const Span& last = batch.spans_.back();
        take_buffer(batch, last.start + last.high - last.low);
        batch.reads_ = reads_of(batch.spans_, batch.rows_, batch.files_->view(), reads, batch.buffer_);
        return true;
    }
    return false;
}

void RowQueue::take_buffer(RowBatch& batch, int64_t size) {
    const auto fits = std::find_if(free_.begin(), free_.end(), [&](const Memory& memory) { return memory.bytes >= size; });
    if (fits != free_.end()) {
        batch.buffer_ = fits->data, batch.buffer_bytes_ = fits->bytes;
        free_.erase(fits);
    } else {
        if (!free_.empty()) {  // the smallest: never more buffers than were in use at once
            std::free(free_.front().data);
            free_.erase(free_.begin());
        }
        const int64_t bytes = (size + kBufferUnit - 1) / kBufferUnit * kBufferUnit;
        batch.buffer_ = static_cast<uint8_t*>(std::aligned_alloc(kBufferAlignment, size_t(bytes)));
        if (!batch.buffer_) throw std::bad_alloc();
        batch.buffer_bytes_ = bytes;
    }
    held_bytes_ += batch.buffer_bytes_;
}

void RowQueue::release(RowBatch& batch) {
    if (batch.running_) {
        if (!is_ours()) return;  // the parent's reads, into the parent's memory
        wait(batch);
    }
    if (batch.tag_ < batches_.size() && batches_[batch.tag_] == &batch) batches_[batch.tag_] = nullptr;
    if (!batch.buffer_) return;
    held_bytes_ -= batch.buffer_bytes_;
    const Memory memory{batch.buffer_, batch.buffer_bytes_};
    free_.insert(std::upper_bound(free_.begin(), free_.end(), memory, [](const Memory& a, const Memory& b) { return a.bytes < b.bytes; }), memory);
    int64_t kept = 0;
    for (const Memory& one : free_) kept += one.bytes;
    while (free_.size() > kKeptBuffers || kept > 2 * free_.back().bytes) {
        kept -= free_.front().bytes;
        std::free(free_.front().data);
        free_.erase(free_.begin());
    }
}

}  // namespace specache
