// The low-bit KV as kernels see it. The byte layout is declared in specache/low_bit/layout.py and
// specache/kernels/packing.py.
//
// Symbols: Hkv key-value heads, G query heads per KV head, n rows of a step (committed, draft), r =
// G n queries of a KV head (G-major), D channels, S tokens, b bits, g tokens per key group, P = 8 /
// b codes per byte.
#pragma once

#include <cstdint>

// Never a function of its own: the linker could share one that was compiled for another processor.
#define SPECACHE_INLINE inline __attribute__((always_inline))

namespace specache {

constexpr int kPage = 64;         // tokens of a page
constexpr int kTile = 16;         // rows of a packed tile, and 32-bit lanes of a block
constexpr int kMaxDim = 512;      // channels of a head
constexpr int kMaxQueries = 16;   // queries that share a pass over the codes, with any instruction set
constexpr int kAttendChunk = 2048;  // tokens whose weights are held at a time
constexpr int kStretch = 512;       // tokens whose weights are relative to the same peak

enum class Code { kivi = 0, rotated = 1 };

struct Layout {
    Code code;
    int bits, group, heads, dim, value_group;
    // byte offsets of the fields in a page; key_zero is the mean of the rotated code
    int64_t key_codes, key_scale, key_zero, value_codes, value_scale, value_zero;
    const float* signs;  // [D], of the rotation

    SPECACHE_INLINE int per_byte() const { return 8 / bits; }
    SPECACHE_INLINE int key_row_bytes() const { return (dim * bits + 7) / 8; }
    SPECACHE_INLINE int key_chunks() const { return dim / (4 * per_byte()); }
    SPECACHE_INLINE int key_rest() const { return key_row_bytes() - 4 * key_chunks(); }
    SPECACHE_INLINE int value_row_bytes() const { return kPage * bits / 8; }
    SPECACHE_INLINE int value_groups() const { return (dim + value_group - 1) / value_group; }
    SPECACHE_INLINE int groups_per_page() const { return kPage / group; }

    SPECACHE_INLINE const uint8_t* key_codes_of(const uint8_t* page, int head) const {
        return page + key_codes + int64_t(head) * kPage * key_row_bytes();
    }
    SPECACHE_INLINE const uint8_t* value_codes_of(const uint8_t* page, int head) const {
        return page + value_codes + int64_t(head) * dim * value_row_bytes();
    }
    // float16 fields
    SPECACHE_INLINE const uint16_t* key_scale_of(const uint8_t* page, int head) const {
        int64_t size = code == Code::rotated ? kPage : int64_t(groups_per_page()) * dim;
        return reinterpret_cast<const uint16_t*>(page + key_scale) + head * size;
    }
    SPECACHE_INLINE const uint16_t* key_zero_of(const uint8_t* page, int head) const {
        return reinterpret_cast<const uint16_t*>(page + key_zero) + int64_t(head) * groups_per_page() * dim;
    }
    SPECACHE_INLINE const uint16_t* value_scale_of(const uint8_t* page, int head) const {
        int64_t size = code == Code::rotated ? kPage : int64_t(kPage) * value_groups();
        return reinterpret_cast<const uint16_t*>(page + value_scale) + head * size;
    }
    SPECACHE_INLINE const uint16_t* value_zero_of(const uint8_t* page, int head) const {
        return reinterpret_cast<const uint16_t*>(page + value_zero) + int64_t(head) * kPage * value_groups();
    }
};

struct LowBitKV {
    const uint8_t* const* pages;
    int64_t length;      // tokens
    const float* weights;  // key scales [Hkv, D] of the rotated code, else null
};

// The model's dtype.
enum class Dtype { f32 = 0, bf16 = 1, f16 = 2 };
SPECACHE_INLINE int itemsize(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Levels of the normal quantiser as whole multiples of a unit: specache/kernels/torch/rotated.py.
struct Levels {
    int8_t steps[16];
    float unit;
    int offset;  // added to a step, so that it is unsigned
};

const Levels& normal_levels(int bits);

}  // namespace specache
