#include "row_plan.hpp"

#include <algorithm>

#include "layout.hpp"

namespace specache {
namespace {

int64_t down(int64_t value, int64_t unit) { return value / unit * unit; }
int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

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

}  // namespace specache
