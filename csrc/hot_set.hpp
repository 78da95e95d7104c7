// The hot set: recently used 16-bit rows of one layer of one sequence, in fast memory. The same
// slots, victims and order as specache/rows/hot_set.py: HotSet, which has it on PyTorch operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace specache {

// An LRU cache with `capacity` slots per KV head. A slot's stamp is the step in which it was last
// used; slots used in the current step are not evicted. Positions are token positions, -1 where
// there is none. Different threads may use different heads at the same time.
class HotSet {
public:
    explicit HotSet(int64_t heads) : heads_(size_t(heads)) {}

    // Use this memory from now on: positions, stamps [heads, capacity] and rows [heads, capacity] of
    // `row_bytes`, which hold valid slots. It stays the caller's.
    void use(int64_t* positions, int64_t* stamps, uint8_t* rows, int64_t capacity, int64_t row_bytes);
    // Empty all slots.
    void clear();

    int64_t heads() const { return int64_t(heads_.size()); }
    int64_t capacity() const { return capacity_; }
    int64_t row_bytes() const { return row_bytes_; }
    uint8_t* row(int64_t head, int64_t slot) const { return rows_ + (head * capacity_ + slot) * row_bytes_; }

    // Find the slots of a head's positions [count], -1 where one is not cached. Mark them as used in
    // `step`. Return how many were found.
    int64_t find(int64_t head, const int64_t* positions, int64_t count, int64_t step, int64_t* slots);

    // Reserve a slot for every position [count] whose slot is -1, in their order: the oldest slots,
    // of equally old ones the first, assigned in ascending order. Positions that do not fit beside
    // the slots used in `step` keep -1.
    void reserve(int64_t head, const int64_t* positions, int64_t count, int64_t step, int64_t* slots);

    // Empty a slot whose row did not come.
    void forget(int64_t head, int64_t slot);

    // Remember that the head's slot was reserved for the next step.
    void mark_ahead(int64_t head, int64_t slot) { heads_[size_t(head)].ahead.push_back(slot); }
    // The next step begins: keep what was reserved for it.
    void keep_ahead();
    // Empty the slots that were reserved for the next step.
    void forget_ahead();

    // All heads, positions [heads, k]: `find`; `reserve` those that are not -1; store the rows
    // [count, row_bytes] of the reserved ones, of which there are `count` or none; undo the
    // reservation, whose rows did not come.
    void find_all(const int64_t* positions, int64_t k, int64_t* slots);
    void reserve_all(const int64_t* positions, int64_t k, int64_t* slots);
    void fill(const uint8_t* rows, int64_t count);
    void forget_reserved();
    // Head and slot (-1: none) of what was reserved, in its order, until the rows were stored
    // (`keep_reserved`).
    const std::vector<std::pair<int64_t, int64_t>>& reserved() const { return reserved_; }
    void keep_reserved() { reserved_.clear(); }

    // Which of positions [heads, k] are not cached: `missing` [heads, k] with -1 elsewhere, and their
    // `of_head` and `tokens` [M]. Return M.
    int64_t missing(const int64_t* positions, int64_t k, int64_t* missing, int64_t* of_head, int64_t* tokens);

    // A step's look-up of positions [heads, n, k]. The first `real` queries get all of their rows:
    // what is missing (as above, of [heads, real k]) is reserved. The others get those that are there
    // by then. `used` [heads, n, k]: the positions that a query gets; slots likewise, -1 where there
    // is none.
    struct Found {
        int64_t selected, ready, missing;  // of the real queries
        bool fits;                         // whether every missing row has a slot
    };
    Found look_up(const int64_t* positions, int64_t n, int64_t k, int64_t real, int64_t* used, int64_t* slots, int64_t* missing,
                  int64_t* of_head, int64_t* tokens);

    // Copy the rows at `slots` [heads, m] to `out` [heads, m, row_bytes], zeros at -1.
    void gather(const int64_t* slots, int64_t m, uint8_t* out) const;

    int64_t step = 0;

private:
    static constexpr int64_t kNowhere = INT64_MAX;  // position of an empty slot

    struct Head {
        std::vector<int32_t> table;  // open addressing: slots by position, -1 where free; at least half of it is free
        std::vector<int64_t> ahead;  // slots
    };
    size_t home(int64_t position) const { return size_t((uint64_t(position) * 0x9E3779B97F4A7C15u) >> shift_); }
    void add(int64_t head, int64_t slot);
    void remove(int64_t head, int64_t slot);

    std::vector<Head> heads_;
    std::vector<std::pair<int64_t, int64_t>> reserved_;  // head and slot (-1: none) of rows in flight, in their order
    int64_t *positions_ = nullptr, *stamps_ = nullptr;
    uint8_t* rows_ = nullptr;
    int64_t capacity_ = 0, row_bytes_ = 0;
    size_t mask_ = 0;
    int shift_ = 63;
};

}  // namespace specache
