"""Sources of a batch's 16-bit rows: device code reads them by position, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specache.errors import SlowTierError
from specache.kernels import triton as triton_kernels
from specache.kernels.triton.tables import to_device


class RowSource(Protocol):
    """The rows of one layer of a batch, [Hkv, capacity, 2 D] per sequence, with equal strides."""

    def gather(self, positions: Tensor) -> Tensor:
        """Read rows [B, Hkv, m, 2 D] of positions [B, Hkv, m] on the current stream; 0 at -1."""

    def replace(self, stored: Sequence[Tensor]) -> None:
        """Switch to other buffers of equal shape and strides (one grew, a sequence left)."""


class StoredRows:
    """Rows in CPU tensors, which PyTorch reads directly."""

    def __init__(self, stored: Sequence[Tensor]) -> None:
        self._stored = _alike(stored)

    def gather(self, positions: Tensor) -> Tensor:
        heads = torch.arange(positions.shape[1], device=positions.device).unsqueeze(1)
        kv_rows = torch.stack([kv_rows[heads, at] for kv_rows, at in zip(self._stored, positions.clamp(min=0), strict=True)])
        return kv_rows.masked_fill_((positions < 0).unsqueeze(-1), 0.0)

    def replace(self, stored: Sequence[Tensor]) -> None:
        self._stored = _replacement(self._stored, stored)


class MappedRows:
    """Rows that a kernel reads by address, in page-locked host memory or device memory.

    The addresses int64 [B] are in a static device buffer: a captured graph reads the rows that a
    later `replace` sets.

    Raises:
        SlowTierError: the rows are in pageable memory, which a kernel cannot read.
    """

    def __init__(self, stored: Sequence[Tensor], device: torch.device) -> None:
        self._stored = _readable(_alike(stored), device)
        self._kernels = triton_kernels.load()
        self.addresses = to_device(_addresses(stored), torch.int64, device)

    @property
    def like(self) -> Tensor:
        """The rows [Hkv, capacity, 2 D] of one sequence, for their dtype and strides."""
        return self._stored[0]

    def gather(self, positions: Tensor) -> Tensor:
        return self._kernels.gather_at(self.addresses, self.like, positions)

    def replace(self, stored: Sequence[Tensor]) -> None:
        self._stored = _readable(_replacement(self._stored, stored), self.addresses.device)
        self.addresses.copy_(to_device(_addresses(stored), torch.int64, self.addresses.device))


def row_source(stored: Sequence[Tensor], device: torch.device) -> RowSource:
    """Return the source of a layer's rows for decode steps on `device`."""
    in_pytorch = device.type == "cpu" and not triton_kernels.interpreted()
    return StoredRows(stored) if in_pytorch else MappedRows(stored, device)


def _addresses(stored: Sequence[Tensor]) -> list[int]:
    return [kv_rows.data_ptr() for kv_rows in stored]


def _alike(stored: Sequence[Tensor]) -> list[Tensor]:
    if len({(kv_rows.shape, kv_rows.stride(), kv_rows.dtype) for kv_rows in stored}) != 1:
        raise ValueError(
            "the row buffers of a batch must have one shape, one dtype and the same strides: reserve as many tokens in each"
        )
    return list(stored)


def _replacement(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    _alike([old[0], *new])
    if len(old) != len(new):
        raise ValueError(f"{len(new)} row buffers cannot replace those of {len(old)} sequences")
    return list(new)


def _readable(stored: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cuda" and not all(kv_rows.is_cuda or kv_rows.is_pinned() for kv_rows in stored):
        raise SlowTierError(
            "The 16-bit rows are in pageable memory, which the GPU cannot read by itself: the system did not lock as much. Free "
            "main memory, use a shorter context or fewer sequences at a time, or decode without static buffers."
        )
    return stored
