"""What kernels take, and their interface for a decode step (`LayerStep`).

`specache.low_bit.layout` declares the byte layout of the low-bit copy.

Symbols: `B` sequences, `Hq` query heads, `Hkv` key-value heads, `G = Hq / Hkv`, `n` queries per
sequence and head, `S` low-bit tokens, `D` head dimension, `b` bits, `g` group size, `C = ceil(D b /
8)` bytes of codes per token, `Gv = ceil(D / min(g, D))` value groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

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


@dataclass(frozen=True)
class AttentionParams:
    """The constants of a layer's attention.

    Attributes:
        scaling: factor of the scores.
        softcap: `c` of `c tanh(score / c)` (Gemma 2), or `None`.
        sinks: [Hq], one logit per query head that joins the softmax and has no value (GPT-OSS), or
            `None`.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class RecentTokens:
    """The newest tokens of a sequence at 16 bits: the residual, then the step's own tokens.

    Attributes:
        keys, values: [Hkv, r, D], of equal strides and a contiguous last dimension. Query `i` of a
            step's `n` sees all but the last `n - 1 - i`.
        pending: how many of them, from the first, are quantised after the step (whole groups).
    """

    keys: Tensor
    values: Tensor
    pending: int = 0


class StoredRows(Protocol):
    """The 16-bit rows [Hkv, n, 2 D] of one layer of one sequence in main memory.

    They lie in blocks of 2**shift tokens: token p is token p % 2**shift of block p >> shift. With a
    shift of 63 all lie in one block.

    Attributes:
        version: changes with `addresses`.
        capacity: tokens for which there is memory.
        own_from: tokens from here on may be written; those before may be in other sequences too.
        strides: bytes from head to head of a block, and from token to token.
    """

    shift: int
    version: int
    capacity: int
    own_from: int
    strides: tuple[int, int]
    dtype: torch.dtype

    @property
    def addresses(self) -> np.ndarray:
        """The address of each block, int64 [N]."""


class InPlaceLayer(Protocol):
    """One layer of one sequence whose 16-bit rows lie in memory, for a step in one call.

    Attributes:
        index: the layer's number in the model.
        residual_count: tokens in the residual.
        kept: what a kernel backend keeps of the layer from step to step, `None` at first and after
            the residual or the tier was replaced.
    """

    index: int
    residual_count: int
    kept: KeptLayer | None

    @property
    def table(self) -> PagesInOrder:
        """The pages of the low-bit copy."""

    @property
    def low_bit_kv(self) -> LowBitKV: ...

    @property
    def channel_scales(self) -> Tensor | None:
        """`LowBitKV.channel_scales`."""

    @property
    def residual_buffer(self) -> Tensor:
        """The residual and room behind it, keys and values [2, Hkv, R + g, D]."""

    def rows_with_room(self, tokens: int) -> StoredRows:
        """Return the rows in memory, where `tokens` more may be written."""


class KeptLayer(Protocol):
    """What a kernel backend keeps of a layer from step to step."""

    def serves(self, backend: Any, dtype: torch.dtype) -> bool:
        """Return whether the layer's last step ran on this backend with queries of this dtype."""


class PagesInOrder(Protocol):
    """The pages of a layer: how many tokens they hold, and a number that changes with the pages."""

    length: int
    version: int

    @property
    def code(self) -> Code: ...


class HotRows(Protocol):
    """A hot set in C++: rows [Hkv, C, 2 D] of one sequence in slots.

    Attributes:
        native: the C++ object.
    """

    kv_rows: Tensor
    native: Any


@dataclass(frozen=True)
class CopyCounts:
    """What a layer of a step copied from main memory for one sequence.

    Attributes:
        selected: pairs of the real queries. `ready` of them were in the hot set.
        copied: rows, for this step and the next.
        seconds: the time that it took.
    """

    selected: int
    ready: int
    copied: int
    seconds: float


class LayerStep(Protocol):
    """The attention of one layer in one decode step, for a ragged batch (paper Algorithm 3).

    Making one scores every low-bit key and attends to the recent tokens. The caller then fetches
    rows and calls the rest, in the order that its policy needs. Use a step once. Positions are
    int64, ascending, -1 where there is no pair; ties go to the lower position.
    """

    def rescore(self, positions: Tensor, kv_rows: Tensor) -> None:
        """Replace the low-bit scores of fetched keys by exact ones, before `select`.

        Args:
            positions: [B, Hkv, n, k]; kv_rows: [B, Hkv, n, k, 2 D].
        """

    def select(self) -> Tensor:
        """Select each query's top-k [B, Hkv, n, k] by probability, averaged over a group."""

    def select_next(self) -> Tensor:
        """Select the last query's top-k among the low-bit positions of the next step, [B, Hkv, k].

        Pending tokens, which are quantised after this step, compete with their exact scores. Call
        it after `select`.
        """

    def attend_low_bit(self, positions: Tensor) -> None:
        """Attend to the low-bit copy without the pairs at `positions` [B, Hkv, n, k].

        It needs no rows, so that a caller can do it while they are read.
        """

    def attend_fetched(self, positions: Tensor, kv_rows: Tensor) -> Tensor:
        """Add the exact rows [B, Hkv, n, k, 2 D] of the same positions, and the recent tokens.

        Returns:
            float32 [B, Hq, n, D]. A step over static buffers returns [B, n, Hq, D] in the query's
            dtype, as the model takes it, which spares it a launch.
        """
