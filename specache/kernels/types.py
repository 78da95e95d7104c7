"""The low-bit copy as kernels take it. `specache.low_bit.layout` declares the byte layout.

Symbols: `B` sequences, `Hq` query heads, `Hkv` key-value heads, `G = Hq / Hkv`, `n` queries per
sequence and head, `S` low-bit tokens, `D` head dimension, `b` bits, `g` group size, `C = ceil(D b /
8)` bytes of codes per token, `Gv = ceil(D / min(g, D))` value groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specache.config import Code


@dataclass(frozen=True)
class PageRun:
    """`N` pages of one layer that are neighbours in the pool.

    Attributes:
        fields: views [N, Hkv, ...] of the layout's fields by name.
        pages: `N`.
    """

    fields: Mapping[str, Tensor]
    pages: int

    @cached_property
    def addresses(self) -> np.ndarray:
        """Address of each page's first field, the key codes, int64 [N]."""
        codes = self.fields["key_codes"]
        return codes.data_ptr() + np.arange(self.pages, dtype=np.int64) * codes.stride(0) * codes.itemsize

    @cached_property
    def device_addresses(self) -> Tensor:
        """The addresses int64 [N] on the pages' device, copied without waiting."""
        host, device = torch.from_numpy(self.addresses), self.fields["key_codes"].device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    def pages_from(self, start: int, stop: int) -> PageRun:
        """Return the run's pages `[start, stop)`."""
        return PageRun({name: field[start:stop] for name, field in self.fields.items()}, stop - start)


@dataclass(frozen=True)
class LowBitKV:
    """The low-bit copy of one layer of one sequence: `length` tokens in page runs, in token order.

    Attributes:
        channel_scales: float32 [Hkv, D], the factor of every key channel before rotation (see
            `specache.low_bit.key_scales`); `None` with KIVI's code.
    """

    code: Code
    bits: int
    group_size: int
    num_kv_heads: int
    head_dim: int
    length: int
    runs: tuple[PageRun, ...]
    channel_scales: Tensor | None = None

    @property
    def value_group_size(self) -> int:
        """Channels that share a scale in KIVI's value code."""
        return min(self.group_size, self.head_dim)
