"""Walking over a copy's pages: in blocks of bounded size to read them, in pieces of whole groups to write them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specache.kernels.types import LowBitCopy, PageRun

BLOCK_BYTES = 1 << 20  # float32 codes unpacked at a time, unless one page is more
QUANTISE_PAGES = 16  # pages quantised at a time


class Block(list[PageRun]):
    """A few pages of a layer, wherever they lie in the pool."""

    def field(self, name: str) -> Tensor:
        """One field of all pages [N, ...]: a view of neighbouring pages, else a copy of the packed bytes."""
        parts = [run.fields[name] for run in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def page_tokens(copy: LowBitCopy) -> int:
    return copy.runs[0].fields["key_codes"].shape[2]


def blocks(copy: LowBitCopy, length: int) -> Iterator[tuple[Block, int, int]]:
    """The pages of the first `length` tokens in blocks of bounded size -> (block, first token, tokens that count)."""
    if not length:
        return
    tokens = page_tokens(copy)
    room = step = max(1, BLOCK_BYTES // (4 * copy.num_kv_heads * tokens * copy.head_dim))
    block, first = Block(), 0
    remaining = -(-length // tokens)
    for run in copy.runs:
        start = 0
        while remaining and start < run.pages:
            count = min(room, run.pages - start, remaining)
            block.append(run.pages_from(start, start + count))
            start, room, remaining = start + count, room - count, remaining - count
            if room == 0 or remaining == 0:
                size = (step - room) * tokens
                yield block, first, min(size, length - first)
                block, first, room = Block(), first + size, step


def pieces(copy: LowBitCopy, start: int, count: int) -> Iterator[tuple[PageRun, int, int]]:
    """Where tokens `[start, start + count)` go -> (pages, offset in the first page, tokens): part of one page, or whole pages."""
    tokens = page_tokens(copy)
    run_first = 0
    for run in copy.runs:
        run_stop = run_first + run.pages * tokens
        while count and run_first <= start < run_stop:
            page, offset = divmod(start - run_first, tokens)
            whole = min(count // tokens, QUANTISE_PAGES, run.pages - page) if offset == 0 else 0
            size = whole * tokens if whole else min(count, tokens - offset)
            yield run.pages_from(page, page + max(whole, 1)), offset, size
            start, count = start + size, count - size
        run_first = run_stop


def by_head(field: Tensor, count: int | None = None) -> Tensor:
    """[N, Hkv, slots, X] -> [Hkv, count, X], in token order; all `N slots` without a count."""
    return field.transpose(0, 1).flatten(1, 2)[:, :count]


def store(field: Tensor, data: Tensor, offset: int) -> None:
    """Write data [Hkv, count, X] into a page field [N, Hkv, slots, X] from slot `offset` of its first page."""
    if field.shape[0] == 1:
        field[0, :, offset : offset + data.shape[1]] = data
    else:
        field.copy_(data.unflatten(1, (field.shape[0], -1)).transpose(0, 1))
