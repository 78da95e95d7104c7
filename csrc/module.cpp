// Python bindings. Tensors arrive as addresses: specache/kernels/cpu/native.py checks dtypes,
// shapes and strides before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "cpu.hpp"
#include "engine.hpp"
#include "hot_set.hpp"
#include "product.hpp"
#include "ring.hpp"
#include "row_reader.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace specache;

void define_hot_set(nb::module_& m);  // hot_set_bindings.cpp

namespace {

const std::vector<const Kernels*>& all_kernels() {
    static const std::vector<const Kernels*> found = available_kernels();
    return found;
}

struct OwnedLowBitKV {
    std::vector<const uint8_t*> pages;
    int64_t length;
    const float* weights;

    OwnedLowBitKV(Addresses addresses, int64_t length, uintptr_t weights)
        : pages(pages_of(addresses)), length(length), weights(at<const float>(weights)) {
        if (int64_t(pages.size()) * kPage < length) throw std::invalid_argument("fewer pages than tokens");
    }
    LowBitKV view() const { return {pages.data(), length, weights}; }
};

Step step_of(const OwnedLayout& layout, const std::vector<const OwnedLowBitKV*>& low_bit_kvs, uintptr_t query, int groups, int rows,
             float scaling, float softcap) {
    const int64_t row = layout.layout.dim * int64_t(sizeof(float)), head = rows * row;  // [B, Hq, n, D], contiguous
    Step step{&layout.layout, {}, {at<const uint8_t>(query), Dtype::f32, layout.layout.heads * groups * head, head, row}, groups, rows, scaling, softcap};
    for (const OwnedLowBitKV* low_bit_kv : low_bit_kvs) step.low_bit_kvs.push_back(low_bit_kv->view());
    return step;
}

// rows: address and strides in bytes of [B, Hkv, n, k, 2 D].
Fetched fetched_of(const Step& step, uintptr_t positions, int64_t k, uintptr_t rows, int dtype, const std::vector<int64_t>& strides) {
    Fetched fetched{at<const int64_t>(positions), k, {}, nullptr};
    for (int64_t head = 0; head < step.heads(); head++)
        fetched.rows.push_back({at<const uint8_t>(rows) + head / step.layout->heads * strides.at(0) + step.head_of(head) * strides.at(1),
                                Dtype(dtype), strides.at(2), strides.at(3)});
    return fetched;
}

// numbers: keys, values, count, head stride, token stride, pending tokens per sequence.
std::vector<Recent> recents_of(const std::vector<int64_t>& numbers, int dtype) {
    std::vector<Recent> recents;
    for (size_t i = 0; i + 6 <= numbers.size(); i += 6)
        recents.push_back({reinterpret_cast<const uint8_t*>(numbers[i]), reinterpret_cast<const uint8_t*>(numbers[i + 1]), numbers[i + 2],
                           numbers[i + 3], numbers[i + 4], numbers[i + 5], Dtype(dtype)});
    return recents;
}

// A `LayerStep` and what it points to, except for memory of tensors.
struct OwnedStep {
    OwnedLayout layout;
    std::vector<OwnedLowBitKV> low_bit_kvs;
    Step step;
    LayerStep layer;

    OwnedStep(const std::string& isa, int threads, const OwnedLayout& layout, const std::vector<const OwnedLowBitKV*>& low_bit_kvs, uintptr_t query,
              int groups, int n, float scaling, float softcap, const std::vector<int64_t>& recent, int dtype, const TopKNumbers& top_k, uintptr_t sinks)
        : layout(layout), low_bit_kvs(owned(low_bit_kvs)), step(step_of(this->layout, pointers(this->low_bit_kvs), query, groups, n, scaling, softcap)),
          layer(engine_of(isa, threads), step, recents_of(recent, dtype), top_k_of(top_k), at<const float>(sinks), false) {
        this->layout.layout.signs = this->layout.signs.data();
    }

    void score() {
        nb::gil_scoped_release released;
        layer.score();
    }
    void rescore(uintptr_t positions, int64_t k, uintptr_t rows, int dtype, const std::vector<int64_t>& strides) {
        Fetched fetched = fetched_of(step, positions, k, rows, dtype, strides);
        nb::gil_scoped_release released;
        layer.rescore(fetched);
    }
    void select(uintptr_t positions) {
        nb::gil_scoped_release released;
        layer.select(at<int64_t>(positions));
    }
    void select_next(uintptr_t positions) {
        nb::gil_scoped_release released;
        layer.select_next(at<int64_t>(positions));
    }
    int64_t next_k() const { return layer.next_k(); }
    void attend_low_bit(uintptr_t positions, int64_t k) {
        nb::gil_scoped_release released;
        layer.attend_low_bit(at<const int64_t>(positions), k);
    }
    void attend_fetched(uintptr_t positions, int64_t k, uintptr_t rows, int dtype, const std::vector<int64_t>& strides, uintptr_t out) {
        Fetched fetched = fetched_of(step, positions, k, rows, dtype, strides);
        nb::gil_scoped_release released;
        layer.attend_fetched(fetched, at<float>(out));
    }
    // The same with the rows of each sequence's hot set at `slots` [B, Hkv, n, k].
    void attend_hot(uintptr_t positions, int64_t k, const std::vector<HotSet*>& hot, uintptr_t slots, int dtype, uintptr_t out) {
        Fetched fetched{at<const int64_t>(positions), k, {}, at<const int64_t>(slots)};
        for (int64_t head = 0; head < step.heads(); head++) {
            const HotSet& rows = *hot.at(size_t(head / step.layout->heads));
            fetched.rows.push_back({rows.row(step.head_of(head), 0), Dtype(dtype), 0, rows.row_bytes()});
        }
        nb::gil_scoped_release released;
        layer.attend_fetched(fetched, at<float>(out));
    }

private:
    static std::vector<OwnedLowBitKV> owned(const std::vector<const OwnedLowBitKV*>& low_bit_kvs) {
        std::vector<OwnedLowBitKV> all;
        for (const OwnedLowBitKV* low_bit_kv : low_bit_kvs) all.push_back(*low_bit_kv);
        return all;
    }
    static std::vector<const OwnedLowBitKV*> pointers(const std::vector<OwnedLowBitKV>& low_bit_kvs) {
        std::vector<const OwnedLowBitKV*> all;
        for (const OwnedLowBitKV& low_bit_kv : low_bit_kvs) all.push_back(&low_bit_kv);
        return all;
    }
};

// strides: of keys per head and token, of values per head and token, in bytes.
void py_quantise(const std::string& isa, int threads, const OwnedLayout& layout, const OwnedLowBitKV& low_bit_kv, uintptr_t keys,
                 uintptr_t values, const std::vector<int64_t>& strides, int dtype, int64_t start, int64_t count) {
    Engine engine = engine_of(isa, threads);
    Prompt prompt{at<const uint8_t>(keys), at<const uint8_t>(values), strides.at(0), strides.at(1), strides.at(2), strides.at(3), Dtype(dtype)};
    nb::gil_scoped_release released;
    quantise(engine, layout.layout, low_bit_kv.view(), prompt, start, count);
}

// Rows in main memory: sizes are heads, capacity in tokens, bytes of a row, head stride and token
// stride. out [M, 2 D].
void py_gather_rows(Addresses blocks, int shift, const std::vector<int64_t>& sizes, Addresses heads, Addresses positions, uintptr_t out) {
    if (heads.shape(0) != positions.shape(0)) throw std::invalid_argument("heads and positions");
    const std::vector<const uint8_t*> table = pages_of(blocks);
    const StoredRows rows{table.data(), shift, sizes.at(3), sizes.at(4)};
    const int64_t *head = heads.data(), *position = positions.data(), count = int64_t(heads.shape(0));
    nb::gil_scoped_release released;
    gather_rows(rows, sizes.at(0), sizes.at(1), sizes.at(2), head, position, count, at<uint8_t>(out));
}

bool py_gather(RowReader& reader, const RowTable& table, const std::vector<int64_t>& rules, Addresses heads, Addresses positions,
               uintptr_t buffer, int64_t size, uintptr_t out) {
    if (heads.shape(0) != positions.shape(0)) throw std::invalid_argument("heads and positions");
    const ReadRules how{rules.at(0), rules.at(1), rules.at(2)};
    const int64_t *head = heads.data(), *position = positions.data(), count = int64_t(heads.shape(0));
    nb::gil_scoped_release released;
    return reader.gather(table.files->view(), how, head, position, count, at<uint8_t>(buffer), size, at<uint64_t>(out));
}

bool py_read(RowReader& reader, Addresses fds, Addresses offsets, Addresses into, Addresses lengths) {
    const size_t count = fds.shape(0);
    if (offsets.shape(0) != count || into.shape(0) != count || lengths.shape(0) != count) throw std::invalid_argument("reads");
    std::vector<Read> reads(count);
    for (size_t i = 0; i < count; i++)
        reads[i] = {int(fds.data()[i]), offsets.data()[i], at<uint8_t>(uintptr_t(into.data()[i])), uint32_t(lengths.data()[i])};
    nb::gil_scoped_release released;
    return reader.read(reads);
}

std::unique_ptr<RowsInFlight> py_begin(RowReader& reader, const RowTable& table, const std::vector<int64_t>& rules, Addresses heads,
                                       Addresses positions, uintptr_t buffer, int64_t size, int most, nb::handle) {
    if (heads.shape(0) != positions.shape(0)) throw std::invalid_argument("heads and positions");
    const ReadRules how{rules.at(0), rules.at(1), rules.at(2)};
    return reader.begin(table.files->view(), how, heads.data(), positions.data(), int64_t(heads.shape(0)), at<uint8_t>(buffer), size, most);
}

bool py_take(RowsInFlight& rows, uintptr_t out) {
    nb::gil_scoped_release released;
    return rows.take(at<uint64_t>(out));
}

// x [M, K], out [M, N] and bias [N] (0: none) are contiguous, of one dtype.
LinearRows linear_rows(uintptr_t x, int dtype, int64_t rows, int64_t inputs, int64_t outputs, uintptr_t bias, uintptr_t out) {
    return {at<const uint8_t>(x), Dtype(dtype), rows, inputs, outputs, at<const uint8_t>(bias), at<uint8_t>(out)};
}

// zeros: 0 for 8-bit codes.
void py_packed_linear(const std::string& isa, int threads, uintptr_t x, int dtype, int64_t rows, int64_t inputs, int64_t outputs, uintptr_t codes,
                      uintptr_t scales, uintptr_t zeros, uintptr_t bias, uintptr_t out) {
    if (inputs % kProductBlock) throw std::invalid_argument("inputs");
    Engine engine = engine_of(isa, threads);
    nb::gil_scoped_release released;
    packed_linear(engine, linear_rows(x, dtype, rows, inputs, outputs, bias, out), at<const uint8_t>(codes), at<const uint16_t>(scales),
                  at<const uint16_t>(zeros));
}

// stride: of the weights, in bytes per output.
void py_plain_linear(const std::string& isa, int threads, uintptr_t x, int dtype, int64_t rows, int64_t inputs, int64_t outputs,
                     uintptr_t weights, int weight_dtype, int64_t stride, uintptr_t bias, uintptr_t out) {
    if (rows > kProductRows) throw std::invalid_argument("rows");
    Engine engine = engine_of(isa, threads);
    nb::gil_scoped_release released;
    plain_linear(engine, linear_rows(x, dtype, rows, inputs, outputs, bias, out), at<const uint8_t>(weights), Dtype(weight_dtype), stride);
}

}  // namespace

Engine specache::engine_of(const std::string& isa, int threads) {
    for (const Kernels* kernels : all_kernels())
        if (isa == kernels->name) return {kernels, threads < 1 ? 1 : threads};
    throw std::invalid_argument("this processor has no " + isa);
}

NB_MODULE(_native, m) {
    m.doc() = "Kernels over the low-bit KV for CPUs, called by specache.kernels.cpu.native; reads of rows, called by specache.tiers.disk.";
    nb::set_leak_warnings(false);  // cached layouts live as long as the process
    m.attr("MAX_DIM") = kMaxDim;
    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    nb::class_<OwnedLayout>(m, "Layout")
        .def(nb::init<int, int, int, int, int, int, const std::vector<int64_t>&, std::vector<float>>(), "code"_a, "bits"_a, "group"_a,
             "heads"_a, "dim"_a, "value_group"_a, "offsets"_a, "signs"_a);
    nb::class_<OwnedLowBitKV>(m, "LowBitKV").def(nb::init<Addresses, int64_t, uintptr_t>(), "pages"_a, "length"_a, "weights"_a)
        .def_rw("length", &OwnedLowBitKV::length);
    nb::class_<OwnedStep>(m, "LayerStep")
        .def(nb::init<const std::string&, int, const OwnedLayout&, const std::vector<const OwnedLowBitKV*>&, uintptr_t, int, int, float, float,
                      const std::vector<int64_t>&, int, const TopKNumbers&, uintptr_t>())
        .def("score", &OwnedStep::score)
        .def("rescore", &OwnedStep::rescore)
        .def("select", &OwnedStep::select)
        .def("select_next", &OwnedStep::select_next)
        .def_prop_ro("next_k", &OwnedStep::next_k)
        .def("attend_low_bit", &OwnedStep::attend_low_bit)
        .def("attend_fetched", &OwnedStep::attend_fetched)
        .def("attend_hot", &OwnedStep::attend_hot);
    define_hot_set(m);
    bind_disk_rows(m);
    bind_in_place(m);
    bind_layer_program(m);
    bind_layer_chain(m);
    bind_seen_values(m);
    m.def("quantise", &py_quantise);
    m.def("gather_rows", &py_gather_rows);
    m.def("packed_linear", &py_packed_linear);
    m.def("plain_linear", &py_plain_linear);
    nb::class_<RowsInFlight>(m, "RowsInFlight").def("arrived", &RowsInFlight::arrived).def("take", &py_take);
    nb::class_<RowReader>(m, "RowReader")
        .def(nb::init<unsigned>())
        .def("gather", &py_gather)
        .def("read", &py_read)
        // the last argument is whatever owns what the reads write to and are checked with
        .def("begin", &py_begin, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(), nb::keep_alive<0, 9>());
}
