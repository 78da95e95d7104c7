// The 16-bit rows of one layer of one sequence in main memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "layout.hpp"

namespace specache {

// Rows [Hkv, n, 2 D] in blocks of 2^shift tokens; strides are in bytes. With shift 63 all tokens lie
// in one block. Forks share blocks (specache/tiers/layer_rows.py).
struct StoredRows {
    const uint8_t* const* blocks = nullptr;
    int shift = 0;
    int64_t head_stride = 0, token_stride = 0;

    SPECACHE_INLINE const uint8_t* at(int64_t head, int64_t position) const {
        const int64_t token = position & int64_t((uint64_t(1) << shift) - 1);
        return blocks[position >> shift] + head * head_stride + token * token_stride;
    }
};

// Copy the rows of `count` (KV head, position) pairs to `out` [count, row_bytes]. The rows are
// [heads, capacity].
inline void gather_rows(const StoredRows& rows, int64_t heads, int64_t capacity, int64_t row_bytes, const int64_t* of_head,
                        const int64_t* positions, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; i++) {
        if (of_head[i] < 0 || of_head[i] >= heads || positions[i] < 0 || positions[i] >= capacity)
            throw std::out_of_range("a row that is not stored");
        for (int64_t d = 0; d < row_bytes; d += 64) __builtin_prefetch(rows.at(of_head[i], positions[i]) + d);  // rows are scattered
    }
    for (int64_t i = 0; i < count; i++) std::memcpy(out + i * row_bytes, rows.at(of_head[i], positions[i]), size_t(row_bytes));
}

}  // namespace specache
