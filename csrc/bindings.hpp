// Shared by the parts of the Python bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "row_queue.hpp"

namespace specache {

using Addresses = nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

Engine engine_of(const std::string& isa, int threads);

using TopKNumbers = std::array<int64_t, 3>;  // `TopK`, as Python passes it
inline TopK top_k_of(const TopKNumbers& numbers) { return {numbers[0], numbers[1], numbers[2]}; }

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline std::vector<const uint8_t*> pages_of(const Addresses& addresses) {
    std::vector<const uint8_t*> pages;
    pages.reserve(addresses.shape(0));
    for (size_t i = 0; i < addresses.shape(0); i++) pages.push_back(reinterpret_cast<const uint8_t*>(addresses(i)));
    return pages;
}

struct OwnedLayout {
    Layout layout;
    std::vector<float> signs;

    OwnedLayout(int code, int bits, int group, int heads, int dim, int value_group, const std::vector<int64_t>& offsets,
                std::vector<float> signs_)
        : signs(std::move(signs_)) {
        if (dim < 1 || dim > kMaxDim) throw std::invalid_argument("head dimension");
        layout = {Code(code), bits, group, heads, dim, value_group, offsets.at(0), offsets.at(1), offsets.at(2), offsets.at(3),
                  offsets.at(4), offsets.at(5), signs.data()};
    }
};

// A table of blocks: the files of a layer's rows.
struct RowTable {
    std::shared_ptr<const StoredRowFiles> files;
};

void bind_disk_rows(nanobind::module_&);
void bind_in_place(nanobind::module_&);
void bind_layer_program(nanobind::module_&);
void bind_layer_chain(nanobind::module_&);
void bind_seen_values(nanobind::module_&);

}  // namespace specache
