#include "fetched_step.hpp"

#include <algorithm>
#include <stdexcept>

namespace specache {
namespace {

int64_t decode_copied(LayerStep& layer, const Layout& layout, const std::vector<StoredSequence>& sequences, Dtype dtype, int real, int64_t* next,
                      std::vector<FetchCounts>& counts) {
    std::vector<CopiedRows> copied;
    for (const StoredSequence& sequence : sequences) copied.push_back({sequence.hot, sequence.layer->rows, dtype});
    const std::vector<CopyCounts> of_heads = layer.run(copied, real, next, nullptr);
    for (size_t i = 0; i < of_heads.size(); i++) {
        FetchCounts& sum = counts[i / size_t(layout.heads)];
        sum.selected += of_heads[i].selected, sum.ready += of_heads[i].ready, sum.fetched += of_heads[i].copied, sum.seconds += of_heads[i].seconds;
    }
    return kAllFinite;
}

// Rows of a step's queries: the positions that each gets [B, Hkv, n, k], and their slots.
struct LookedUp {
    std::vector<int64_t> positions, slots;
};

// What a hot set lacks: the first `count` (head, position) pairs.
struct Missing {
    std::vector<int64_t> heads, positions;
    int64_t count;
};

// Look the selected positions up, and note what each query gets. Return per sequence what is missing.
std::vector<Missing> look_up(const Layout& layout, const std::vector<StoredSequence>& sequences, const std::vector<int64_t>& selected, int64_t n,
                             int64_t k, int real, LookedUp& found, std::vector<FetchCounts>& counts) {
    const int64_t of_sequence = layout.heads * n * k;
    const auto wanted = size_t(layout.heads * real * k);
    std::vector<int64_t> lacking(wanted);
    std::vector<Missing> missing;
    for (size_t b = 0; b < sequences.size(); b++) {
        const int64_t from = int64_t(b) * of_sequence;
        Missing& of = missing.emplace_back(Missing{std::vector<int64_t>(wanted), std::vector<int64_t>(wanted), 0});
        const HotSet::Found there = sequences[b].hot->look_up(selected.data() + from, n, k, real, found.positions.data() + from,
                                                              found.slots.data() + from, lacking.data(), of.heads.data(), of.positions.data());
        counts[b].selected = there.selected, counts[b].ready = there.ready, of.count = there.missing;
        if (!there.fits) throw std::invalid_argument("a hot set without room for one step");
    }
    return missing;
}

// The real queries' rows are asked for first, and those of the next step once they are there: devices
// may answer in order.
int64_t decode_from_disk(LayerStep& layer, const Step& step, const std::vector<StoredSequence>& sequences, Dtype dtype, int64_t k, int real,
                         int64_t* next, std::vector<FetchCounts>& counts) {
    const Layout& layout = *step.layout;
    layer.score();
    std::vector<int64_t> selected(size_t(int64_t(sequences.size()) * layout.heads * step.rows * k));
    layer.select(selected.data());
    LookedUp found{selected, selected};
    bool good = true;
    try {
        const std::vector<Missing> missing = look_up(layout, sequences, selected, step.rows, k, real, found, counts);
        layer.attend_low_bit(found.positions.data(), k, [&] {
            for (size_t b = 0; b < sequences.size(); b++)
                good = sequences[b].on_disk->begin(missing[b].heads.data(), missing[b].positions.data(), missing[b].count) && good;
        });
        if (next) layer.select_next(next);
        for (const StoredSequence& sequence : sequences) good = sequence.on_disk->finish() && good;
    } catch (...) {
        for (const StoredSequence& sequence : sequences) sequence.on_disk->cancel();
        throw;
    }
    if (!good) return kReadsFailed;
    Fetched fetched{found.positions.data(), k, {}, found.slots.data()};
    for (int64_t head = 0; head < step.heads(); head++) {
        const HotSet& hot = *sequences[size_t(head / layout.heads)].hot;
        fetched.rows.push_back({hot.row(step.head_of(head), 0), dtype, 0, hot.row_bytes()});
    }
    layer.attend_fetched(fetched, nullptr, [&] {
        if (!next) return;
        for (size_t b = 0; b < sequences.size(); b++)
            sequences[b].on_disk->begin_ahead(next + int64_t(b) * layout.heads * layer.next_k(), layer.next_k());
    });
    return kAllFinite;
}

}  // namespace

int64_t decode_fetched(const Engine& engine, Step step, const std::vector<StoredSequence>& sequences, const StepTokens& tokens, bool commits,
                       const TopK& top_k, const float* sinks, int real, int64_t* next, std::vector<FetchCounts>& counts) {
    const bool on_disk = sequences.at(0).on_disk;
    for (const StoredSequence& sequence : sequences) {
        const HotSet* hot = sequence.hot;
        if (!hot || bool(sequence.on_disk) != on_disk || hot->heads() != step.layout->heads ||
            hot->row_bytes() != 2 * step.layout->dim * itemsize(tokens.dtype))
            throw std::invalid_argument("a hot set of another layer");
    }
    counts.assign(sequences.size(), {});
    std::vector<Recent> recents;
    const int64_t bad = begin_step(step, sequences, tokens, commits, recents);
    if (bad != kAllFinite) return bad;
    int64_t longest = 0;
    for (const StoredSequence& sequence : sequences) longest = std::max(longest, sequence.low_bit);
    LayerStep layer(engine, step, recents, top_k, sinks, !on_disk);
    if (!on_disk) return decode_copied(layer, *step.layout, sequences, tokens.dtype, real, next, counts);
    return decode_from_disk(layer, step, sequences, tokens.dtype, top_k.of(longest), real, next, counts);
}

}  // namespace specache
