// AMX: products of up to 16 queries with 16 tokens (or channels) in one instruction, the rest as
// AVX-512.
#include <initializer_list>

#include "isa_avx512.hpp"

namespace specache {
namespace {

struct Isa : Wide {
    static constexpr const char* name = "amx";
    static constexpr int kQueriesPerPass = kMaxQueries;
    static constexpr bool matrix = true;

    // Round 64 products a[i] b[i] factor, 0 to 65535, to whole numbers. Store high bytes and low
    // bytes.
    static void store_in_two(uint8_t* high, uint8_t* low, const float* a, const float* b, float factor) {
        __m512i x[4];
        for (int i = 0; i < 4; i++) x[i] = _mm512_cvtps_epi32(mul(mul(load(a + 16 * i), load(b + 16 * i)), splat(factor)));
        const __m512i first = _mm512_packus_epi32(x[0], x[1]), second = _mm512_packus_epi32(x[2], x[3]);
        const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes = _mm512_set1_epi16(255);
        const __m512i highs = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
        const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(first, bytes), _mm512_and_si512(second, bytes));
        store_bytes(high, _mm512_permutexvar_epi32(in_order, highs));
        store_bytes(low, _mm512_permutexvar_epi32(in_order, lows));
    }

    // Holds the matrix registers: four sums of `rows` rows and 16 lanes, the rows, and levels.
    class Matrices {
    public:
        explicit Matrices(int rows) : row_bytes_(rows * 64) {
            Setup setup;
            for (int i = 0; i < 8; i++) setup.rows[i] = uint8_t(i < 5 ? rows : 16), setup.row_bytes[i] = 64;
            memory_barrier(&setup);
            _tile_loadconfig(&setup);
        }
        Matrices(const Matrices&) = delete;
        ~Matrices() { _tile_release(); }

        void clear() {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }

        // Load rows of 64 bytes, `stride` apart, for the products that follow.
        void take_rows(const void* rows, int stride) {
            memory_barrier(rows);
            _tile_loadd(4, rows, stride);
        }

        // Add products of the rows with 16 lanes to a sum: lane n has byte i of its number m at 64
        // m + 4 n + i. With KEYS the rows are signed and the levels unsigned, else the other way
        // round.
        template <int SUM, bool KEYS>
        void add_product(const uint8_t* levels) {
            memory_barrier(levels);
            if constexpr (SUM == 0) {
                _tile_loadd(5, levels, 64);
                if constexpr (KEYS) {
                    _tile_dpbsud(0, 4, 5);
                } else {
                    _tile_dpbusd(0, 4, 5);
                }
            } else if constexpr (SUM == 1) {
                _tile_loadd(6, levels, 64);
                if constexpr (KEYS) {
                    _tile_dpbsud(1, 4, 6);
                } else {
                    _tile_dpbusd(1, 4, 6);
                }
            } else if constexpr (SUM == 2) {
                _tile_loadd(5, levels, 64);
                if constexpr (KEYS) {
                    _tile_dpbsud(2, 4, 5);
                } else {
                    _tile_dpbusd(2, 4, 5);
                }
            } else {
                _tile_loadd(6, levels, 64);
                if constexpr (KEYS) {
                    _tile_dpbsud(3, 4, 6);
                } else {
                    _tile_dpbusd(3, 4, 6);
                }
            }
        }

        // All sums, [4][rows][16].
        void store(int32_t* out) {
            char* p = reinterpret_cast<char*>(out);
            _tile_stored(0, p, 64);
            _tile_stored(1, p + row_bytes_, 64);
            _tile_stored(2, p + 2 * row_bytes_, 64);
            _tile_stored(3, p + 3 * row_bytes_, 64);
            memory_barrier(out);
        }

    private:
        // The compiler does not know that these instructions read and write memory: forbid it to
        // move accesses to that memory across them.
        static void memory_barrier(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

        struct alignas(64) Setup {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        };
        const int row_bytes_;
    };
};

}  // namespace
}  // namespace specache

#include "kernels_impl.hpp"

namespace specache {
const Kernels& amx_kernels() { return kTable; }
}  // namespace specache
