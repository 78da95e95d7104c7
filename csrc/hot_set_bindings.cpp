// Python bindings of the hot set, for specache/rows/native_hot_set.py, which checks shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "hot_set.hpp"

namespace nb = nanobind;
using namespace specache;

namespace {

int64_t* numbers(uintptr_t address) { return reinterpret_cast<int64_t*>(address); }
uint8_t* bytes(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }

}  // namespace

// Positions and slots arrive as addresses of int64, rows as those of bytes (rows/native_hot_set.py).
void define_hot_set(nb::module_& m) {
    nb::class_<HotSet>(m, "HotSet")
        .def(nb::init<int64_t>())
        .def_rw("step", &HotSet::step)
        .def("use", [](HotSet& hot, uintptr_t positions, uintptr_t stamps, uintptr_t rows, int64_t capacity,
                       int64_t row_bytes) { hot.use(numbers(positions), numbers(stamps), bytes(rows), capacity, row_bytes); })
        .def("clear", &HotSet::clear)
        .def("keep_ahead", &HotSet::keep_ahead)
        .def("forget_ahead", &HotSet::forget_ahead)
        .def("find", [](HotSet& hot, uintptr_t positions, int64_t k, uintptr_t slots) { hot.find_all(numbers(positions), k, numbers(slots)); })
        .def("reserve",
             [](HotSet& hot, uintptr_t positions, int64_t k, uintptr_t slots) { hot.reserve_all(numbers(positions), k, numbers(slots)); })
        .def("fill", [](HotSet& hot, uintptr_t rows, int64_t count) { hot.fill(bytes(rows), count); })
        .def("forget", &HotSet::forget_reserved)
        .def("missing", [](HotSet& hot, uintptr_t positions, int64_t k, uintptr_t missing, uintptr_t heads,
                           uintptr_t tokens) { return hot.missing(numbers(positions), k, numbers(missing), numbers(heads), numbers(tokens)); })
        .def("look_up",
             [](HotSet& hot, uintptr_t positions, int64_t n, int64_t k, int64_t real, uintptr_t used, uintptr_t slots, uintptr_t missing, uintptr_t heads,
                uintptr_t tokens) {
                 const HotSet::Found found = hot.look_up(numbers(positions), n, k, real, numbers(used), numbers(slots),
                                                         numbers(missing), numbers(heads), numbers(tokens));
                 return std::make_tuple(found.selected, found.ready, found.missing, found.fits);
             })
        .def("gather", [](const HotSet& hot, uintptr_t slots, int64_t m, uintptr_t out) { hot.gather(numbers(slots), m, bytes(out)); });
}
