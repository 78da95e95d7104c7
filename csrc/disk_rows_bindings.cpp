// Python bindings of rows on a disk, called by specache/tiers/disk/native_reads.py, which checks shapes.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings.hpp"
#include "disk_rows.hpp"

namespace nb = nanobind;

namespace specache {
namespace {

std::vector<int64_t> copied(const Addresses& numbers) { return {numbers.data(), numbers.data() + numbers.shape(0)}; }

// salts: [runs, heads]; multipliers: [words].
void make_table(RowTable* made, Addresses starts, Addresses shifts, Addresses fds, uintptr_t salts, int64_t heads, int64_t block_bytes,
                int64_t stride, int64_t words, uintptr_t multipliers, uint64_t position_salt, uint64_t block_salt) {
    const int64_t runs = int64_t(starts.shape(0));
    if (runs < 1 || int64_t(shifts.shape(0)) != runs || int64_t(fds.shape(0)) != runs) throw std::invalid_argument("runs");
    const auto* salt = at<const uint64_t>(salts);
    const auto* factor = at<const uint64_t>(multipliers);
    const RowFiles sizes{nullptr, nullptr, nullptr, nullptr, runs, heads, block_bytes, stride, words, nullptr, position_salt, block_salt};
    new (made) RowTable{std::make_shared<const StoredRowFiles>(copied(starts), copied(shifts), copied(fds),
                                                               std::vector<uint64_t>(salt, salt + runs * heads),
                                                               std::vector<uint64_t>(factor, factor + words), sizes)};
}

// table: null while no block is in a file. rules: alignment, gap and longest read; most_bytes of a
// buffer.
void use(DiskRows& rows, const RowTable* table, const std::vector<int64_t>& rules, int64_t most_bytes, uintptr_t tail, int64_t tail_head,
         int64_t tail_token, int64_t on_disk) {
    if (!table && on_disk) throw std::invalid_argument("rows in no file");
    rows.use(table ? table->files : nullptr, {{rules.at(0), rules.at(1), rules.at(2)}, most_bytes}, at<uint8_t>(tail), tail_head, tail_token, on_disk);
}

}  // namespace

void bind_disk_rows(nb::module_& m) {
    nb::class_<RowTable>(m, "RowTable").def("__init__", &make_table);
    nb::class_<DiskReads>(m, "DiskReads").def(nb::init<unsigned>());
    nb::class_<DiskRows>(m, "DiskRows")
        .def(nb::init<std::shared_ptr<DiskReads>, HotSet&>(), nb::keep_alive<1, 3>())
        .def("use", &use, nb::arg("table").none(), nb::arg("rules"), nb::arg("most_bytes"), nb::arg("tail"), nb::arg("tail_head"),
             nb::arg("tail_token"), nb::arg("on_disk"))
        .def("finish_ahead", &DiskRows::finish_ahead, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("reading_ahead", &DiskRows::reading_ahead)
        .def("failed", &DiskRows::failed)
        .def("cancel", &DiskRows::cancel, nb::call_guard<nb::gil_scoped_release>())
        .def("take_counts", [](DiskRows& rows) {
            const ReadCounts counts = rows.take_counts();
            return std::make_tuple(counts.rows, counts.waits, counts.read_s, counts.wait_s);
        });
}

}  // namespace specache
