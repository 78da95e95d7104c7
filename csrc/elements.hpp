// Rows of numbers in the model's dtype.
#pragma once

#include <cstdint>

#include "layout.hpp"

namespace specache {

void widen(const uint8_t* from, Dtype dtype, int count, float* to);
// Round to nearest even, as PyTorch does. What is too large for float16 becomes infinity.
void narrow(const float* from, Dtype dtype, int count, uint8_t* to);
bool all_finite(const uint8_t* numbers, Dtype dtype, int count);

}  // namespace specache
