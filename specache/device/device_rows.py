"""Fetch the 16-bit rows of one layer of a batch for a decode step on a device, through a hot set.

Rows are prefetched for the next step, and the host never waits (paper section 3.3). Two queues run
in parallel, ordered by events (`->`):

    compute: read slots | claim slots for the draft -> claimed     arrived -> next step reads slots
    copy:                                   claimed -> write those slots -> arrived

- `claimed`: compute no longer reads the slots that the copy overwrites, and has written which rows
  to read and the slots they go to.
- `arrived`: the layer's rows are in their slots. The next step waits for it when it reaches this
  layer.
- `asked` and `fetched` do the same inside a step where missing rows are read on the copy queue
  (`ReadPath.COPY`).

Only compute rewrites a buffer that both queues use, after it has waited for the copy that read it.
Events and buffers are created once. A batch's positions are int64 [B, Hkv, k], ascending, -1 where
there is no pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.sources import RowSource
from specache.tiers.streams import Event, Queue, Streams


class RowCounters:
    """Running totals of all layers of a batch, on the device. `read` transfers them to the host.

    Attributes:
        totals: int64 [3]: (KV head, position) pairs that the real query selected, those of them
            that had to be read, and pairs that were prefetched.
    """

    def __init__(self, device: torch.device, row_bytes: int) -> None:
        self.totals = torch.zeros(3, dtype=torch.int64, device=device)
        self._row_bytes = row_bytes

    def add_step(self, selected: Tensor, missing: Tensor) -> None:
        """Count the true elements of two bool tensors."""
        self.totals[:2].add_(torch.stack([selected, missing]).flatten(1).sum(1))

    def add_read(self, read: Tensor) -> None:
        """Count the true elements of a bool tensor as prefetched pairs."""
        self.totals[2].add_(read.sum())

    def read(self, streams: Streams) -> tuple[int, int, int]:
        """Return (rows selected, rows ready, bytes fetched). Waits for the device."""
        streams.finish(Queue.COMPUTE)
        selected, missing, ahead = self.totals.tolist()
        return selected, selected - missing, (missing + ahead) * self._row_bytes


class StepBuffers:
    """Buffers for the rows of one layer's attention. All layers of a batch use them in turn.

    Attributes:
        kv_rows: [n, B, Hkv, k, 2 D] for the step's `n` queries: the real one first, the draft last.
        positions: int64 [n, B, Hkv, k] of the rows, -1 where there is no row.
        missing: int64 [B, Hkv, k], positions of the real query that must be read, -1 elsewhere.
        slots: int64 [B, Hkv, k], hot-set slots that the missing rows go to.
        found: int64 [B, Hkv, k], slots of the others.
        victims: int64 [B, Hkv, k], scratch memory of a kernel.
        fetched: [B, Hkv, k, 2 D], the missing rows once they are read.
    """

    def __init__(
        self, batch: int, num_kv_heads: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device, queries: int = 2
    ) -> None:
        shape = (batch, num_kv_heads, top_k)
        self.kv_rows = torch.zeros(queries, *shape, width, dtype=dtype, device=device)
        self.positions = torch.full((queries, *shape), -1, device=device)
        self.missing = torch.full(shape, -1, device=device)
        self.slots, self.found, self.victims = (torch.full(shape, -1, device=device) for _ in range(3))
        self.fetched = torch.zeros(*shape, width, dtype=dtype, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return self.kv_rows, self.positions, self.missing, self.slots, self.found, self.victims, self.fetched

    @property
    def kv_rows_by_query(self) -> Tensor:
        """A view of the rows in the shape that kernels take, [B, Hkv, n, k, 2 D]."""
        return self.kv_rows.permute(1, 2, 0, 3, 4)

    @property
    def positions_by_query(self) -> Tensor:
        """A view of the positions in the shape that kernels take, [B, Hkv, n, k]."""
        return self.positions.permute(1, 2, 0, 3)


class DeviceRowFetcher:
    """Fetches rows of one layer of a batch of `B` sequences, without waiting for the device.

    In eager mode call `begin_step`, `fetch`, `available`, `submit` in a step, layer by layer.
    Compute waits for a layer's prefetch when the next step reaches the layer. A replay of a CUDA
    graph cannot wait for an event of the replay before: call `join` of every layer at the end of
    the captured step, and once before the capture. Prefetches then have to end within the step.
    Rows must be in the source and offloaded (`RamTier.wait_for_offload`, outside of a capture)
    before they are fetched.

    Args:
        source: reads the rows.
        hot: the layer's hot set, with at least `k` slots.
        buffers: shared with the other layers.
        streams: the two queues. The constructor creates this layer's events.
        counters: shared with the other layers.
        read: the queue on which missing rows are read.
    """

    def __init__(
        self,
        source: RowSource,
        hot: DeviceHotSet,
        buffers: StepBuffers,
        streams: Streams,
        counters: RowCounters,
        read: ReadPath = ReadPath.MAPPED,
    ) -> None:
        top_k = buffers.missing.shape[-1]
        if hot.capacity < top_k:
            raise ValueError(f"a hot set of {hot.capacity} slots cannot hold the {top_k} rows of a step")
        self.source, self.hot = source, hot
        self._buffers, self._streams, self._counters, self._read = buffers, streams, counters, read
        self._claimed, self._arrived, self._asked, self._fetched = (streams.event() for _ in range(4))
        self._ahead = torch.full_like(buffers.missing, -1)  # positions that are prefetched
        self._ahead_slots = torch.full_like(buffers.missing, hot.refused)  # slots that they go to
        self._none = torch.full((), -1, device=buffers.missing.device)  # a host scalar is copied at every use
        self._in_flight = False  # the copy queue may write into slots, and compute has not waited for it
        for shared in (*hot.written_to, self._ahead, self._ahead_slots, buffers.missing, buffers.fetched):
            streams.share(shared)

    def begin_step(self) -> None:
        """Have compute wait for this layer's prefetch, and for nothing else."""
        self.join()
        self._streams.run(Queue.COMPUTE, self.hot.advance)

    def fetch(self, positions: Tensor) -> Tensor:
        """Fetch the rows [B, Hkv, k, 2 D] of all positions into the first of the buffers.

        Rows that are not in the hot set are read from the source.
        """
        self.join()
        self._streams.run(Queue.COMPUTE, lambda: self._lookup(positions))
        if self._read is ReadPath.MAPPED:
            self._streams.run(Queue.COMPUTE, self._fetch_missing)
        else:
            self._hand_over(Queue.COMPUTE, self._asked, Queue.COPY)
            self._streams.run(Queue.COPY, self._read_missing)
            self._hand_over(Queue.COPY, self._fetched, Queue.COMPUTE)
            self._streams.run(Queue.COMPUTE, self._insert)
        return self._buffers.kv_rows[0]

    def available(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the rows that are in the hot set into the last of the buffers.

        Returns:
            Rows [B, Hkv, k, 2 D], zeros if not in the hot set, and the positions with -1 for those.
        """
        self.join()
        self._streams.run(Queue.COMPUTE, lambda: self._lookup_available(positions))
        return self._buffers.kv_rows[-1], self._buffers.positions[-1]

    def submit(self, positions: Tensor) -> None:
        """Prefetch these rows for the next step. Compute may overwrite `positions` afterwards."""
        self.join()  # an earlier prefetch that was never used
        self._streams.run(Queue.COMPUTE, lambda: self._reserve_ahead(positions))
        self._hand_over(Queue.COMPUTE, self._claimed, Queue.COPY)
        self._streams.run(Queue.COPY, self._read_ahead)
        self._streams.record(Queue.COPY, self._arrived)
        self._in_flight = True

    def join(self) -> None:
        """Have compute wait for this layer's prefetch once. See the class on captures."""
        if self._in_flight:
            self._streams.wait(Queue.COMPUTE, self._arrived)
            self._in_flight = False

    def abandon(self) -> None:
        """Reset after a failed capture: nothing has run, and its events must not be waited for."""
        self._in_flight = False

    def cancel(self) -> None:
        """Forget the positions that were submitted last, because the step is undone.

        A copy in flight still arrives. The next use of its slots waits for it first.
        """
        self._streams.run(Queue.COMPUTE, lambda: self.hot.forget(self._ahead, self._ahead_slots))

    def drop(self) -> None:
        """Drop all rows, because a sequence was truncated or replaced by another."""
        self.join()
        self._streams.run(Queue.COMPUTE, self.hot.clear)

    def _hand_over(self, done: Queue, event: Event, then: Queue) -> None:
        """Have queue `then` wait until everything queued on `done` has run."""
        self._streams.record(done, event)
        self._streams.wait(then, event)

    # The operations on the queues. `fused_rows` overrides them by fused kernels.

    def _lookup(self, positions: Tensor) -> None:
        """Copy the real query's cached rows; claim slots for the missing ones."""
        slots = self.hot.look_up(positions)
        wanted, absent = positions >= 0, slots == self.hot.absent
        missing = wanted & absent
        self.hot.get(slots, self._buffers.kv_rows[0])
        self._buffers.positions[0].copy_(positions)
        self._buffers.found.copy_(slots)
        torch.where(missing, positions, self._none, out=self._buffers.missing)
        self._buffers.slots.copy_(self.hot.claim(positions, missing))
        self._counters.add_step(wanted, missing)

    def _fetch_missing(self) -> None:
        self._read_missing()
        self._insert()

    def _read_missing(self) -> None:
        self._buffers.fetched.copy_(self.source.gather(self._buffers.missing))

    def _insert(self) -> None:
        """Insert the rows that were read into the buffers and the hot set."""
        kv_rows, fetched = self._buffers.kv_rows[0], self._buffers.fetched
        torch.where((self._buffers.missing >= 0).unsqueeze(-1), fetched, kv_rows, out=kv_rows)
        self.hot.put(self._buffers.slots, fetched)

    def _lookup_available(self, positions: Tensor) -> None:
        slots = self.hot.look_up(positions)
        self.hot.get(slots, self._buffers.kv_rows[-1])
        torch.where(slots == self.hot.absent, self._none, positions, out=self._buffers.positions[-1])

    def _reserve_ahead(self, positions: Tensor) -> None:
        """Claim slots for missing rows of the next step, which precede this step's rows."""
        self.hot.advance()
        missing = (self.hot.look_up(positions) == self.hot.absent) & (positions >= 0)
        slots = self.hot.claim(positions, missing)
        granted = slots != self.hot.refused
        self._ahead_slots.copy_(slots)
        torch.where(granted, positions, self._none, out=self._ahead)
        self._counters.add_read(granted)

    def _read_ahead(self) -> None:
        self.hot.put(self._ahead_slots, self.source.gather(self._ahead))
