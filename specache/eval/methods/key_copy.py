"""A low-bit copy of keys without values, by which a method chooses the keys that it fetches."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS
from specache.kernels.torch import operations
from specache.kernels.types import AttentionParams, LowBitKV, PageRun
from specache.low_bit.layout import PageLayout


class KeyCopy:
    """The key fields of pages of 64 tokens, in any code of `specache.low_bit.layout`.

    Args:
        layout: the pages. Of their fields only those of the keys are kept.
        device: where they are kept.
        channel_scales: [Hkv, D], for the rotated code (`specache.low_bit.key_scales`).

    Attributes:
        length: tokens in the copy.
    """

    def __init__(self, layout: PageLayout, device: torch.device, channel_scales: Tensor | None = None) -> None:
        self.length = 0
        self._layout = layout
        self._device = device
        self._channel_scales = channel_scales
        self._fields = {name: field for name, field in self._zero_pages(0).items() if name.startswith("key_")}
        self._decoded: Tensor | None = None  # float32 [Hkv, D, length], for speed only: not counted in `nbytes`

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and means, and of the channel scales."""
        scales = 0 if self._channel_scales is None else self._channel_scales.nbytes
        return scales + sum(field.nbytes for field in self._fields.values())

    def append(self, keys: Tensor) -> None:
        """Quantise the next keys [Hkv, n, D], whole groups."""
        start, self.length = self.length, self.length + keys.shape[1]
        pages = -(-self.length // PAGE_TOKENS)
        new = self._zero_pages(pages - self._pages)
        self._fields = {name: torch.cat([field, new[name]]) for name, field in self._fields.items()}
        first = start // PAGE_TOKENS
        written = {name: field[first:] for name, field in self._fields.items()}
        # the kernel quantises pairs: the values are zeros, and their fields are dropped
        run = PageRun({**self._zero_pages(pages - first), **written}, pages - first)
        low_bit_kv = self._layout.low_bit_kv((run,), self.length - first * PAGE_TOKENS, self._channel_scales)
        operations.quantise(keys, torch.zeros_like(keys), low_bit_kv, start - first * PAGE_TOKENS)
        self._decoded = None

    def scores(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Score query [Hq, 1, D] against every key -> float32 [Hkv, G, length], scaled."""
        if self._decoded is None:
            self._decoded = self._decode()
        scores = (query[:, 0].float().unflatten(0, (len(self._decoded), -1)) @ self._decoded).mul_(params.scaling)
        if params.softcap is not None:
            scores.div_(params.softcap).tanh_().mul_(params.softcap)
        return scores

    def _decode(self) -> Tensor:
        """Return the keys of the copy, float32 [Hkv, D, length].

        A score is a sum over a query's elements, so each unit vector's scores are one row.
        """
        low_bit_kv = self._low_bit_kv
        units = torch.eye(low_bit_kv.head_dim, device=self._device).repeat(low_bit_kv.num_kv_heads, 1)
        return operations.score(units[None, :, None], [low_bit_kv], [self.length], 1.0, None)[0, :, :, 0]

    @property
    def _pages(self) -> int:
        return len(self._fields["key_codes"])

    @property
    def _low_bit_kv(self) -> LowBitKV:
        return self._layout.low_bit_kv((PageRun(self._fields, self._pages),), self.length, self._channel_scales)

    def _zero_pages(self, count: int) -> dict[str, Tensor]:
        """Return all fields of `count` pages, a tensor each."""
        fields = self._layout.fields.items()
        return {name: torch.zeros(count, *field.shape, dtype=field.dtype, device=self._device) for name, field in fields}
