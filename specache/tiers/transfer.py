"""Transfer rows between main memory and the computing device.

This file and `streams` are the only ones in `tiers/` that know CUDA. On a CPU a row has arrived
when it was read. On CUDA it is copied from pinned memory on a separate stream. The consuming stream
waits for the copy's event, never the host for the device (paper section 3.3). `Offload` and
`HostMemory` are what a tier in main memory needs from a device; `offload` and `pinned` implement
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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


@dataclass
class Arrival:
    """Rows in transfer to the device.

    `host` keeps the pinned source alive until the copy is done.
    """

    rows: Tensor
    host: Tensor | None = None
    event: Any = None

    def wait(self) -> Tensor:
        """Return the rows, safe to use on the current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)
        return self.rows


class Transfer:
    """Copies gathered host rows to `device`, on the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, host: Tensor) -> Arrival:
        if self._stream is None:
            return Arrival(host.to(self.device))
        pinned = host if host.is_pinned() else host.pin_memory()
        with torch.cuda.stream(self._stream):
            rows = pinned.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(rows, pinned, event)
