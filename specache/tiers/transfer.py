"""How rows get from main memory to the device that computes. The only place in `tiers/` that knows about CUDA.

On a CPU a row has arrived when it was read. On CUDA it is copied from pinned memory on a stream of its own; the consuming stream
waits for the copy's event, never the host for the device (paper section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
