"""The 16-bit rows of one layer of a batch, as a decode step on a device asks for them: through a hot set, ahead of need, and
without the host ever waiting (paper section 3.3).

Two queues run beside each other, and three things must not overtake one another (`->` is an event):

    compute: ... read slots of the last step | claim slots for the guess -> claimed          arrived -> the next step reads slots
    copy:                                                    claimed -> write those slots -> arrived

- `claimed`: nobody reads the slots any more that the copy overwrites, and it knows which rows to bring and where to.
- `arrived`: the layer's rows are in their slots. The next step waits for it when it reaches this layer, not before.
- where missing rows are read on the copy queue (`ReadPath.COPY`), `asked` and `fetched` do the same for them inside a step.

Every buffer that both queues use is rewritten by compute only, after it waited for the copy that read it. Events and buffers are
made once. A batch's positions are int64 [B, Hkv, k], ascending, -1 where there is no pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.sources import RowSource
from specache.tiers.streams import Event, Queue, Streams


class RowCounters:
    """Running totals, int64 on the device; read only when the statistics are asked for. One for all layers of a batch.

    Attributes:
        totals: int64 [3]: (KV head, position) pairs that the real row selected, those of them that had to be read, and pairs read
            ahead.
    """

    def __init__(self, device: torch.device, row_bytes: int) -> None:
        self.totals = torch.zeros(3, dtype=torch.int64, device=device)
        self._row_bytes = row_bytes

    def add_step(self, selected: Tensor, missing: Tensor) -> None:
        """Count the true ones of two bool tensors."""
        self.totals[:2].add_(torch.stack([selected, missing]).flatten(1).sum(1))

    def add_read(self, read: Tensor) -> None:
        """Count the true ones as pairs read ahead."""
        self.totals[2].add_(read.sum())

    def read(self, streams: Streams) -> tuple[int, int, int]:
        """(rows selected, rows ready, bytes fetched); waits for the device."""
        streams.finish(Queue.COMPUTE)
        selected, missing, ahead = self.totals.tolist()
        return selected, selected - missing, (missing + ahead) * self._row_bytes


class StepBuffers:
    """Where a layer's rows are handed to its attention; one for all layers of a batch, which use it one after the other.

    Attributes:
        rows: [n, B, Hkv, k, 2 D] of the pass's `n` rows: the real one first, the guess last.
        positions: int64 [n, B, Hkv, k] they belong to, -1 where there is no row.
        missing: int64 [B, Hkv, k], the real row's positions that must be read, -1 elsewhere.
        slots: int64 [B, Hkv, k], where they go in the hot set.
        found: int64 [B, Hkv, k], slots of the others.
        victims: int64 [B, Hkv, k], for a kernel's own use.
        fetched: [B, Hkv, k, 2 D], as they were read.
    """

    def __init__(
        self, batch: int, num_kv_heads: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device, pass_rows: int = 2
    ) -> None:
        shape = (batch, num_kv_heads, top_k)
        self.rows = torch.zeros(pass_rows, *shape, width, dtype=dtype, device=device)
        self.positions = torch.full((pass_rows, *shape), -1, device=device)
        self.missing = torch.full(shape, -1, device=device)
        self.slots, self.found, self.victims = (torch.full(shape, -1, device=device) for _ in range(3))
        self.fetched = torch.zeros(*shape, width, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.rows, self.positions, self.missing, self.slots, self.found, self.victims, self.fetched

    @property
    def rows_by_pass(self) -> Tensor:
        """The rows as kernels take them, [B, Hkv, n, k, 2 D]; a view."""
        return self.rows.permute(1, 2, 0, 3, 4)

    @property
    def positions_by_pass(self) -> Tensor:
        """The positions as kernels take them, [B, Hkv, n, k]; a view."""
        return self.positions.permute(1, 2, 0, 3)


class DeviceRows:
    """Rows of one layer of a batch of `B` sequences. Nothing here waits for the device, and nothing depends on what it computed.

    In eager mode the order of a step is `begin_step`, `fetch`, `available`, `submit`, layer by layer, and compute waits for a
    layer's prefetch when the next step reaches the layer. In a captured CUDA graph an event of one replay cannot be waited for in
    the next: call `join` of every layer at the end of the captured step, and once before the capture; prefetches then have until
    the step's end. Rows must be in the source before they are asked for, and offloaded (`RamTier.wait_for_offload`, outside of a
    capture).

    Args:
        source: where the rows are.
        hot: the layer's hot set, with at least `k` slots.
        buffers: shared with the other layers.
        streams: the queues; the events of this layer are made here.
        counters: shared with the other layers.
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
        self._ahead = torch.full_like(buffers.missing, -1)  # positions on their way
        self._ahead_slots = torch.full_like(buffers.missing, hot.refused)  # and where they go
        self._none = torch.full((), -1, device=buffers.missing.device)  # a scalar of the host would be copied at every use
        self._on_the_way = False  # the copy queue may be writing into slots, and compute has not waited for it
        for shared in (*hot.written_to, self._ahead, self._ahead_slots, buffers.missing, buffers.fetched):
            streams.share(shared)

    @property
    def nbytes(self) -> int:
        """Device memory held by this layer alone, in bytes."""
        return self.hot.nbytes + self._ahead.nbytes + self._ahead_slots.nbytes

    def begin_step(self) -> None:
        """Compute waits for this layer's prefetch, and for nothing else."""
        self.join()
        self._streams.run(Queue.COMPUTE, self.hot.advance)

    def fetch(self, positions: Tensor) -> Tensor:
        """Rows of all positions, those that are not here read from the source -> [B, Hkv, k, 2 D], the first of the buffers'."""
        self.join()
        self._streams.run(Queue.COMPUTE, lambda: self._ask(positions))
        if self._read is ReadPath.MAPPED:
            self._streams.run(Queue.COMPUTE, self._bring)
        else:
            self._hand_over(Queue.COMPUTE, self._asked, Queue.COPY)
            self._streams.run(Queue.COPY, self._read_missing)
            self._hand_over(Queue.COPY, self._fetched, Queue.COMPUTE)
            self._streams.run(Queue.COMPUTE, self._take)
        return self._buffers.rows[0]

    def available(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the positions that are here -> (rows, the positions with -1 for the others), the last of the buffers'."""
        self.join()
        self._streams.run(Queue.COMPUTE, lambda: self._look(positions))
        return self._buffers.rows[-1], self._buffers.positions[-1]

    def submit(self, positions: Tensor) -> None:
        """Have these here when the next step begins. `positions` may be overwritten by compute afterwards."""
        self.join()  # what was submitted before and never used
        self._streams.run(Queue.COMPUTE, lambda: self._claim(positions))
        self._hand_over(Queue.COMPUTE, self._claimed, Queue.COPY)
        self._streams.run(Queue.COPY, self._read_ahead)
        self._streams.record(Queue.COPY, self._arrived)
        self._on_the_way = True

    def join(self) -> None:
        """Compute waits for this layer's prefetch, if it has not yet. At the end of a captured step; see the class."""
        if self._on_the_way:
            self._streams.wait(Queue.COMPUTE, self._arrived)
            self._on_the_way = False

    def abandon(self) -> None:
        """A capture failed: nothing has run, and what it recorded cannot be waited for."""
        self._on_the_way = False

    def cancel(self) -> None:
        """Forget what was last submitted (the step it was for is undone).

        A copy that is on its way still arrives, and whoever is given its slots waits for it first.
        """
        self._streams.run(Queue.COMPUTE, lambda: self.hot.forget(self._ahead, self._ahead_slots))

    def drop(self) -> None:
        """Forget everything fetched or in flight (a sequence was cut, or replaced by another)."""
        self.join()
        self._streams.run(Queue.COMPUTE, self.hot.clear)

    def _hand_over(self, done: Queue, event: Event, then: Queue) -> None:
        """`then` goes on when what is queued on `done` has run."""
        self._streams.record(done, event)
        self._streams.wait(then, event)

    # What the queues run; `fused_rows` has the same in kernels of its own

    def _ask(self, positions: Tensor) -> None:
        """The real row's hot rows, and which ones are to be read into which slots."""
        slots = self.hot.look_up(positions)
        wanted, absent = positions >= 0, slots == self.hot.absent
        missing = wanted & absent
        self.hot.get(slots, self._buffers.rows[0])
        self._buffers.positions[0].copy_(positions)
        self._buffers.found.copy_(slots)
        torch.where(missing, positions, self._none, out=self._buffers.missing)
        self._buffers.slots.copy_(self.hot.claim(positions, missing))
        self._counters.add_step(wanted, missing)

    def _bring(self) -> None:
        self._read_missing()
        self._take()

    def _read_missing(self) -> None:
        self._buffers.fetched.copy_(self.source.gather(self._buffers.missing))

    def _take(self) -> None:
        """The rows that were read join the hot ones, and stay."""
        rows, fetched = self._buffers.rows[0], self._buffers.fetched
        torch.where((self._buffers.missing >= 0).unsqueeze(-1), fetched, rows, out=rows)
        self.hot.put(self._buffers.slots, fetched)

    def _look(self, positions: Tensor) -> None:
        slots = self.hot.look_up(positions)
        self.hot.get(slots, self._buffers.rows[-1])
        torch.where(slots == self.hot.absent, self._none, positions, out=self._buffers.positions[-1])

    def _claim(self, positions: Tensor) -> None:
        """Slots for what the guess wants and is not here; what the next step wants outranks what this one used."""
        self.hot.advance()
        missing = (self.hot.look_up(positions) == self.hot.absent) & (positions >= 0)
        slots = self.hot.claim(positions, missing)
        granted = slots != self.hot.refused
        self._ahead_slots.copy_(slots)
        torch.where(granted, positions, self._none, out=self._ahead)
        self._counters.add_read(granted)

    def _read_ahead(self) -> None:
        self.hot.put(self._ahead_slots, self.source.gather(self._ahead))
