// Plan reads of scattered rows: their order in the files, the reads that they share, and their checks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ring.hpp"

namespace specache {

// The blocks of a layer in `runs` of neighbouring blocks of a file, and the keys of the checksums.
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

// How rows are grouped into reads.
struct ReadRules {
    int64_t alignment;  // of offsets and lengths
    int64_t gap;        // nearer rows share a read
    int64_t split;      // longest read
};

struct Row {
    int64_t run, offset, index, head, position;
};

struct Span {  // one read: rows [first, last) of the order
    int64_t low, high, start;
    size_t first, last;
};

std::vector<Row> in_file_order(const RowFiles& files, const int64_t* heads, const int64_t* positions, int64_t count);

// Plan the next reads, from row `first` on, as many as fit a buffer of `size` bytes.
std::vector<Span> spans_of(const std::vector<Row>& rows, size_t first, const RowFiles& files, const ReadRules& rules, int64_t size);

std::vector<Read> reads_of(const std::vector<Span>& spans, const std::vector<Row>& rows, const RowFiles& files, const ReadRules& rules,
                           uint8_t* buffer);

// Whether the words of a row, with its checksum behind them, are what was written there.
bool intact(const RowFiles& files, const Row& row, const uint64_t* words);

// Call `take(row, words)` for every row of completed reads. Return false at the first wrong checksum.
template <class Take>
bool take_rows(const std::vector<Span>& spans, const std::vector<Row>& rows, const RowFiles& files, const uint8_t* buffer, const Take& take) {
    for (const Span& span : spans)
        for (size_t i = span.first; i < span.last; i++) {
            const auto* words = reinterpret_cast<const uint64_t*>(buffer + span.start + (rows[i].offset - span.low));
            if (!intact(files, rows[i], words)) return false;
            take(rows[i], words);
        }
    return true;
}

}  // namespace specache
