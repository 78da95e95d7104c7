"""Iterate over the pages of a low-bit copy: in bounded blocks to read, in whole groups to write."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS
from specache.kernels.packing import byte_table, pack, replace_rows, unpack
from specache.kernels.types import LowBitKV, PageRun

BLOCK_BYTES = 1 << 20  # float32 codes unpacked at a time, unless one page is more
QUANTISE_PAGES = 16  # pages quantised at a time


class Block(list[PageRun]):
    """A few pages of a layer, which need not be neighbours in the pool."""

    def field(self, name: str) -> Tensor:
        """Return one field of all pages [N, ...]: a view of neighbouring pages, else a copy."""
        parts = [run.fields[name] for run in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def blocks(low_bit_kv: LowBitKV, length: int) -> Iterator[tuple[Block, int, int]]:
    """Yield the pages of the first `length` tokens in blocks of bounded size.

    Yields:
        (block, its first token, number of its tokens below `length`).
    """
    if not length:
        return
    tokens = PAGE_TOKENS
    room = step = max(1, BLOCK_BYTES // (4 * low_bit_kv.num_kv_heads * tokens * low_bit_kv.head_dim))
    block, first = Block(), 0
    remaining = -(-length // tokens)
    for run in low_bit_kv.runs:
        start = 0
        while remaining and start < run.pages:
            count = min(room, run.pages - start, remaining)
            block.append(run.pages_from(start, start + count))
            start, room, remaining = start + count, room - count, remaining - count
            if room == 0 or remaining == 0:
                size = (step - room) * tokens
                yield block, first, min(size, length - first)
                block, first, room = Block(), first + size, step


def pieces(low_bit_kv: LowBitKV, start: int, count: int) -> Iterator[tuple[PageRun, int, int]]:
    """Yield the pages that tokens `[start, start + count)` go to: whole pages, or a part of one.

    Yields:
        (pages, offset in the first page, number of tokens).
    """
    tokens = PAGE_TOKENS
    run_first = 0
    for run in low_bit_kv.runs:
        run_stop = run_first + run.pages * tokens
        while count and run_first <= start < run_stop:
            page, offset = divmod(start - run_first, tokens)
            whole = min(count // tokens, QUANTISE_PAGES, run.pages - page) if offset == 0 else 0
            size = whole * tokens if whole else min(count, tokens - offset)
            yield run.pages_from(page, page + max(whole, 1)), offset, size
            start, count = start + size, count - size
        run_first = run_stop


def by_head(field: Tensor, count: int | None = None) -> Tensor:
    """Reshape [N, Hkv, slots, X] to [Hkv, count, X] in token order; by default all slots."""
    return field.transpose(0, 1).flatten(1, 2)[:, :count]


def store(field: Tensor, data: Tensor, offset: int) -> None:
    """Write data [Hkv, count, X] into a field [N, Hkv, slots, X] from slot `offset` on."""
    if field.shape[0] == 1:
        field[0, :, offset : offset + data.shape[1]] = data
    else:
        field.copy_(data.unflatten(1, (field.shape[0], -1)).transpose(0, 1))


def store_codes(run: PageRun, keys: Tensor, values: Tensor, offset: int, bits: int) -> None:
    """Pack uint8 codes of keys and values [Hkv, count, D] into a run from slot `offset` on."""
    key_field, value_field = run.fields["key_codes"], run.fields["value_codes"]
    if run.pages * PAGE_TOKENS == keys.shape[1]:
        keys, values = (codes.unflatten(1, (run.pages, -1)).transpose(0, 1) for codes in (keys, values))
        key_field.copy_(pack(keys, bits))
        value_field.copy_(pack(values.transpose(-1, -2), bits))
        return
    stop = offset + keys.shape[1]
    replace_rows(key_field[0], keys, offset, PAGE_TOKENS, bits)
    dim = values.shape[-1]
    page = unpack(value_field[0], byte_table(bits, values.device), dim, PAGE_TOKENS).to(torch.uint8)  # [Hkv, D, 64]
    page[..., offset:stop] = values.transpose(-1, -2)  # a byte of values holds several tokens
    value_field[0] = pack(page, bits)


def unpack_keys(block: Block, table: Tensor, low_bit_kv: LowBitKV) -> Tensor:
    """Decode the key codes of N pages by `table` [256, 8 / b] -> float32 [N, Hkv, 64, D]."""
    return unpack(block.field("key_codes"), table, PAGE_TOKENS, low_bit_kv.head_dim)


def unpack_values(block: Block, table: Tensor, low_bit_kv: LowBitKV) -> Tensor:
    """Decode the value codes of N pages by `table` [256, 8 / b] -> float32 [N, Hkv, 64, D]."""
    return unpack(block.field("value_codes"), table, low_bit_kv.head_dim, PAGE_TOKENS).transpose(-1, -2)
