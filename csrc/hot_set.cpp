#include "hot_set.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace specache {

void HotSet::use(int64_t* positions, int64_t* stamps, uint8_t* rows, int64_t capacity, int64_t row_bytes) {
    int bits = 1;
    while ((int64_t(1) << bits) < 2 * capacity) bits++;
    std::vector<std::vector<int32_t>> tables(heads_.size());
    if (capacity)
        for (auto& table : tables) table.assign(size_t(1) << bits, -1);
    positions_ = positions, stamps_ = stamps, rows_ = rows, capacity_ = capacity, row_bytes_ = row_bytes;
    mask_ = (size_t(1) << bits) - 1, shift_ = 64 - bits;
    for (size_t head = 0; head < heads_.size(); head++) {
        heads_[head].table.swap(tables[head]);
        for (int64_t slot = 0; slot < capacity; slot++)
            if (positions_[int64_t(head) * capacity + slot] != kNowhere) add(int64_t(head), slot);
    }
}

void HotSet::clear() {
    std::fill(positions_, positions_ + heads() * capacity_, kNowhere);
    std::fill(stamps_, stamps_ + heads() * capacity_, -1);
    for (Head& head : heads_) {
        std::fill(head.table.begin(), head.table.end(), -1);
        head.ahead.clear();
    }
    reserved_.clear();
}

int64_t HotSet::find(int64_t head, const int64_t* positions, int64_t count, int64_t step, int64_t* slots) {
    if (!capacity_) {
        std::fill(slots, slots + count, -1);
        return 0;
    }
    const std::vector<int32_t>& table = heads_[size_t(head)].table;
    const int64_t* held = positions_ + head * capacity_;
    int64_t* stamps = stamps_ + head * capacity_;
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        slots[i] = -1;
        if (positions[i] < 0) continue;
        for (size_t at = home(positions[i]); table[at] >= 0; at = (at + 1) & mask_)
            if (held[table[at]] == positions[i]) {
                slots[i] = table[at], stamps[table[at]] = step, found++;
                break;
            }
    }
    return found;
}

void HotSet::reserve(int64_t head, const int64_t* positions, int64_t count, int64_t step, int64_t* slots) {
    int64_t wanted = 0;
    for (int64_t i = 0; i < count; i++) wanted += positions[i] >= 0 && slots[i] < 0;
    const size_t most = size_t(std::min(wanted, capacity_));
    if (!most) return;
    int64_t *held = positions_ + head * capacity_, *stamps = stamps_ + head * capacity_;
    std::vector<std::pair<int64_t, int64_t>> victims;  // a heap of stamp and slot, the youngest on top
    victims.reserve(most);
    for (int64_t slot = 0; slot < capacity_; slot++) {
        if (stamps[slot] >= step) continue;
        if (victims.size() < most) {
            victims.emplace_back(stamps[slot], slot);
        } else if (stamps[slot] < victims.front().first) {
            std::pop_heap(victims.begin(), victims.end());
            victims.back() = {stamps[slot], slot};
        } else {
            continue;
        }
        std::push_heap(victims.begin(), victims.end());
    }
    std::sort(victims.begin(), victims.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    size_t next = 0;
    for (int64_t i = 0; i < count && next < victims.size(); i++) {
        if (positions[i] < 0 || slots[i] >= 0) continue;
        const int64_t slot = victims[next++].second;
        if (held[slot] != kNowhere) remove(head, slot);
        held[slot] = positions[i], stamps[slot] = step, slots[i] = slot;
        add(head, slot);
    }
}

void HotSet::forget(int64_t head, int64_t slot) {
    int64_t& position = positions_[head * capacity_ + slot];
    if (position == kNowhere) return;
    remove(head, slot);
    position = kNowhere;
    stamps_[head * capacity_ + slot] = -1;
}

void HotSet::keep_ahead() {
    for (Head& head : heads_) head.ahead.clear();
}

void HotSet::forget_ahead() {
    for (size_t head = 0; head < heads_.size(); head++)
        for (int64_t slot : heads_[head].ahead) forget(int64_t(head), slot);
    keep_ahead();
}

void HotSet::find_all(const int64_t* positions, int64_t k, int64_t* slots) {
    for (int64_t head = 0; head < heads(); head++) find(head, positions + head * k, k, step, slots + head * k);
}

void HotSet::reserve_all(const int64_t* positions, int64_t k, int64_t* slots) {
    reserved_.clear();
    reserved_.reserve(size_t(heads() * k));
    std::fill(slots, slots + heads() * k, -1);
    for (int64_t head = 0; head < heads(); head++) {
        reserve(head, positions + head * k, k, step, slots + head * k);
        for (int64_t i = head * k; i < (head + 1) * k; i++)
            if (positions[i] >= 0) reserved_.emplace_back(head, slots[i]);
    }
}

void HotSet::fill(const uint8_t* rows, int64_t count) {
    if (reserved_.empty()) return;
    if (count != int64_t(reserved_.size())) throw std::invalid_argument("as many rows as were reserved");
    for (const auto& [head, slot] : reserved_) {
        if (slot >= 0) std::memcpy(row(head, slot), rows, size_t(row_bytes_));
        rows += row_bytes_;
    }
    reserved_.clear();
}

void HotSet::forget_reserved() {
    for (const auto& [head, slot] : reserved_)
        if (slot >= 0) forget(head, slot);
    reserved_.clear();
}

int64_t HotSet::missing(const int64_t* positions, int64_t k, int64_t* missing, int64_t* of_head, int64_t* tokens) {
    int64_t count = 0;
    for (int64_t head = 0; head < heads(); head++) {
        int64_t* slots = missing + head * k;
        find(head, positions + head * k, k, step, slots);
        for (int64_t i = 0; i < k; i++) {
            const int64_t position = positions[head * k + i];
            slots[i] = slots[i] < 0 ? position : -1;
            if (slots[i] >= 0) of_head[count] = head, tokens[count] = position, count++;
        }
    }
    return count;
}

HotSet::Found HotSet::look_up(const int64_t* positions, int64_t n, int64_t k, int64_t real, int64_t* used, int64_t* slots,
                              int64_t* missing, int64_t* of_head, int64_t* tokens) {
    Found found{0, 0, 0, true};
    const int64_t wanted = real * k, others = (n - real) * k;
    reserved_.clear();
    reserved_.reserve(size_t(heads() * wanted));
    for (int64_t head = 0; head < heads(); head++) {
        const int64_t* of = positions + head * n * k;
        int64_t *at = slots + head * n * k, *gets = used + head * n * k, *lacks = missing + head * wanted;
        found.ready += find(head, of, wanted, step, at);
        for (int64_t i = 0; i < wanted; i++) {
            found.selected += of[i] >= 0;
            lacks[i] = at[i] < 0 ? of[i] : -1;
            gets[i] = of[i];
        }
        reserve(head, of, wanted, step, at);
        for (int64_t i = 0; i < wanted; i++) {
            if (lacks[i] < 0) continue;
            of_head[found.missing] = head, tokens[found.missing] = lacks[i], found.missing++;
            found.fits = found.fits && at[i] >= 0;
            reserved_.emplace_back(head, at[i]);
        }
        find(head, of + wanted, others, step, at + wanted);
        for (int64_t i = wanted; i < wanted + others; i++) gets[i] = at[i] >= 0 ? of[i] : -1;
    }
    return found;
}

void HotSet::gather(const int64_t* slots, int64_t m, uint8_t* out) const {
    for (int64_t i = 0; i < heads() * m; i++, out += row_bytes_)
        if (slots[i] >= 0)
            std::memcpy(out, row(i / m, slots[i]), size_t(row_bytes_));
        else
            std::memset(out, 0, size_t(row_bytes_));
}

void HotSet::add(int64_t head, int64_t slot) {
    std::vector<int32_t>& table = heads_[size_t(head)].table;
    size_t at = home(positions_[head * capacity_ + slot]);
    while (table[at] >= 0) at = (at + 1) & mask_;
    table[at] = int32_t(slot);
}

// Take a slot out of the table; its position is still there. Entries behind it move up, so that none
// is separated from its home by a free place.
void HotSet::remove(int64_t head, int64_t slot) {
    std::vector<int32_t>& table = heads_[size_t(head)].table;
    const int64_t* held = positions_ + head * capacity_;
    size_t free = home(held[slot]);
    while (table[free] != slot) free = (free + 1) & mask_;
    for (size_t at = (free + 1) & mask_; table[at] >= 0; at = (at + 1) & mask_)
        if (((at - home(held[table[at]])) & mask_) >= ((at - free) & mask_)) {
            table[free] = table[at];
            free = at;
        }
    table[free] = -1;
}

}  // namespace specache
