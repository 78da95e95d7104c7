// Products of rows of activations with a linear layer's weights [N, K], spread over threads.
#pragma once

#include "engine.hpp"
#include "threads.hpp"

namespace specache {

// Rows [M, K] and results [M, N] of one dtype, contiguous; bias [N] of the same dtype, or null.
struct LinearRows {
    const uint8_t* x;
    Dtype dtype;
    int64_t rows, inputs, outputs;
    const uint8_t* bias;
    uint8_t* out;
};

// Weights packed in tiles of 16 outputs: codes [ceil(N / 16), K / 32, 512 or 256 bytes], scales and
// zeros (null at 8 bits) [ceil(N / 16), K / 32, 16] in bfloat16. Rows are rounded to 8 bits per block
// of 32 inputs. K is a multiple of 32.
void packed_linear(const Engine&, const LinearRows&, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros);

// Weights [N, K] of a float type, the inputs of an output contiguous; `stride` in bytes. Sums are in
// float32.
void plain_linear(const Engine&, const LinearRows&, const uint8_t* weights, Dtype dtype, int64_t stride);

// The same as a part of a region, for at most `kProductRows` rows. Every thread of the region calls it.
void packed_linear(Worker&, const Engine&, const LinearRows&, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros);
void plain_linear(Worker&, const Engine&, const LinearRows&, const uint8_t* weights, Dtype dtype, int64_t stride);

}  // namespace specache
