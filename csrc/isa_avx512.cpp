// AVX-512 with VNNI.
#include "isa_avx512.hpp"

namespace specache {
namespace {

struct Isa : Wide {
    static constexpr const char* name = "avx512";
    static constexpr int kQueriesPerPass = 4;
    static constexpr bool matrix = false;
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& avx512_kernels() { return kTable; }
}  // namespace specache
