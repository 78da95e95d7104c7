"""Plain-PyTorch kernels over packed codes: portable, device-agnostic, and the fallback of every faster backend.

Codes are unpacked a block of pages at a time, never for a whole layer. Symbols: see `specache.kernels.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from specache.kernels.types import LowBitCopy, PageRun

BLOCK_BYTES = 1 << 20  # float32 codes unpacked at a time, unless one page is more
QUANTISE_PAGES = 16  # pages quantised at a time


def quantise(keys: Tensor, values: Tensor, copy: LowBitCopy, start: int) -> None:
    """Quantise and pack tokens `[start, start + n)` into the copy's pages (paper section 3.1, KIVI layout)."""
    done = 0
    for run, offset, count in _pieces(copy, start, keys.shape[1]):
        k, v = keys[:, done : done + count], values[:, done : done + count]  # [Hkv, count, D]
        _quantise_keys(k, run, offset, copy)
        _quantise_values(v, run, offset, copy)
        done += count


def _quantise_keys(keys: Tensor, run: PageRun, offset: int, copy: LowBitCopy) -> None:
    g, (heads, count, dim) = copy.group_size, keys.shape
    groups = keys.float().reshape(heads, count // g, g, dim)
    scale, zero = _scale_and_zero(groups.amin(2), groups.amax(2), copy.bits)  # [Hkv, groups, D]
    codes = _codes(groups, scale.unsqueeze(2), zero.unsqueeze(2), copy.bits).reshape(heads, count, dim)
    _store(run.key_codes, pack(codes, copy.bits), offset)
    _store(run.key_scale, scale, offset // g)
    _store(run.key_zero, zero, offset // g)


def _quantise_values(values: Tensor, run: PageRun, offset: int, copy: LowBitCopy) -> None:
    pieces = [_quantise_group(group, copy.bits) for group in values.float().split(copy.value_group_size, dim=-1)]
    codes, scale, zero = (torch.cat(part, dim=-1) for part in zip(*pieces, strict=True))
    _store(run.value_codes, pack(codes, copy.bits), offset)  # [Hkv, count, C]
    _store(run.value_scale, scale, offset)  # [Hkv, count, Gv]
    _store(run.value_zero, zero, offset)


def _quantise_group(group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """One group along the last dimension -> codes [..., group], scale [..., 1], zero point [..., 1]."""
    scale, zero = _scale_and_zero(group.amin(-1, keepdim=True), group.amax(-1, keepdim=True), bits)
    return _codes(group, scale, zero, bits), scale, zero


def _scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups with minimum `low` and maximum `high`, rounded to the 16 bits they are stored in."""
    if bits == 1:  # levels at the quarter points
        scale, zero = (high - low) / 2, (3 * low + high) / 4
    else:
        scale, zero = (high - low) / (2**bits - 1), low
    limit = torch.finfo(torch.float16).max
    return scale.clamp(max=limit).half(), zero.clamp(-limit, limit).half()


def _codes(group: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes from the rounded scale and zero point; a constant group (`scale` 0) gets code 0 and decodes to itself."""
    scale, zero = scale.float(), zero.float()
    steps = torch.where(scale > 0, (group - zero) / scale, 0.0)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> packed bytes [..., ceil(D b / 8)], first code in the lowest bits."""
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Packed bytes [..., C] -> float32 codes [..., dim]."""
    codes = torch.nn.functional.embedding(packed.int(), _byte_table(bits, packed.device))  # [..., C, 8 / b]
    return codes.flatten(-2)[..., :dim]


@lru_cache(maxsize=16)
def _byte_table(bits: int, device: torch.device) -> Tensor:
    """float32 [256, 8 / b]: the codes in each possible byte."""
    shifts = torch.arange(0, 8, bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)).float()


def score(
    query: Tensor,
    copies: Sequence[LowBitCopy],
    lengths: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Scores of every low-bit key, without forming a key: `q . k = sum_d (q_d s_d) c_d + sum_d q_d z_d`."""
    batch, num_heads, n, dim = query.shape
    heads = copies[0].num_kv_heads
    grouped = query.float().reshape(batch, heads, num_heads // heads * n, dim)  # [B, Hkv, G n, D]
    scores = grouped.new_full((*grouped.shape[:3], max(lengths)), -torch.inf)
    for b, (copy, length) in enumerate(zip(copies, lengths, strict=True)):
        for block, first, count in _blocks(copy, length):
            scores[b, :, :, first : first + count] = _score_block(grouped[b], block, copy)[..., :count]
    scores.mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
        for b, length in enumerate(lengths):
            scores[b, :, :, length:] = -torch.inf
    return scores.unflatten(2, (-1, n))  # [B, Hkv, G, n, S]


def _score_block(query: Tensor, block: Block, copy: LowBitCopy) -> Tensor:
    """query [Hkv, r, D] against a block of N pages -> [Hkv, r, N 64]."""
    codes = unpack(block.field("key_codes"), copy.bits, copy.head_dim)  # [N, Hkv, 64, D]
    codes = codes.unflatten(2, (-1, copy.group_size))  # [N, Hkv, 64/g, g, D]
    grouped = query[None, :, None]  # [1, Hkv, 1, r, D]
    scaled = grouped * block.field("key_scale").float().unsqueeze(3)  # [N, Hkv, 64/g, r, D]
    bias = block.field("key_zero").float() @ query.transpose(1, 2)  # [N, Hkv, 64/g, r]
    scores = scaled @ codes.transpose(3, 4) + bias.unsqueeze(-1)  # [N, Hkv, 64/g, r, g]
    return scores.permute(1, 3, 0, 2, 4).flatten(2)


def rescore(query: Tensor, scores: Tensor, positions: Tensor, rows: Tensor, scaling: float, softcap: float | None) -> None:
    """Replace the low-bit scores of fetched positions by exact ones, in place."""
    batch, heads, groups, n, _ = scores.shape
    dim = query.shape[-1]
    grouped = query.float().reshape(batch, heads, groups, n, dim)
    keys = rows[..., :dim].float()  # [B, Hkv, n, k, D]
    exact = torch.einsum("bhgnd,bhnkd->bhgnk", grouped, keys) * scaling
    if softcap is not None:
        exact = (exact / softcap).tanh_() * softcap
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    scores[b, h, :, r, positions[b, h, r, j]] = exact[b, h, :, r, j]


def select(scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    """The `k` largest probabilities per KV head and row, averaged over the `G` query heads.

    Linear in `S`: everything above the k-th largest value, then its equals from the lowest position up.
    """
    batch, heads, _, n, size = scores.shape
    k = min(k, size)
    if k == 0:
        return torch.empty(batch, heads, n, 0, dtype=torch.long, device=scores.device)
    mass = _mean_probabilities(scores, rest_lse)  # [B, Hkv, n, S]
    for b, length in enumerate(lengths):
        mass[b, ..., length:] = -1.0
    threshold = mass.topk(k, dim=-1).values[..., -1:]  # the k-th largest
    above = mass > threshold
    level = mass == threshold
    wanted = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    positions = wanted.nonzero()[:, -1].reshape(*mass.shape[:3], k)
    limits = torch.tensor(lengths, device=positions.device).view(-1, 1, 1, 1)
    return positions.where(positions < limits, -1)


def _mean_probabilities(scores: Tensor, rest_lse: Tensor) -> Tensor:
    """Mean over G of softmax probabilities; one query head of a group at a time, to hold no second copy of the scores."""
    groups = scores.shape[2]
    mass = torch.zeros_like(scores[:, :, 0])  # [B, Hkv, n, S]
    for g in range(groups):
        peak = scores[:, :, g].amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (scores[:, :, g] - peak).exp_()
        total = torch.logaddexp(peak + weights.sum(-1, keepdim=True).log(), rest_lse[:, :, g, :, None])
        mass.addcmul_(weights, (peak - total).exp() / groups)
    return mass


def attend(
    scores: Tensor, positions: Tensor, rows: Tensor, copies: Sequence[LowBitCopy], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Softmax over the copy and the weighted sum of its values, fetched positions read from `rows` instead."""
    batch, heads, groups, n, size = scores.shape
    dim = copies[0].head_dim
    if size == 0:
        shape = (batch, heads, groups, n)
        return scores.new_zeros(*shape, dim), scores.new_full(shape, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    weights.div_(total.clamp(min=torch.finfo(torch.float32).tiny))

    fetched = torch.zeros(batch, heads, groups, n, positions.shape[-1], device=scores.device)
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    fetched[b, h, :, r, j] = weights[b, h, :, r, positions[b, h, r, j]]
    weights[b, h, :, r, positions[b, h, r, j]] = 0.0
    out = torch.einsum("bhgnk,bhnkd->bhgnd", fetched, rows[..., dim:].float())
    for i, (copy, length) in enumerate(zip(copies, lengths, strict=True)):
        flat = weights[i].flatten(1, 2)  # [Hkv, G n, S]
        for block, first, count in _blocks(copy, length):
            out[i] += _attend_block(flat[..., first : first + count], block, copy).unflatten(1, (groups, n))
    return out, lse


def _attend_block(weights: Tensor, block: Block, copy: LowBitCopy) -> Tensor:
    """weights [Hkv, r, T] over the first T tokens of a block -> [Hkv, r, D]: `sum_t (p_t s_t) c_t + sum_t p_t z_t`."""
    count = weights.shape[-1]
    codes = _by_head(unpack(block.field("value_codes"), copy.bits, copy.head_dim), count)  # [Hkv, T, D]
    scale = _by_head(block.field("value_scale").float(), count)  # [Hkv, T, Gv]
    zero = _by_head(block.field("value_zero").float(), count)
    bias = weights @ zero  # [Hkv, r, Gv]
    parts = [
        (weights * scale[..., j].unsqueeze(1)) @ group + bias[..., j : j + 1]
        for j, group in enumerate(codes.split(copy.value_group_size, dim=-1))
    ]
    return torch.cat(parts, dim=-1)


def _by_head(block: Tensor, count: int) -> Tensor:
    """[N, Hkv, 64, X] -> [Hkv, count, X], tokens in order."""
    return block.transpose(0, 1).flatten(1, 2)[:, :count]


def dequantise(copy: LowBitCopy) -> tuple[Tensor, Tensor]:
    """The whole copy as float32 keys and values [Hkv, length, D]. For tests and tools; no step calls it."""
    keys, values = [], []
    for block, _, count in _blocks(copy, copy.length):
        codes = unpack(block.field("key_codes"), copy.bits, copy.head_dim).unflatten(2, (-1, copy.group_size))
        scale, zero = (block.field(name).float().unsqueeze(3) for name in ("key_scale", "key_zero"))
        keys.append(_by_head((codes * scale + zero).flatten(2, 3), count))
        scale, zero = (
            block.field(name).float().repeat_interleave(copy.value_group_size, -1)[..., : copy.head_dim]
            for name in ("value_scale", "value_zero")
        )
        values.append(_by_head(unpack(block.field("value_codes"), copy.bits, copy.head_dim) * scale + zero, count))
    empty = torch.empty(copy.num_kv_heads, 0, copy.head_dim)
    return torch.cat(keys or [empty], dim=1), torch.cat(values or [empty], dim=1)


def _blocks(copy: LowBitCopy, length: int) -> Iterator[tuple[Block, int, int]]:
    """Pages in blocks of bounded size -> (block, first token, tokens that count)."""
    if not length:
        return
    page_tokens = copy.runs[0].key_codes.shape[2]
    room = step = max(1, BLOCK_BYTES // (4 * copy.num_kv_heads * page_tokens * copy.head_dim))
    block, first = Block(), 0
    remaining = -(-length // page_tokens)
    for run in copy.runs:
        start = 0
        while remaining and start < run.pages:
            count = min(room, run.pages - start, remaining)
            block.append(run.pages_from(start, start + count))
            start, room, remaining = start + count, room - count, remaining - count
            if room == 0 or remaining == 0:
                tokens = (step - room) * page_tokens
                yield block, first, min(tokens, length - first)
                block, first, room = Block(), first + tokens, step


class Block(list[PageRun]):
    """A few pages of a layer, wherever they lie in the pool."""

    def field(self, name: str) -> Tensor:
        """One field of all pages [N, ...]: a view of neighbouring pages, else a copy of the packed bytes."""
        parts = [getattr(run, name) for run in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(copy: LowBitCopy, start: int, count: int) -> Iterator[tuple[PageRun, int, int]]:
    """Where tokens `[start, start + count)` go -> (pages, offset in the first page, tokens): part of one page, or whole pages."""
    tokens = copy.runs[0].key_codes.shape[2]
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


def _store(field: Tensor, data: Tensor, offset: int) -> None:
    """Write data [Hkv, count, X] into a page field [N, Hkv, slots, X] from slot `offset` of its first page."""
    if field.shape[0] == 1:
        field[0, :, offset : offset + data.shape[1]] = data
    else:
        field.copy_(data.unflatten(1, (field.shape[0], -1)).transpose(0, 1))
