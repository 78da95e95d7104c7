"""Transfer rows between main memory and the computing device.

This file and `streams` are the only ones in `tiers/` that know CUDA. On a CPU a row has arrived
when it was read. On CUDA it is copied from pinned memory on a separate stream. The consuming stream
waits for the copy's event, never the host for the device (paper section 3.3). `Offload` and
`HostMemory` are what a tier in main memory needs from a device; `offload` and `pinned` implement
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Transferred = Callable[[], Tensor]  # returns rows, safe to use on the current stream


class Offload(Protocol):
    """Asynchronous copies of keys and values into rows in main memory."""

    def write(self, layer: int, into: Tensor, keys: Tensor, values: Tensor) -> None:
        """Queue a copy of keys and values [Hkv, n, D] to rows `into` [Hkv, n, 2 D].

        The caller may overwrite keys and values at once.
        """

    def arrived(self, layer: int) -> None:
        """Block the host until everything written of a layer has arrived."""

    def wait_for_offload(self) -> None:
        """Make device work queued from now on wait for everything written so far."""

    def finish(self) -> None:
        """Block the host until no rows are in use any more, before their memory is freed."""


class HostMemory(Protocol):
    """Source of row buffers."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous buffer with undefined content.

        Raises:
            SlowTierError: there is no room.
        """

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer that is no longer in use."""


def upload(keys: Tensor, values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy keys and values [Hkv, n, D] of a tier to a device.

    Halves of rows `[K | V]`, as they are in main memory, are copied as rows, head by head. Each
    head is contiguous, so that a copy from page-locked memory is queued at once. Any other copy
    would first gather the halves on the host, which waits.
    """
    kv_rows = _joined(keys, values)
    if kv_rows is None:
        return keys.to(device), values.to(device)
    into = torch.empty(kv_rows.shape, dtype=kv_rows.dtype, device=device)
    for head, stored in zip(into, kv_rows, strict=True):
        head.copy_(stored, non_blocking=True)
    dim = keys.shape[2]
    return into[..., :dim], into[..., dim:]


def _joined(keys: Tensor, values: Tensor) -> Tensor | None:
    """Return the rows [Hkv, n, 2 D] whose halves these are, a view; `None` if they are not."""
    heads, count, dim = keys.shape
    halves = keys.stride() == values.stride() and keys.stride()[1:] == (2 * dim, 1)
    if not halves or keys.dtype != values.dtype or values.data_ptr() != keys.data_ptr() + dim * keys.element_size():
        return None
    return keys.as_strided((heads, count, 2 * dim), keys.stride())


def on_host(kv_rows: Tensor) -> Transferred:
    """Transfer rows that are used where they are."""
    return lambda: kv_rows


class Transfer:
    """Copies gathered host rows to `device`, on the calling thread (`tiers.base.Fetch`)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, host: Tensor) -> Transferred:
        """Start to copy rows; return a function that returns them for use on the current stream."""
        if self._stream is None:
            return on_host(host.to(self.device))
        pinned = host if host.is_pinned() else host.pin_memory()
        with torch.cuda.stream(self._stream):
            kv_rows = pinned.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return partial(_after, event, kv_rows, pinned)


def _after(event: torch.cuda.Event, kv_rows: Tensor, _pinned: Tensor) -> Tensor:
    """Return rows for use on the current stream. Their source `_pinned` is alive until then."""
    stream = torch.cuda.current_stream(kv_rows.device)
    stream.wait_event(event)
    kv_rows.record_stream(stream)
    return kv_rows
