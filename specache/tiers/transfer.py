"""How rows get from main memory to the device that computes, and back. The only place in `tiers/` that knows about CUDA.

On a CPU a row has arrived when it was read. On CUDA it is copied from pinned memory on a stream of its own; the consuming stream
waits for the copy's event, never the host for the device (paper section 3.3). `Offload` and `HostMemory` are what a tier in main
memory needs of a device; `specache.device` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Offload(Protocol):
    """How keys and values get into rows in main memory while the device goes on computing."""

    def write(self, layer: int, into: Tensor, keys: Tensor, values: Tensor) -> None:
        """Have rows `into` [Hkv, n, 2 D] filled with keys and values [Hkv, n, D], which the caller may overwrite at once."""

    def arrived(self, layer: int) -> None:
        """Have the host wait until what was written of a layer is there."""

    def wait_for_offload(self) -> None:
        """What the device computes from now on finds everything there that was written."""

    def finish(self) -> None:
        """Have the host wait until nobody uses any rows any more: before their memory is given back."""


class HostMemory(Protocol):
    """Where the buffers of rows come from."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A buffer, contiguous, with whatever is in it.

        Raises:
            SlowTierError: there is no room.
        """

    def give_back(self, buffer: Tensor) -> None:
        """A buffer that was taken, and that nobody uses any more."""


@dataclass
class Arrival:
    """Rows on their way to the device. `host` keeps the pinned source alive until the copy is done."""

    rows: Tensor
    host: Tensor | None = None
    event: Any = None

    def wait(self) -> Tensor:
        """The rows, safe to use on the current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)
        return self.rows


class Transfer:
    """Copies gathered host rows to `device`; called on the thread that gathered them."""

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
