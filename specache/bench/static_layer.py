"""The attention of one layer over static buffers, as a GPU decodes: as a graph where possible."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.bench.one_layer import LowBitLayer
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.window_layer import WindowLayer
from specache.config import PAGE_TOKENS, Policy
from specache.device.batch import BatchSize, DeviceBatch
from specache.device.graph import GraphedSteps, graphs_for
from specache.device.step import StaticPass
from specache.platform.budget import ByteBudget
from specache.tiers.base import SlowTier
from specache.tiers.streams import streams_for


class _OneLayerSequence:
    """A sequence of one layer. Every step decodes its newest token again."""

    def __init__(self, layer: CompressedLayer) -> None:
        layer.residual_count -= 1
        self.compressed: dict[int, CompressedLayer] = {0: layer}
        self.sliding: dict[int, WindowLayer] = {}
        self.tier: SlowTier = layer.tier
        self.length = layer.length

    def quantise_oldest(self) -> None:
        """Do nothing: no step is ever committed."""


class StaticLayer:
    """The computation of `LowBitLayer` over static buffers, for queries of `rows` rows.

    The hot set is emptied before every step.

    Args:
        layer: its state is taken over, so its own `attend` no longer works.
        dtype: of its keys and values.
    """

    def __init__(self, layer: LowBitLayer, rows: int, dtype: torch.dtype) -> None:
        self.nbytes = layer.nbytes
        self._kind, policy = (StepKind.SINGLE, Policy.ON_DEMAND) if rows == 1 else (StepKind.PAIR, Policy.VERIFIED)
        self._config = replace(layer.config, policy=policy, hot_set=0.0)
        self._keys, self._values = (newest.expand(-1, -1, rows, -1) for newest in layer.newest)
        self._params = layer.params
        sequences = [_OneLayerSequence(one) for one in layer.layers]
        device = self._keys.device
        capacity = -(-layer.layers[0].table.length // PAGE_TOKENS) * PAGE_TOKENS
        self._batch = DeviceBatch(sequences, self._config, BatchSize(rows, capacity, {0: 0}), streams_for(device), ByteBudget())
        self._batch.begin([[0] * rows] * len(sequences))
        self._steps = GraphedSteps(graphs_for(device))
        self._query: Tensor | None = None
        self._dtype = dtype

    def attend(self, query: Tensor) -> Tensor:
        """Attend with query [B, Hq, n, D] -> float32 [B, Hq, n, D]."""
        if self._query is None:
            self._query = query.to(self._dtype).clone()
        self._query.copy_(query)
        return self._steps(None, self._run).transpose(1, 2).float()

    def _run(self) -> Tensor:
        assert self._query is not None
        for state in self._batch.layers.values():
            assert state.row_fetcher is not None
            state.row_fetcher.drop()
        step = StaticPass(self._batch, self._kind, self._config.policy, self._config.selection, pending_groups=False)
        out = step.attention(0, self._query, self._keys, self._values, self._params)
        self._batch.join()
        return out
