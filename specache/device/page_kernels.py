"""The kernels of a static step: pages by address, lengths and positions in device memory.

On CUDA they are Triton's. `TorchPages` does the same in PyTorch on the CPU, for tests. It copies
the pages at the table's addresses at every call, so it sees a table that was overwritten. No shape
depends on the contents of a tensor.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specache.config import Code, TopK
from specache.kernels import dispatch
from specache.kernels import triton as triton_kernels
from specache.kernels.blocks import blocks
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.tables import FIELDS, Offsets, PageScores, PageTables
from specache.kernels.types import AttentionParams, LowBitKV
from specache.low_bit.layout import PageLayout

_library = torch.library.Library("specache_device", "FRAGMENT")
_library.define("read_pages(Tensor addresses, int page_bytes) -> Tensor")


class RecentPart(NamedTuple):
    """Attention over the tokens outside the low-bit copy, float32."""

    out: Tensor  # [B, Hkv, G, n, D]
    lse: Tensor  # [B, Hkv, G, n], sinks included
    own_lse: Tensor  # the same without sinks


class PageKernels(Protocol):
    """Kernels of one layer, for as many low-bit tokens as its page tables have room for.

    Shapes and meanings are those of `specache.kernels.dispatch`. Lengths are those of the tables,
    int32 [B] on the device.
    """

    def score(
        self, query: Tensor, tables: PageTables, channel_scales: Tensor | None, scaling: float, softcap: float | None
    ) -> PageScores:
        """Score every low-bit key.

        Args:
            query: [B, Hq, n, D].
            channel_scales: float32 [B, Hkv, D], the key scales of the rotated code.

        Returns:
            Scores [B, Hkv, G, n, capacity].
        """

    def select(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, top_k: TopK) -> Tensor:
        """Select positions [B, Hkv, n, k of `capacity` tokens], ascending, then -1."""

    def rescore(
        self, query: Tensor, scores: PageScores, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Replace the scores of the fetched keys by exact ones, in place."""

    def attend(self, scores: PageScores, positions: Tensor, kv_rows: Tensor, tables: PageTables) -> tuple[Tensor, Tensor]:
        """Return (out [B, Hkv, G, n, D], lse [B, Hkv, G, n]). Destroys scores."""

    def recent(
        self, query: Tensor, keys: Tensor, values: Tensor, residual: Tensor, counts: Tensor, finite: Tensor, params: AttentionParams
    ) -> RecentPart | None:
        """Attend to the tokens outside the low-bit copy in one launch (`triton.recent_backend`).

        Returns `None` where the caller must use PyTorch's operations.
        """

    def join(self, low_bit_part: tuple[Tensor, Tensor], recent: RecentPart, dtype: torch.dtype) -> Tensor:
        """Merge both parts -> [B, n, Hq, D] in the model's dtype."""


def page_kernels(layout: PageLayout, device: torch.device) -> PageKernels:
    """Return the kernels for a device. Check `unsupported_reason` first."""
    return TorchPages(layout) if _in_pytorch(device) else TritonPages(layout)


def unsupported_reason(device: torch.device, dim: int, dtype: torch.dtype, group_size: int, code: Code) -> str | None:
    """Return why layers of this kind are unsupported on a device, or `None`."""
    if _in_pytorch(device):
        return None
    if device.type == "cuda" and dispatch.forces_torch():
        return f"{dispatch.VARIABLE} asks for PyTorch's kernels"
    if device.type == "cuda" and (reason := triton_kernels.unsupported_reason(device)):
        return reason
    return triton_kernels.load().unsupported_reason(dim, dtype, group_size, code)


def build_errors(device: torch.device) -> tuple[type[Exception], ...]:
    """Return the exceptions that are raised where a kernel cannot be compiled or loaded."""
    return () if _in_pytorch(device) else triton_kernels.build_errors()


def _in_pytorch(device: torch.device) -> bool:
    return device.type == "cpu" and not triton_kernels.interpreted()


class TritonPages:
    """Triton's kernels, with grids sized for the capacity of the page tables."""

    def __init__(self, layout: PageLayout) -> None:
        self._kernels, self._recent = triton_kernels.load(), triton_kernels.load_recent()
        self._low_bit_kv = layout.low_bit_kv((), 0)  # for its layout only
        self._offsets = Offsets(*(layout.fields[name].offset if name in layout.fields else -1 for name in FIELDS))

    def score(
        self, query: Tensor, tables: PageTables, channel_scales: Tensor | None, scaling: float, softcap: float | None
    ) -> PageScores:
        return self._kernels.score_pages(query, tables, channel_scales, self._offsets, self._low_bit_kv, scaling, softcap)

    def select(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, top_k: TopK) -> Tensor:
        return self._kernels.select_pages(scores, rest_lse, lengths, top_k)

    def rescore(
        self, query: Tensor, scores: PageScores, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        self._kernels.rescore_pages(query, scores, positions, kv_rows, scaling, softcap)

    def attend(self, scores: PageScores, positions: Tensor, kv_rows: Tensor, tables: PageTables) -> tuple[Tensor, Tensor]:
        return self._kernels.attend_pages(scores, positions, kv_rows, tables, self._offsets, self._low_bit_kv)

    def recent(
        self, query: Tensor, keys: Tensor, values: Tensor, residual: Tensor, counts: Tensor, finite: Tensor, params: AttentionParams
    ) -> RecentPart:
        scaling, softcap, sinks = params.scaling, params.softcap, params.sinks
        return RecentPart(*self._recent.attend_recent(query, keys, values, residual, counts, finite, scaling, softcap, sinks))

    def join(self, low_bit_part: tuple[Tensor, Tensor], recent: RecentPart, dtype: torch.dtype) -> Tensor:
        return self._recent.join(*low_bit_part, *recent, dtype)


class TorchPages:
    """The plain PyTorch kernels of `kernels.torch.operations`, over page tables."""

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout

    def score(
        self, query: Tensor, tables: PageTables, channel_scales: Tensor | None, scaling: float, softcap: float | None
    ) -> PageScores:
        low_bit_kvs = self._low_bit_kvs(tables, channel_scales)
        scores = torch_ops.score(query, low_bit_kvs, [tables.capacity] * len(low_bit_kvs), scaling, softcap)
        return PageScores(scores.masked_fill_(_behind(tables.lengths, tables.capacity), -torch.inf))

    def select(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, top_k: TopK) -> Tensor:
        size = scores.values.shape[-1]
        mean_prob = torch_ops.mean_probabilities(scores.values, rest_lse)  # [B, Hkv, n, S]
        mean_prob.masked_fill_(_behind(lengths, size).squeeze(2), -1.0)
        k, few = top_k.of(size), min(top_k.short, size)
        wanted = torch_ops.largest(mean_prob, k)
        if few < k:
            short = (lengths < top_k.long_from).view(-1, 1, 1, 1)
            wanted = torch.where(short, torch_ops.largest(mean_prob, few), wanted)
        slots = torch.arange(size, device=lengths.device).expand_as(wanted).masked_fill(~wanted, size)
        positions = slots.sort(dim=-1).values[..., :k]
        return positions.where(positions < lengths.view(-1, 1, 1, 1), -1)

    def rescore(
        self, query: Tensor, scores: PageScores, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        values = scores.values
        exact = torch_ops.exact_scores(query, values, kv_rows, scaling, softcap)  # [B, Hkv, G, n, k]
        padded = torch.nn.functional.pad(values, (0, 1))
        padded.scatter_(-1, _slots(positions, values), exact)
        values.copy_(padded[..., : values.shape[-1]])

    def attend(self, scores: PageScores, positions: Tensor, kv_rows: Tensor, tables: PageTables) -> tuple[Tensor, Tensor]:
        groups, n, size = scores.values.shape[2:]
        weights, lse = torch_ops.softmax(scores.values)
        padded = torch.nn.functional.pad(weights, (0, 1))
        slots = _slots(positions, scores.values)
        fetched = padded.gather(-1, slots)  # 0 where there is no pair
        padded.scatter_(-1, slots, 0.0)
        fetched_values = kv_rows[..., kv_rows.shape[-1] // 2 :].float().masked_fill((positions < 0).unsqueeze(-1), 0.0)
        out = torch.einsum("bhgnk,bhnkd->bhgnd", fetched, fetched_values)
        for b, low_bit_kv in enumerate(self._low_bit_kvs(tables, None)):
            low_bit = self._values(low_bit_kv, padded[b, ..., :size].flatten(1, 2))
            out[b] += low_bit.unflatten(1, (groups, n))
        return out, lse

    def recent(
        self, query: Tensor, keys: Tensor, values: Tensor, residual: Tensor, counts: Tensor, finite: Tensor, params: AttentionParams
    ) -> None:
        return None

    def join(self, low_bit_part: tuple[Tensor, Tensor], recent: RecentPart, dtype: torch.dtype) -> Tensor:
        out, lse = low_bit_part
        total = torch.logaddexp(lse, recent.lse)
        weight = (recent.own_lse - total).exp().unsqueeze(-1)
        joined = out * (lse - total).exp().unsqueeze(-1) + recent.out * weight  # [B, Hkv, G, n, D]
        return joined.flatten(1, 2).transpose(1, 2).to(dtype)

    def _values(self, low_bit_kv: LowBitKV, weights: Tensor) -> Tensor:
        """Sum values with weights [Hkv, G n, S] -> [Hkv, G n, D]."""
        values = torch_ops.CODES[low_bit_kv.code].ValueSum(low_bit_kv)
        for block, first, count in blocks(low_bit_kv, low_bit_kv.length):
            values.add(weights[..., first : first + count], block)
        return values.result()

    def _low_bit_kvs(self, tables: PageTables, channel_scales: Tensor | None) -> list[LowBitKV]:
        """Return every sequence's current low-bit copy, padded to the capacity with zero pages."""
        batch, count = tables.addresses.shape
        pages = torch.ops.specache_device.read_pages(tables.addresses.flatten(), self._layout.page_bytes)
        runs = [self._layout.run(pages, b * count, count) for b in range(batch)]
        of_sequence = [None] * len(runs) if channel_scales is None else list(channel_scales)
        return [self._layout.low_bit_kv((run,), tables.capacity, w) for run, w in zip(runs, of_sequence, strict=True)]


def _behind(lengths: Tensor, size: int) -> Tensor:
    """Return which slots are at or past a sequence's length, bool [B, 1, 1, 1, S]."""
    return torch.arange(size, device=lengths.device) >= lengths.view(-1, 1, 1, 1, 1)


def _slots(positions: Tensor, scores: Tensor) -> Tensor:
    """Expand positions [B, Hkv, n, k] to [B, Hkv, G, n, k]; -1 becomes the slot past the end."""
    slots = positions.masked_fill(positions < 0, scores.shape[-1])
    return slots.unsqueeze(2).expand(-1, -1, scores.shape[2], -1, -1)


def _read_pages(addresses: Tensor, page_bytes: int) -> Tensor:
    """Copy the pages at addresses int64 [N] -> uint8 [N, page bytes]; zeros at address 0."""
    pages = torch.zeros(len(addresses), page_bytes, dtype=torch.uint8)
    for page, address in zip(pages, addresses.tolist(), strict=True):
        if address:
            ctypes.memmove(page.data_ptr(), address, page_bytes)
    return pages


_library.impl("read_pages", _read_pages, "CPU")
