"""A decode step's attention in all layers, for kernels that run the layers in one call.

What `at_once` does before and after each layer's call happens here before the first layer and after
the last. Python is not asked between two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import CompressedLayer, StepKind, StepSpec
from specache.config import TopK
from specache.kernels import dispatch
from specache.rows.fetch import HotSetRowFetcher

Counts = tuple[int, int, int, float]  # `FetchCounts`


class StepOfLayers:
    """What the kernels take of every layer of a step, and what is counted afterwards.

    All lists are layer by layer, and in a layer sequence by sequence.

    Attributes:
        spec: the step. Without one there is no attention: its results are zero.
        isa: the kernels' instruction set.
        natives: the layers in C++.
        counts: low-bit, residual and pending tokens of each, and whether the committed token is
            stored already.
        hot: their hot sets in C++; none where rows are read in place.
        on_disk: what reads their rows, C++ objects; none where they lie in memory.
        next_positions: one per layer [B, Hkv, k], for what it selects for the next step; or none.
    """

    __slots__ = ("_fetchers", "_kv_shape", "_layers", "counts", "hot", "isa", "natives", "next_positions", "on_disk", "spec")

    def __init__(self, spec: StepSpec | None = None, kv_shape: tuple[int, int] = (0, 0)) -> None:
        self.spec = spec
        self._kv_shape = kv_shape
        self.isa = ""
        self.natives: list[Any] = []
        self.counts: list[int] = []
        self.hot: list[Any] = []
        self.on_disk: list[Any] = []
        self.next_positions: list[Tensor] = []
        self._layers: list[CompressedLayer] = []
        self._fetchers: list[HotSetRowFetcher] = []

    @classmethod
    def begin(
        cls, layers: Sequence[Sequence[CompressedLayer]], dtype: torch.dtype, kv_shape: tuple[int, int], spec: StepSpec
    ) -> StepOfLayers | None:
        """Begin a step whose layers kernels can run in one call. Nothing is stored yet.

        Args:
            layers: each layer's states in the step's B sequences.
            dtype: of the queries.
            kv_shape: KV heads and head dimension of the step's keys.

        Returns:
            `None` where a layer of this step takes more than that call.
        """
        if not spec.verifies:
            return None
        step = cls(spec, kv_shape)
        in_place = layers[0][0].row_fetcher.in_place
        for group in layers:
            added = step._add_in_place(group, dtype) if in_place else step._add_fetched(group, dtype, spec)
            if not added:
                return None
        return None if step.on_disk and len(step.on_disk) < len(step.natives) else step

    @property
    def commits(self) -> bool:
        """Whether the step's first token is stored."""
        return self.spec is not None and self.spec.commits

    @property
    def top_k(self) -> TopK:
        """How many pairs a query selects."""
        return TopK.always(0) if self.spec is None else self.spec.top_k

    @property
    def real_queries(self) -> int:
        """The first queries of a sequence, which get all pairs that they select."""
        return 0 if self.spec is None else self.spec.kind.queries - (self.spec.kind.draft_row is not None)

    def end(self, counts: Sequence[Counts]) -> None:
        """Count what all layers stored and fetched, and keep what they chose for the next step."""
        spec = self.spec
        if spec is None:
            return
        counters = spec.counters
        for i, (layer, count) in enumerate(zip(self._layers, counts, strict=True)):
            if self._fetchers:
                selected, ready, copied, seconds = count
                counters.rows_selected += selected
                counters.rows_ready += ready
                self._fetchers[i].count_fetched(copied, seconds)
            elif spec.kind is not StepKind.DRAFT:
                used = spec.top_k.of(layer.table.length) * self._kv_shape[0]
                counters.rows_selected += used
                counters.rows_ready += used
            if spec.commits:
                layer.count_stored()
        rows = (row for positions in self.next_positions for row in positions)
        for layer, row in zip(self._layers, rows, strict=False):  # without a choice for the next step there are none
            layer.next_positions = row

    def drop(self) -> None:
        """Drop the hot sets after an error: they may lack rows that they count as cached."""
        for fetcher in self._fetchers:
            fetcher.drop()

    def _add_in_place(self, group: Sequence[CompressedLayer], dtype: torch.dtype) -> bool:
        return all(layer.row_fetcher.in_place and self._add(layer, dtype, pending=0, on_disk=False) for layer in group)

    def _add_fetched(self, group: Sequence[CompressedLayer], dtype: torch.dtype, spec: StepSpec) -> bool:
        pending = [layer.pending_after(spec.commits) for layer in group]
        pairs = self.real_queries * spec.top_k.of(max(layer.table.length for layer in group))
        if spec.selects_next:
            k = spec.top_k.of(max(layer.table.length + more for layer, more in zip(group, pending, strict=True)))
            pairs = max(pairs, k)
            self.next_positions.append(torch.empty(len(group), self._kv_shape[0], k, dtype=torch.int64, device="cpu"))
        for layer, more in zip(group, pending, strict=True):
            fetcher = layer.row_fetcher
            if not (isinstance(fetcher, HotSetRowFetcher) and fetcher.fetches_at_once) or (spec.commits and not layer.has_room):
                return False
            ready = fetcher.ready_at_once(pairs)
            if ready is None or not self._add(layer, dtype, more, on_disk=ready[1] is not None):
                return False
            self.hot.append(ready[0].native)
            if ready[1] is not None:
                self.on_disk.append(ready[1])
            self._fetchers.append(fetcher)
        return True

    def _add(self, layer: CompressedLayer, dtype: torch.dtype, pending: int, on_disk: bool) -> bool:
        commits = self.commits
        known = None if commits and layer.observes_next else dispatch.known_layer(layer, dtype, self._kv_shape, commits, on_disk)
        if known is None or (self.isa and self.isa != known[0]):
            return False
        self.isa, native = known
        self.natives.append(native)
        self.counts += (layer.table.length, layer.residual_count, pending, 0)
        self._layers.append(layer)
        return True
