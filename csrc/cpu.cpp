#include "cpu.hpp"

#if defined(SPECACHE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace specache {
namespace {

#if defined(SPECACHE_X86)
struct Features {
    bool avx2 = false, avx512 = false, amx = false;
};

// Return the register state that the operating system saves when it switches threads (XCR0).
uint64_t saved_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

// Ask Linux to save matrix registers, which it does only on request, for the whole process and for
// good.
bool may_use_matrices() {
#if defined(SPECACHE_AMX) && defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

Features detect() {
    Features found;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    constexpr unsigned fma = 1u << 12, xsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | xsave | avx | f16c)) != (fma | xsave | avx | f16c)) return found;
    constexpr uint64_t ymm = 0x6, zmm = 0xE6;  // SSE and AVX; and opmask, upper halves, upper registers
    uint64_t saved = saved_state();
    if ((saved & ymm) != ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.avx2 = b & (1u << 5);
    constexpr unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    found.avx512 = found.avx2 && (saved & zmm) == zmm && (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && (c & vnni);
    constexpr uint64_t matrices = 3u << 17;  // setup and data of matrix registers
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    found.amx = found.avx512 && (saved & matrices) == matrices && (d & (tile | int8)) == (tile | int8) && may_use_matrices();
    return found;
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found = {&generic_kernels()};
#if defined(SPECACHE_X86)
    Features features = detect();
    if (features.avx2) found.push_back(&avx2_kernels());
    if (features.avx512) found.push_back(&avx512_kernels());
#if defined(SPECACHE_AMX)
    if (features.amx) found.push_back(&amx_kernels());
#endif
#elif defined(SPECACHE_ARM)
    found.push_back(&neon_kernels());
#endif
    return found;
}

}  // namespace specache
