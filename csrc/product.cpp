#include "product.hpp"

#include <algorithm>
#include <memory>

#include "threads.hpp"

namespace specache {
namespace {

// With at most so many rows each thread prepares all of them for itself, which takes less time than
// waiting for others.
constexpr int64_t kFewRows = kProductRows;
// Rows prepared at a time: their codes stay in the second-level cache while tiles pass by.
constexpr int64_t kManyRows = 512;
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t itemsize_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
int64_t tiles_of(const LinearRows& linear) { return (linear.outputs + kTile - 1) / kTile; }

Outputs outputs_of(const LinearRows& linear, int64_t first_row, int64_t tile) {
    const int64_t size = itemsize_of(linear.dtype), start = tile * kTile;
    return {linear.out + (first_row * linear.outputs + start) * size, linear.dtype, linear.outputs * size,
            linear.bias ? linear.bias + start * size : nullptr, int(std::min<int64_t>(kTile, linear.outputs - start))};
}

// The pass of a row: its first row, and how many it has.
struct Pass {
    int64_t first;
    int rows;
};

Pass pass_of(int64_t row, int64_t rows, int most) {
    Pass pass{0, rows_of_pass(rows, most)};
    while (pass.first + pass.rows <= row) {
        pass.first += pass.rows;
        pass.rows = rows_of_pass(rows - pass.first, most);
    }
    return pass;
}

// Memory for prepared rows, and what prepares one of them.
struct Rounding {
    const Engine& engine;
    const LinearRows& linear;
    using Rows = RoundedRows;

    int64_t blocks() const { return linear.inputs / kProductBlock; }
    int64_t bytes(int64_t rows) const { return aligned(rows * linear.inputs) + 2 * aligned(rows * blocks() * 4); }
    Rows at(void* memory, int64_t rows) const {
        auto* base = static_cast<uint8_t*>(memory);
        const int64_t codes = aligned(rows * linear.inputs), scales = aligned(rows * blocks() * 4);
        return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(base + codes), reinterpret_cast<int32_t*>(base + codes + scales),
                linear.inputs};
    }
    void prepare(const Rows& into, int64_t row, int64_t rows, const uint8_t* x) const {
        const Pass pass = pass_of(row, rows, engine.kernels->packed_rows);
        const int64_t start = pass.first * blocks();
        engine.kernels->round_row(
            x, linear.dtype, linear.inputs,
            {into.codes + pass.first * linear.inputs, into.scales + start, into.sums + start, pass.rows, int(row - pass.first)});
    }
};

struct Widening {
    const Engine& engine;
    const LinearRows& linear;
    Dtype weights;
    using Rows = FloatRows;

    int64_t stride() const { return (linear.inputs + kProductBlock - 1) / kProductBlock * kProductBlock; }
    int64_t bytes(int64_t rows) const { return rows * stride() * int64_t(sizeof(float)); }
    Rows at(void* memory, int64_t) const { return {static_cast<float*>(memory), stride(), linear.inputs}; }
    void prepare(const Rows& into, int64_t row, int64_t rows, const uint8_t* x) const {
        const Pass pass = pass_of(row, rows, engine.kernels->plain_rows);
        engine.kernels->widen_row(x, linear.dtype, linear.inputs, weights,
                                  into.values + pass.first * stride() + (row - pass.first) * kProductBlock, int64_t(pass.rows) * kProductBlock);
    }
};

// Prepare few rows, then call product(tile, prepared rows, first row, number of rows) for every tile.
template <class Preparation, class Product>
void each_tile_of_few(Worker& worker, const Preparation& preparation, const Product& product) {
    const LinearRows& linear = preparation.linear;
    const int64_t row_bytes = linear.inputs * itemsize_of(linear.dtype);
    const auto rows = preparation.at(scratch(size_t(preparation.bytes(linear.rows))), linear.rows);
    for (int64_t row = 0; row < linear.rows; row++) preparation.prepare(rows, row, linear.rows, linear.x + row * row_bytes);
    worker.each(tiles_of(linear), [&](int64_t tile) { product(tile, rows, int64_t(0), linear.rows); });
}

// The same for any number of rows, in a region of its own.
template <class Preparation, class Product>
void each_tile(const Preparation& preparation, const Product& product) {
    const LinearRows& linear = preparation.linear;
    const int64_t row_bytes = linear.inputs * itemsize_of(linear.dtype), tiles = tiles_of(linear);
    if (linear.rows <= kFewRows) {
        parallel(preparation.engine.threads, [&](Worker& worker) { each_tile_of_few(worker, preparation, product); });
        return;
    }
    const int64_t most = std::min(linear.rows, kManyRows);
    const std::unique_ptr<uint8_t[]> memory(new uint8_t[size_t(preparation.bytes(most) + kAlignment)]);
    const auto address = (reinterpret_cast<uintptr_t>(memory.get()) + kAlignment - 1) / kAlignment * kAlignment;
    const auto rows = preparation.at(reinterpret_cast<void*>(address), most);
    parallel(preparation.engine.threads, [&](Worker& worker) {
        for (int64_t first = 0; first < linear.rows; first += most) {
            const int64_t count = std::min(most, linear.rows - first);
            worker.each(count, [&](int64_t row) { preparation.prepare(rows, row, count, linear.x + (first + row) * row_bytes); });
            worker.each(tiles, [&](int64_t tile) { product(tile, rows, first, count); });
        }
    });
}

auto packed_tiles(const Engine& engine, const LinearRows& linear, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros) {
    const int64_t blocks = linear.inputs / kProductBlock, code_bytes = blocks * kTile * kProductBlock / (zeros ? 2 : 1);
    return [=, &engine, &linear](int64_t tile, const RoundedRows& rows, int64_t first, int64_t count) {
        const int64_t scale = tile * blocks * kTile;
        const PackedTile packed{codes + tile * code_bytes, scales + scale, zeros ? zeros + scale : nullptr};
        engine.kernels->packed_product(packed, rows, count, outputs_of(linear, first, tile));
    };
}

auto plain_tiles(const Engine& engine, const LinearRows& linear, const uint8_t* weights, Dtype dtype, int64_t stride) {
    return [=, &engine, &linear](int64_t tile, const FloatRows& rows, int64_t first, int64_t count) {
        engine.kernels->plain_product({weights + tile * kTile * stride, dtype, stride}, rows, count, outputs_of(linear, first, tile));
    };
}

}  // namespace

void packed_linear(const Engine& engine, const LinearRows& linear, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros) {
    each_tile(Rounding{engine, linear}, packed_tiles(engine, linear, codes, scales, zeros));
}

void packed_linear(Worker& worker, const Engine& engine, const LinearRows& linear, const uint8_t* codes, const uint16_t* scales,
                   const uint16_t* zeros) {
    each_tile_of_few(worker, Rounding{engine, linear}, packed_tiles(engine, linear, codes, scales, zeros));
}

void plain_linear(const Engine& engine, const LinearRows& linear, const uint8_t* weights, Dtype dtype, int64_t stride) {
    each_tile(Widening{engine, linear, dtype}, plain_tiles(engine, linear, weights, dtype, stride));
}

void plain_linear(Worker& worker, const Engine& engine, const LinearRows& linear, const uint8_t* weights, Dtype dtype, int64_t stride) {
    each_tile_of_few(worker, Widening{engine, linear, dtype}, plain_tiles(engine, linear, weights, dtype, stride));
}

}  // namespace specache
