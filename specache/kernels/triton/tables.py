"""Page tables on the device: the addresses of the pages of every sequence of a batch.

Kernels read pages by address, through a table and lengths in device memory. A captured CUDA graph
can be replayed after both were overwritten in place. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS
from specache.kernels.types import LowBitKV

FIELDS = ("key_codes", "key_scale", "key_zero", "key_mean", "value_codes", "value_scale", "value_zero")


@dataclass(frozen=True)
class PageTables:
    """The pages of `B` sequences of one layer.

    Attributes:
        addresses: int64 [B, capacity / 64], the first byte of each page, in token order; behind a
            sequence's last page 0 or stale.
        lengths: int32 [B], low-bit tokens of each sequence.
    """

    addresses: Tensor
    lengths: Tensor

    @property
    def capacity(self) -> int:
        """Low-bit tokens per sequence that scores have room for."""
        return self.addresses.shape[1] * PAGE_TOKENS


@dataclass
class PageScores:
    """Scores [B, Hkv, G, n, capacity] over the low-bit copy, passed between kernels.

    For a 16-bit model they are float16, relative to the largest score of their group of tokens. So
    the largest scores are near 0, where float16 is finest, and half as many bytes pass through
    memory. Exact scores of fetched keys are kept beside them.

    Attributes:
        values: float32; or float16, undefined past a sequence's length.
        peaks: float32 [B, Hkv, G, n, capacity / g], to which float16 values are relative; `None`
            with float32.
        totals: the same shape: sums of `exp(value)` of each group, before `rescore`.
        exact: float32 [B, Hkv, G, n, k] of the fetched keys, after `rescore`.
    """

    values: Tensor
    peaks: Tensor | None = None
    totals: Tensor | None = None
    exact: Tensor | None = None

    @property
    def is_half(self) -> bool:
        return self.peaks is not None

    def last_row(self, lengths: Tensor) -> Tensor:
        """Return absolute scores float32 [B, Hkv, G, 1, capacity] of the last query, a copy.

        They are -inf past the lengths int32 [B].
        """
        values = self.values[:, :, :, -1:].float()
        if self.peaks is not None:
            peaks = self.peaks[:, :, :, -1:]
            values = (values.unflatten(-1, (peaks.shape[-1], -1)) + peaks.unsqueeze(-1)).flatten(-2)
        behind = torch.arange(values.shape[-1], device=values.device) >= lengths.view(-1, 1, 1, 1, 1)
        return values.masked_fill(behind, -torch.inf)


@dataclass(frozen=True)
class Offsets:
    """Byte offsets of the fields in a page; -1 for those that the page's code does not have."""

    key_codes: int
    key_scale: int
    key_zero: int
    key_mean: int
    value_codes: int
    value_scale: int
    value_zero: int


def to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a tensor [N] on the device, through pinned memory, queued like a kernel."""
    host = torch.tensor(numbers, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def offsets_of(low_bit_kv: LowBitKV) -> Offsets:
    """Return the field offsets of a low-bit copy's pages; it must have one."""
    fields = low_bit_kv.runs[0].fields
    start = fields["key_codes"].data_ptr()
    return Offsets(*(fields[name].data_ptr() - start if name in fields else -1 for name in FIELDS))
