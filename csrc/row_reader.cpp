#include "row_reader.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "ring.hpp"

namespace specache {
namespace {

// Copy rows of completed reads to their places in `out`. Return false at the first wrong checksum.
bool copy_rows(const std::vector<Span>& spans, const std::vector<Row>& rows, const RowFiles& files, const uint8_t* buffer, uint64_t* out) {
    return take_rows(spans, rows, files, buffer, [&](const Row& row, const uint64_t* words) {
        std::memcpy(out + row.index * files.words, words, size_t(files.words) * 8);
    });
}

}  // namespace

struct RowsInFlight::State {
    RowReader& reader;
    const RowFiles files;
    const uint8_t* buffer;
    const std::vector<Row> rows;
    const std::vector<Span> spans;
    const std::vector<Read> reads;
    std::unique_ptr<Ring> ring;  // while they are in flight

    bool end() {
        const bool good = ring->end();
        reader.give(std::move(ring));
        reader.in_flight_--;
        return good;
    }
    ~State() {
        if (ring) end();
    }
};

RowsInFlight::RowsInFlight(std::unique_ptr<State> state) : state_(std::move(state)) {}
RowsInFlight::~RowsInFlight() = default;
bool RowsInFlight::arrived() const { return !state_->ring || state_->ring->ended(); }
bool RowsInFlight::take(uint64_t* out) {
    return state_->ring && state_->end() && copy_rows(state_->spans, state_->rows, state_->files, state_->buffer, out);
}

RowReader::RowReader(unsigned entries) : entries_(entries) { give(std::make_unique<Ring>(entries)); }
RowReader::~RowReader() = default;

bool RowReader::gather(const RowFiles& files, const ReadRules& rules, const int64_t* heads, const int64_t* positions, int64_t count,
                       uint8_t* buffer, int64_t size, uint64_t* out) {
    const std::vector<Row> rows = in_file_order(files, heads, positions, count);
    std::unique_ptr<Ring> ring = take();
    if (!ring) return false;
    bool good = true;
    for (size_t done = 0; good && done < rows.size();) {
        const std::vector<Span> spans = spans_of(rows, done, files, rules, size);
        if (spans.empty()) return false;  // a row larger than the buffer
        good = ring->read(reads_of(spans, rows, files, rules, buffer)) && copy_rows(spans, rows, files, buffer, out);
        done = spans.back().last;
    }
    give(std::move(ring));
    return good;
}

bool RowReader::read(const std::vector<Read>& reads) {
    std::unique_ptr<Ring> ring = take();
    if (!ring) return false;
    const bool good = ring->read(reads);
    give(std::move(ring));
    return good;
}

std::unique_ptr<RowsInFlight> RowReader::begin(const RowFiles& files, const ReadRules& rules, const int64_t* heads,
                                               const int64_t* positions, int64_t count, uint8_t* buffer, int64_t size, int most) {
    std::vector<Row> rows = in_file_order(files, heads, positions, count);
    std::vector<Span> spans = spans_of(rows, 0, files, rules, size);
    std::vector<Read> reads = reads_of(spans, rows, files, rules, buffer);
    if (spans.empty() || spans.back().last < rows.size() || reads.size() > entries_) return nullptr;
    std::unique_ptr<Ring> ring = in_flight_++ < most ? take() : nullptr;
    if (!ring) {
        in_flight_--;
        return nullptr;
    }
    std::unique_ptr<RowsInFlight::State> state(
        new RowsInFlight::State{*this, files, buffer, std::move(rows), std::move(spans), std::move(reads), std::move(ring)});
    const bool all = state->ring->begin(state->reads.data(), unsigned(state->reads.size())) == state->reads.size();
    return all ? std::make_unique<RowsInFlight>(std::move(state)) : nullptr;
}

std::unique_ptr<Ring> RowReader::take() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
            std::unique_ptr<Ring> ring = std::move(idle_.back());
            idle_.pop_back();
            return ring;
        }
    }
    try {
        return std::make_unique<Ring>(entries_);
    } catch (const std::runtime_error&) {
        return nullptr;
    }
}

void RowReader::give(std::unique_ptr<Ring> ring) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(ring));
}

}  // namespace specache
