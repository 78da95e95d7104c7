// One table of kernels per instruction set. A kernel works on one KV head of one sequence;
// threads.hpp spreads kernels over threads.
#pragma once

#include <cstdint>

#include "layout.hpp"
#include "stored_rows.hpp"

namespace specache {

// Up to kMaxQueries queries of one KV head, prepared for products with its codes.
struct PreparedQuery {
    int count;
    const float* query[kMaxQueries];  // the originals [D]
    alignas(64) int8_t bytes[kMaxQueries][kMaxDim + 64];  // rotated code: rounded once per step
    float scale[kMaxQueries];
    int32_t sum[kMaxQueries];  // of the rounded query: undoes the levels' offset
};

// Addresses of the exact rows of a KV head's selected positions: [K | V] of one token, 2 D elements.
// They lie in slots, or, where there is no `base`, by position.
struct Rows {
    const uint8_t* base;
    Dtype dtype;
    int64_t row_stride, slot_stride;  // bytes
    StoredRows stored = {};
    int64_t head = 0;  // of `stored`

    SPECACHE_INLINE const uint8_t* at(int row, int64_t slot, int64_t position) const {
        return base ? base + row * row_stride + slot * slot_stride : stored.at(head, position);
    }
};

// Softmax-weighted sum over a stretch of tokens: out [count][stride], relative to `peak` and not
// yet divided by `total`.
struct Partial {
    float* out;
    float* peak;
    float* total;
    int stride;
};

constexpr int kProductBlock = 32;     // inputs that share a scale
constexpr int kProductRows = 8;       // the most rows of `plain_product`
constexpr int kProductAhead = 12288;  // bytes of codes that are prefetched ahead

// Weights of 16 outputs, K / 32 blocks: codes of 8 bits, or of 4 if there are `zeros`. Scales and
// zeros are bfloat16 [K / 32, 16]; W = code * scale + zero, where 4-bit codes count from -8.
struct PackedTile {
    const uint8_t* codes;
    const uint16_t *scales, *zeros;
};

// Rows that go through the codes together: a power of two, `most` or fewer.
SPECACHE_INLINE int rows_of_pass(int64_t left, int most) {
    int rows = most;
    while (rows > left) rows /= 2;
    return rows;
}

// Rows rounded by `round_row`. Those of a pass, `n` of them, lie together: codes [K / 32, n, 32],
// scales and sums [K / 32, n]; the rows before them take their sizes.
struct RoundedRows {
    int8_t* codes;
    float* scales;
    int32_t* sums;
    int64_t inputs;
};

// Where a row is stored: the arrays of its pass, how many rows it has, and which of them this is.
struct RoundedRow {
    int8_t* codes;
    float* scales;
    int32_t* sums;
    int rows, row;
};

// Rows of weights [16, inputs] of a float type; `stride` in bytes.
struct PlainTile {
    const uint8_t* weights;
    Dtype dtype;
    int64_t stride;
};

// Rows of activations widened by `widen_row`, `stride` elements each. Those of a pass, `n` of them,
// lie together [K / 32, n, 32]; the rows before them take their sizes.
struct FloatRows {
    float* values;
    int64_t stride, inputs;
};

// Where up to 16 outputs of each row go; `bias` (or null) points to those of this tile.
struct Outputs {
    uint8_t* base;
    Dtype dtype;
    int64_t row_stride;  // bytes
    const uint8_t* bias;
    int count;

    SPECACHE_INLINE uint8_t* at(int64_t row) const { return base + row * row_stride; }
};

// Elements of a row; `stride` in bytes, 0 where all are the same one.
struct Elements {
    const uint8_t* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t stride = 0;
};

struct Written {
    uint8_t* data;
    Dtype dtype;
    int64_t stride;
};

// Operations on elements a, or a and b. `specache/engine/traced/layer_operations.py` has the same numbers.
enum class ElementOp {
    copy, negate, square, root, reciprocal_root, exponential, sigmoid, tanh, relu, silu, gelu, gelu_tanh,
    add, subtract, multiply, divide, at_least, at_most
};

struct Kernels {
    const char* name;
    int queries_per_pass;  // queries that share one pass over the codes: at most kMaxQueries

    // Round queries [count] (with the rotated code: multiply by the key scales and rotate first).
    void (*prepare)(const Layout&, const float* weights, const float* const* queries, int count, PreparedQuery* out);

    // Overwrite the low-bit scores of selected positions by exact ones. queries [groups][D].
    void (*rescore)(const float* const* queries, int groups, int dim, const Rows&, int row, const int64_t* positions, int64_t k,
                    float scaling, float softcap, float* const* scores);

    // Attend exactly to `count` keys and values (strides in bytes). Query j sees the first seen[j].
    // weights [queries][count + 16]: exp(score - out.peak[j]) of every token, zero where it is not
    // seen.
    void (*exact)(const float* const* queries, int queries_count, int dim, const uint8_t* keys, const uint8_t* values,
                  int64_t key_stride, int64_t value_stride, int64_t count, const int64_t* seen, Dtype dtype, float scaling,
                  float softcap, float* weights, Partial out);

    // Quantise and pack tokens [offset, offset + count) of one page, whole groups.
    // keys, values: rows of D elements; scratch: 2 x kMaxDim x kPage floats.
    void (*quantise)(const Layout&, const float* weights, int head, uint8_t* page, int offset, int count, const uint8_t* keys,
                     const uint8_t* values, int64_t key_stride, int64_t value_stride, Dtype dtype, float* scratch);

    // LayerStep takes one exponential per score: it keeps weights, not scores.

    // weights[j][t] = exp(score - peak[j]) of tokens [first, first + count), a stretch of at most
    // kStretch; total[j] is their sum. Weights are zero up to the end of the last page.
    void (*exp_scores)(const Layout&, const LowBitKV&, int head, const PreparedQuery&, int64_t first, int64_t count, float scaling,
                       float softcap, float* const* weights, float* peak, float* total);

    // mean_prob[t] = sum_g factor[g] weights[g][t] of such a stretch. tops: the largest of each
    // lane of every `per_top` blocks.
    void (*add_mean_prob)(const float* const* weights, const float* factor, int groups, int64_t first, int64_t count,
                          int64_t per_top, float* mean_prob, float* tops);
    int64_t (*blocks_per_top)(int64_t length, int64_t k);

    // Find the k positions of largest mean_prob. Positions ascend, ties go to the lower position,
    // padding is -1. tops [count] are whole blocks; values, candidates: scratch of `length` in whole blocks.
    void (*top_k)(const float* mean_prob, int64_t length, const float* tops, int64_t count, int64_t k, int64_t* positions, float* values,
                  int32_t* candidates);

    // Attend exactly to the selected rows of `row`, each at its position or slot.
    // scores: scratch [queries][count + 16].
    void (*exact_rows)(const float* const* queries, int queries_count, int dim, const Rows&, int row, const int64_t* positions,
                       const int64_t* slots, int64_t count, float scaling, float softcap, float* scores, Partial out);

    // Attend to tokens [first, first + count) of the low-bit KV with their weights, at most
    // kAttendChunk from a stretch's border on. Tokens that are attended to elsewhere have weight
    // zero. peaks[j][s] is the peak of stretch s. The sum is still rotated.
    void (*attend_with_weights)(const Layout&, const LowBitKV&, int head, int64_t first, int64_t count, const float* const* weights,
                                int queries, const float* const* peaks, Partial out);
    void (*rotate_back)(const Layout&, int queries, Partial out);

    // Products with a model's weights (impl_product.hpp), of one tile of 16 outputs.

    int packed_rows, plain_rows;  // the most of a pass, see `rows_of_pass`
    // Round a row [inputs] to 8 bits per block of kProductBlock inputs.
    void (*round_row)(const uint8_t* x, Dtype dtype, int64_t inputs, const RoundedRow&);
    // Widen a row [inputs] to float32 [whole blocks], in the order in which weights of a dtype are read.
    // `stride`: elements from block to block.
    void (*widen_row)(const uint8_t* x, Dtype dtype, int64_t inputs, Dtype weights, float* out, int64_t stride);
    // A row's result does not depend on the other rows.
    void (*packed_product)(const PackedTile&, const RoundedRows&, int64_t rows, const Outputs&);
    void (*plain_product)(const PlainTile&, const FloatRows&, int64_t rows, const Outputs&);  // at most kProductRows

    // What else a decoder layer computes (impl_elementwise.hpp), in float32 and rounded to out's dtype.

    void (*elementwise)(ElementOp, int64_t count, const Elements& a, const Elements& b, const Written& out);
    float (*mean_of)(int64_t count, const Elements&);
    // weight and bias: without data where there is none.
    void (*layer_norm)(int64_t count, const Elements&, const Elements& weight, const Elements& bias, float epsilon, const Written& out);
};

const Kernels& generic_kernels();
#if defined(SPECACHE_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#if defined(SPECACHE_AMX)
const Kernels& amx_kernels();
#endif
#endif
#if defined(SPECACHE_ARM)
const Kernels& neon_kernels();
#endif

float scalar_tanh(float x);
using ScalarFunction = float (*)(float);
ScalarFunction scalar_function(ElementOp);  // of those that take one element at a time

}  // namespace specache
