"""Copy keys and values from a device to rows in main memory while the next layer computes."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.tiers.streams import Event, Queue, Streams


class StreamedOffload:
    """Asynchronous writes of a tier in main memory (`tiers.transfer.Offload`).

    Only readers wait. A reader on the host calls `arrived`. Kernels that read rows in place need
    one `wait_for_offload` after a write, outside of a graph's capture. One offload may serve the
    tiers of many sequences: waiting for one then waits for all.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._computed = streams.event()
        self._written: dict[int, Event] = {}  # by layer

    def write(self, layer: int, into: Tensor, keys: Tensor, values: Tensor) -> None:
        joined = torch.empty(into.shape, dtype=into.dtype, device=keys.device)
        self._streams.run(Queue.COMPUTE, lambda: join_pairs(keys, values, joined))
        self._streams.share(joined)
        self._streams.record(Queue.COMPUTE, self._computed)
        self._streams.wait(Queue.COPY, self._computed)
        self._streams.run(Queue.COPY, lambda: copy_heads(joined, into))
        if layer not in self._written:
            self._written[layer] = self._streams.event()
        self._streams.record(Queue.COPY, self._written[layer])

    def wait_for_offload(self) -> None:
        """Make work queued for computing from now on wait for every row written so far."""
        for event in self._written.values():
            self._streams.wait(Queue.COMPUTE, event)

    def arrived(self, layer: int) -> None:
        if layer in self._written:
            self._streams.synchronize(self._written[layer])

    def finish(self) -> None:
        self._streams.drain()


def join_pairs(keys: Tensor, values: Tensor, joined: Tensor) -> None:
    """Write keys and values [Hkv, n, D] as rows `[K | V]` [Hkv, n, 2 D] into `joined`."""
    torch.cat([keys, values], dim=-1, out=joined)


def copy_heads(joined: Tensor, into: Tensor) -> None:
    """Copy head by head: each is contiguous, and any other copy to the host would block it."""
    for head, rows in zip(joined, into, strict=True):
        rows.copy_(head, non_blocking=True)
