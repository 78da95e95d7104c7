// The kernels, written once over a small set of vector operations and compiled once per instruction
// set: the including file defines `Isa` in the anonymous namespace of `specache`. Nothing here may
// be a template or inline function of another namespace, or the linker could choose a version that
// was compiled for another processor.
//
// A block is 64 bytes, 16 int32 or 16 floats, whatever the registers' size.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace specache {
namespace {

using Bytes = Isa::Bytes;
using Ints = Isa::Ints;
using Floats = Isa::Floats;

constexpr float kLowest = -1e30f;
constexpr int kQueryStride = kMaxDim + 64;

inline int min_of(int64_t a, int64_t b) { return int(a < b ? a : b); }
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

}  // namespace
}  // namespace specache

#include "impl_vectors.hpp"
#include "impl_score.hpp"
#include "impl_select.hpp"
#include "impl_attend.hpp"
#include "impl_matrix.hpp"
#include "impl_quantise.hpp"
#include "impl_product.hpp"
#include "impl_elementwise.hpp"

namespace specache {
namespace {

const Kernels kTable = {Isa::name,      Isa::kQueriesPerPass, prepare, rescore,    exact,
                        quantise,       exp_scores,           add_mean_prob, blocks_per_top, top_k,
                        exact_rows,     attend_with_weights,  rotate_back,   kRowsPerPass,    kPlainRows, round_row,      widen_row,
                        packed_product, plain_product,     elementwise,          mean_of,       layer_norm};

}  // namespace
}  // namespace specache
