"""A small decode over `DeviceRowFetcher`: layers, steps, selections that are known beforehand, and
what the attention would be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.sources import StoredRows
from specache.tiers.streams import Queue, Streams

LAYERS, STEPS, BATCH, HEADS, TOKENS, WIDTH, TOP_K, SLOTS = 3, 5, 2, 2, 20, 4, 4, 6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Program:
    """How a decode goes.

    Attributes:
        begin_together: all layers begin a step before the first computes, instead of each when it
            is its turn.
        undone: each step is taken back behind its last layer, and done again with other selections.
        host_waits: the host waits for each step, instead of for the last one.
        joined: the copies of a step end with it, as in a captured graph.
    """

    read: ReadPath = ReadPath.MAPPED
    begin_together: bool = False
    undone: bool = False
    host_waits: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Given:
    """What one layer's attention was given in one step, with the positions that it had asked for;
    [n, B, Hkv, k, ...].
    """

    layer: int
    asked: Tensor
    positions: Tensor
    rows: Tensor


Change = Callable[[list[DeviceRowFetcher]], None]


class Decode:
    """One run. `wrong` says whether any attention was given a row that is not the stored one.

    Args:
        change: what is done to the layers before the first step (planted mistakes).
    """

    def __init__(self, streams: Streams, program: Program, seed: int = 0, change: Change | None = None) -> None:
        self.streams, self.program = streams, program
        self._random = torch.Generator().manual_seed(seed)
        self.stored = torch.randn(LAYERS, BATCH, HEADS, TOKENS, WIDTH, generator=self._random)
        self.buffers = StepBuffers(BATCH, HEADS, TOP_K, WIDTH, torch.float32, CPU)
        self.counters = RowCounters(CPU, 4 * WIDTH)
        self.layers = [self._layer(stored) for stored in self.stored]
        self._selected = torch.full((BATCH, HEADS, TOP_K), -1)  # where every layer's selection is written, one after the other
        self._wanted_next = [self._selection() for _ in range(LAYERS)]
        self.given: list[Given] = []
        if change is not None:
            change(self.layers)

    def run(self) -> Decode:
        for _ in range(STEPS):
            self._step()
            if self.program.undone:
                for rows in self.layers:
                    rows.cancel()
                self._wanted_next = [self._selection() for _ in range(LAYERS)]
                self._step()
        self.streams.finish(Queue.COMPUTE)
        return self

    @property
    def wrong(self) -> bool:
        return any(self._is_wrong(given) for given in self.given)

    def _is_wrong(self, given: Given) -> bool:
        here = given.positions >= 0
        index = given.positions.clamp(min=0).unsqueeze(-1).expand_as(given.rows)
        expected = self.stored[given.layer].expand(2, -1, -1, -1, -1).gather(3, index).masked_fill(~here.unsqueeze(-1), 0.0)
        right = torch.equal(given.rows, expected)
        right &= torch.equal(given.positions[0], given.asked[0])  # the real query gets all of its rows
        right &= bool(((given.positions == given.asked) | ~here).all())
        return not right

    def _layer(self, stored: Tensor) -> DeviceRowFetcher:
        hot = DeviceHotSet(BATCH, HEADS, SLOTS, TOKENS, WIDTH, torch.float32, CPU)
        return DeviceRowFetcher(StoredRows(list(stored)), hot, self.buffers, self.streams, self.counters, self.program.read)

    def _step(self) -> None:
        if self.program.begin_together:
            for rows in self.layers:
                rows.begin_step()
        for layer, rows in enumerate(self.layers):
            if not self.program.begin_together:
                rows.begin_step()
            self._attend(layer, rows)
        if self.program.joined:
            for rows in self.layers:
                rows.join()
        if self.program.host_waits:
            self.streams.finish(Queue.COMPUTE)

    def _attend(self, layer: int, rows: DeviceRowFetcher) -> None:
        """Run one layer. The real query selects mostly prefetched rows; the draft query selects
        mostly those of the real one.
        """
        real = self._near(self._wanted_next[layer])
        draft, following = self._near(real), self._near(real)
        self._select(real)
        rows.fetch(self._selected)
        self._select(draft)
        rows.available(self._selected)
        self._look(layer, torch.stack([real, draft]))
        self._select(following)
        rows.submit(self._selected)
        self._wanted_next[layer] = following

    def _select(self, positions: Tensor) -> None:
        self.streams.run(Queue.COMPUTE, lambda: self._selected.copy_(positions))

    def _look(self, layer: int, asked: Tensor) -> None:
        """Attention reads the buffers."""
        positions, rows = self.buffers.positions, self.buffers.kv_rows
        self.streams.run(Queue.COMPUTE, lambda: self.given.append(Given(layer, asked, positions.clone(), rows.clone())))

    def _selection(self) -> Tensor:
        """Ascending positions, with holes at the end here and there."""
        order = torch.rand(BATCH, HEADS, TOKENS, generator=self._random).argsort(-1)
        return self._with_holes(order[..., :TOP_K])

    def _near(self, positions: Tensor) -> Tensor:
        """Most of the positions, and one that may be new."""
        order = torch.rand(BATCH, HEADS, TOKENS, generator=self._random)
        order.scatter_(-1, positions.clamp(min=0), 2.0)
        order.scatter_(-1, positions[..., :1].clamp(min=0), -1.0)
        return self._with_holes(order.argsort(-1, descending=True)[..., :TOP_K])

    def _with_holes(self, positions: Tensor) -> Tensor:
        holes = torch.rand(positions.shape, generator=self._random) < 0.15
        ordered = positions.masked_fill(holes, TOKENS).sort(-1).values
        return ordered.masked_fill(ordered == TOKENS, -1)
