#include "engine.hpp"

#include <algorithm>

#include "threads.hpp"

namespace specache {

void quantise(const Engine& engine, const Layout& layout, const LowBitKV& low_bit_kv, const Prompt& prompt, int64_t start, int64_t count) {
    int64_t first_page = start / kPage, pages = (start + count + kPage - 1) / kPage - first_page;
    parallel(engine.threads, [&](Worker& worker) {
        worker.each(pages * layout.heads, [&](int64_t i) {
            int head = int(i % layout.heads);
            int64_t page = first_page + i / layout.heads, low = std::max(start, page * kPage);
            int64_t stop = std::min(start + count, (page + 1) * kPage), token = low - start;
            auto* held = static_cast<float*>(scratch(size_t(kMaxDim) * kPage * (sizeof(float) + 1)));
            engine.kernels->quantise(layout, low_bit_kv.weights ? low_bit_kv.weights + int64_t(head) * layout.dim : nullptr, head,
                                     const_cast<uint8_t*>(low_bit_kv.pages[page]), int(low - page * kPage), int(stop - low),
                                     prompt.keys + head * prompt.key_head_stride + token * prompt.key_token_stride,
                                     prompt.values + head * prompt.value_head_stride + token * prompt.value_token_stride,
                                     prompt.key_token_stride, prompt.value_token_stride, prompt.dtype, held);
        });
    });
}

}  // namespace specache
