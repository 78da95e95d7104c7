#include "row_reader.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "layout.hpp"
#include "ring.hpp"

namespace specache {
namespace {

struct Row {
    int64_t run, offset, index, head, position;
};

struct Span {  // one read: rows [first, last) of the order
    int64_t low, high, start;
    size_t first, last;
};

int64_t down(int64_t value, int64_t unit) { return value / unit * unit; }
int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

std::vector<Row> in_file_order(const RowFiles& files, const int64_t* heads, const int64_t* positions, int64_t count) {
    std::vector<Row> rows(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) {
        const int64_t block = positions[i] / kPage;
        const int64_t run = std::upper_bound(files.starts, files.starts + files.runs, block) - files.starts - 1;
        const int64_t slot = heads[i] * kPage + positions[i] % kPage;
        rows[size_t(i)] = {run, (block + files.shifts[run]) * files.block_bytes + slot * files.stride, i, heads[i], positions[i]};
    }
    std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.run != b.run ? a.run < b.run : a.offset < b.offset; });
    return rows;
}

// Plan the next reads, from row `first` on, as many as fit the buffer.
std::vector<Span> spans_of(const std::vector<Row>& rows, size_t first, const RowFiles& files, const ReadRules& rules, int64_t size) {
    std::vector<Span> spans;
    int64_t used = 0;
    for (size_t i = first; i < rows.size(); i++) {
        const int64_t low = down(rows[i].offset, rules.alignment), high = up(rows[i].offset + files.stride, rules.alignment);
        const bool joins = !spans.empty() && rows[spans.back().first].run == rows[i].run && low <= spans.back().high + rules.gap;
        const int64_t more = joins ? std::max<int64_t>(0, high - spans.back().high) : high - low;
        if (used + more > size) break;
        if (joins) {
            spans.back().high = std::max(spans.back().high, high);
            spans.back().last = i + 1;
        } else {
            spans.push_back({low, high, used, i, i + 1});
        }
        used += more;
    }
    return spans;
}

std::vector<Read> reads_of(const std::vector<Span>& spans, const std::vector<Row>& rows, const RowFiles& files, const ReadRules& rules,
                           uint8_t* buffer) {
    std::vector<Read> reads;
    for (const Span& span : spans)
        for (int64_t low = span.low; low < span.high; low += rules.split)
            reads.push_back({int(files.fds[rows[span.first].run]), low, buffer + span.start + (low - span.low),
                             uint32_t(std::min(rules.split, span.high - low))});
    return reads;
}

bool intact(const RowFiles& files, const Row& row, const uint64_t* words) {
    uint64_t sum = files.salts[row.run * files.heads + row.head] + uint64_t(row.position) * files.position_salt +
                   uint64_t(row.position / kPage + files.shifts[row.run]) * files.block_salt;
    for (int64_t i = 0; i < files.words; i++) sum += (words[i] ^ (words[i] >> 32)) * files.multipliers[i];
    return sum == words[files.words];
}

// LowBitKV rows of completed reads to their places in `out`. Return false at the first wrong checksum.
bool take_rows(const std::vector<Span>& spans, const std::vector<Row>& rows, const RowFiles& files, const uint8_t* buffer, uint64_t* out) {
    for (const Span& span : spans)
        for (size_t i = span.first; i < span.last; i++) {
            const auto* words = reinterpret_cast<const uint64_t*>(buffer + span.start + (rows[i].offset - span.low));
            if (!intact(files, rows[i], words)) return false;
            std::memcpy(out + rows[i].index * files.words, words, size_t(files.words) * 8);
        }
    return true;
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
    return state_->ring && state_->end() && take_rows(state_->spans, state_->rows, state_->files, state_->buffer, out);
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
        good = ring->read(reads_of(spans, rows, files, rules, buffer)) && take_rows(spans, rows, files, buffer, out);
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
