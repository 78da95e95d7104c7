// Kernels over whole batches: all sequences, KV heads and rows of a decode step in one call, spread
// over threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "hot_set.hpp"
#include "kernels.hpp"

namespace specache {

struct Engine {
    const Kernels* kernels;
    int threads;
};

// Numbers [B, Hq, n, D] of a dtype; the last dimension is contiguous, strides are in bytes.
template <class Byte>
struct PerQuery {
    Byte* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t batch = 0, head = 0, row = 0;

    Byte* at(int64_t b, int64_t query_head, int64_t query_row) const { return data + b * batch + query_head * head + query_row * row; }
};

// The queries of a step [B, Hkv G, n, D].
struct Step {
    const Layout* layout;
    std::vector<LowBitKV> low_bit_kvs;  // B
    PerQuery<const uint8_t> query;
    int groups, rows;  // G, n
    float scaling, softcap;  // softcap 0: none
    PerQuery<uint8_t> output = {};  // where results go if not to float32 [B, Hkv, G, n, D]

    int64_t heads() const { return int64_t(low_bit_kvs.size()) * layout->heads; }  // B Hkv
    int queries() const { return groups * rows; }
    const LowBitKV& low_bit_of(int64_t head) const { return low_bit_kvs[std::size_t(head / layout->heads)]; }
    int head_of(int64_t head) const { return int(head % layout->heads); }
    // The place of query j (G-major) of a KV head in `query` or `output`.
    template <class Byte>
    Byte* place(const PerQuery<Byte>& numbers, int64_t head, int j) const {
        return numbers.at(head / layout->heads, int64_t(head_of(head)) * groups + j / rows, j % rows);
    }
};

// How many pairs a query selects per KV head: `k` of fewer than `long_from` low-bit tokens, `long_k`,
// not fewer, of more.
struct TopK {
    int64_t k = 0, long_k = 0, long_from = 0;

    int64_t of(int64_t candidates) const { return std::min(candidates < long_from ? k : long_k, candidates); }
};

// Exact rows of every (sequence, KV head, row, slot).
struct Fetched {
    const int64_t* positions;  // [B, Hkv, n, k]
    int64_t k;
    std::vector<Rows> rows;  // one per (sequence, KV head)
    const int64_t* slots = nullptr;  // [B, Hkv, n, k] of `rows`, where slot i is not position i's
};

// The rows of a sequence in main memory, and the hot set through which a step copies them.
struct CopiedRows {
    HotSet* hot;
    StoredRows stored;
    Dtype dtype;
};

// What a step copied of one (sequence, KV head).
struct CopyCounts {
    int64_t selected = 0, ready = 0;  // pairs of the real queries, and those that the hot set had
    int64_t copied = 0;               // rows, for this step and the next
    double seconds = 0.0;             // for which the step copied, over the threads that share it
};

// The newest tokens of a sequence at 16 bits: keys and values [Hkv, count, D]. The first `pending` of
// them are quantised after the step. The step's own tokens [Hkv, own, D], which are not stored,
// follow.
struct Recent {
    const uint8_t *keys, *values;
    int64_t count, head_stride, token_stride;  // bytes
    int64_t pending;
    Dtype dtype;
    const uint8_t *own_keys = nullptr, *own_values = nullptr;
    int64_t own = 0, own_key_head = 0, own_key_token = 0, own_value_head = 0, own_value_token = 0;  // strides in bytes

    int64_t all() const { return count + own; }
};

// One layer of a step: attention over the low-bit KV, the exact rows of fetched positions, and the
// recent tokens, of which row r sees all but the last n - 1 - r. sinks: [Hkv G] or null. Everything
// it points to must outlive it. Use it once.
//
// Where rows lie in memory (`at_once`), `run` does everything, each query with the rows that it
// selects. Otherwise: `score`, then `select` and `attend_low_bit` in the order that the policy wants,
// and `attend_fetched`. Both give the same bits for the same positions.
class LayerStep {
public:
    class State;
    LayerStep(const Engine&, Step, const std::vector<Recent>&, const TopK& top_k, const float* sinks, bool at_once);
    ~LayerStep();
    // If `at_once`. stored: per (sequence, KV head); out [B, Hkv, G, n, D], unless the step has an
    // `output`.
    void run(const std::vector<Rows>& stored, float* out);
    // The same through a hot set per sequence, with room for the pairs of one step. The first `real`
    // rows get all pairs that they select, the others those that are in the hot set by then. `next`:
    // what `select_next` returns, copied ahead, or null. Return counts per (sequence, KV head).
    std::vector<CopyCounts> run(const std::vector<CopiedRows>&, int real, int64_t* next, float* out);
    // Unless `at_once`, first of all: score every low-bit key and attend to the recent tokens.
    void score();
    // Replace the scores of fetched positions by exact ones, before `select`.
    void rescore(const Fetched&);
    // Each query's k positions of largest mean probability [B, Hkv, n, k], padded with -1.
    void select(int64_t* positions);
    // The same of the last query among the low-bit tokens and the pending ones [B, Hkv, k], where
    // `next_k` is k. After `select`.
    void select_next(int64_t* positions);
    int64_t next_k() const;
    // Work that one of the threads does meanwhile: asking the kernel for rows takes as long as a part
    // of the attention.
    using Meanwhile = std::function<void()>;
    // Attend to the low-bit KV without these positions; -1 where the low-bit pair is used.
    void attend_low_bit(const int64_t* positions, int64_t k, const Meanwhile& meanwhile = {});
    // Attend to the exact rows of the same positions, and to the recent tokens.
    void attend_fetched(const Fetched&, float* out, const Meanwhile& meanwhile = {});

private:
    std::unique_ptr<State> state_;
};

struct Prompt {
    const uint8_t *keys, *values;  // [Hkv, count, D]
    int64_t key_head_stride, key_token_stride, value_head_stride, value_token_stride;  // bytes
    Dtype dtype;
};
// Quantise tokens [start, start + count) into pages; whole groups.
void quantise(const Engine&, const Layout&, const LowBitKV&, const Prompt&, int64_t start, int64_t count);

}  // namespace specache
