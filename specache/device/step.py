"""The attention of a static decode step: no shape or host number depends on lengths.

The algorithm is `specache.attention.decode.attend`, for every policy over a low-bit copy; here are
its `LayerStep` and `StepRows` over static buffers, and the attention of sliding-window layers.
Everything that changes from step to step is read from tensors: the residual's next slot, the number
of low-bit tokens, the page addresses. So a step can be captured as a CUDA graph and replayed, and
nothing in it waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specache.attention.decode import StepKind, StepSpec, attend, find_hits
from specache.config import Policy, TopK
from specache.device.batch import DeviceBatch, LayerState
from specache.device.device_rows import DeviceRowFetcher
from specache.device.page_kernels import RecentPart
from specache.device.windows import hidden_slots
from specache.kernels.torch.exact import add_sinks, scores, softmax_sum
from specache.kernels.triton.tables import PageScores
from specache.kernels.types import AttentionParams, LayerStep
from specache.stats import Counters
from specache.tiers.streams import Queue


@dataclass
class _Visibility:
    """What a step's queries see outside the low-bit copy. T = R + g + own tokens.

    `pending`, `future` and `candidates` are set only in a step after which a group is quantised.
    """

    hidden: Tensor  # bool [B, 1, 1, n, T]
    slot: Tensor  # int64 [B, 1, 1, 1, 1]: the real token's slot in the residual
    lengths: Tensor  # int32 [B]
    pending: Tensor | None  # bool [B, 1, 1, 1, 1]: whether the oldest group is quantised after the step
    future: Tensor | None  # int64 [B, 1, 1, 1, g]: low-bit positions of the oldest group afterwards
    candidates: Tensor | None  # int32 [B]: low-bit tokens of the next step


class StaticPass:
    """The attention of one decode step of a batch, for all attention layers of the model.

    Args:
        kind: `PAIR` or `SINGLE`.
        pending_groups: whether a sequence's oldest group is quantised after the step and is a
            candidate for the next one.
    """

    def __init__(self, batch: DeviceBatch, kind: StepKind, policy: Policy, top_k: TopK, pending_groups: bool) -> None:
        self._batch = batch
        self._spec = StepSpec(kind, policy, top_k, Counters())  # the batch counts on the device
        self._seen = self._visibility(pending_groups)
        first = batch.inputs.position_ids[:, 0]
        self._hidden = {window: hidden_slots(first, window, kind) for window in {w.window for w in batch.windows.values()}}

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Compute the attention of layer `index`.

        Args:
            query: [B, Hq, n, D]; keys, values: [B, Hkv, n, D]. Under `torch.autocast` their dtypes
                may differ.

        Returns:
            [B, n, Hq, D] in the query's dtype.
        """
        if index in self._batch.windows:
            window, first = self._batch.windows[index], self._batch.inputs.position_ids[:, 0]
            keys, values = keys.to(window.ring.dtype), values.to(window.ring.dtype)
            out = window.attention(query, keys, values, first, self._hidden[window.window], params)
            return out.transpose(1, 2).to(query.dtype)
        layer, query = self._batch.layers[index], query.contiguous()  # every kernel needs it contiguous
        layer.begun = True
        keys, values = keys.to(layer.residual.dtype), values.to(layer.residual.dtype)
        step = _StaticLayerStep(layer, self._batch, self._seen, query, keys, values, self._spec.top_k, params)
        return attend(step, _StaticRows(layer, self._batch, query.shape[2]), self._spec)

    def _visibility(self, pending_groups: bool) -> _Visibility:
        batch, config = self._batch, self._batch.config
        inputs, size = batch.inputs, config.residual + config.group_size
        counts = inputs.counts.view(-1, 1, 1, 1, 1)  # before the real token is appended
        column = torch.arange(size + self._spec.kind.queries - 1, device=counts.device)
        hidden = (column > counts) & (column < size)  # [B, 1, 1, 1, T]
        if self._spec.kind is StepKind.PAIR:  # the real query does not see the draft token
            row = torch.arange(2, device=counts.device).view(2, 1)
            hidden = hidden | ((column >= size) & (row == 0))
        batch.lengths.copy_(inputs.low_bit)
        batch.finite.fill_(True)  # kernels write only False
        if not pending_groups:
            return _Visibility(hidden, counts, batch.lengths, None, None, None)
        pending = counts + 1 == size
        future = inputs.low_bit.view(-1, 1, 1, 1, 1) + torch.arange(config.group_size, device=counts.device)
        candidates = batch.lengths + pending.view(-1).to(torch.int32) * config.group_size
        return _Visibility(hidden, counts, batch.lengths, pending, future, candidates)


class _StaticLayerStep:
    """`specache.kernels.types.LayerStep` over a batch's static buffers, on the device's kernels."""

    def __init__(
        self,
        layer: LayerState,
        batch: DeviceBatch,
        seen: _Visibility,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        top_k: TopK,
        params: AttentionParams,
    ) -> None:
        self._layer, self._kernels, self._seen = layer, layer.kernels, seen
        self._query, self._top_k, self._params = query, top_k, params
        self._pending_scores: Tensor | None = None  # [B, Hkv, G, 1, g] of the last query; -inf if no group is pending
        self._staying_lse: Tensor | None = None  # [B, Hkv, G, 1] of the tokens that stay exact, sinks included
        self._recent = self._attend_recent(batch, keys, values)
        self._scores = self._kernels.score(query, layer.tables, layer.key_scales, params.scaling, params.softcap)
        self._selected: Tensor | None = None
        self._is_exact = layer.row_fetcher is None  # whether the scores of fetched keys are exact

    def rescore(self, positions: Tensor, kv_rows: Tensor) -> None:
        self._kernels.rescore(self._query, self._scores, positions, kv_rows, self._params.scaling, self._params.softcap)
        self._is_exact = True

    def select(self) -> Tensor:
        self._selected = self._kernels.select(self._scores, self._recent.lse, self._seen.lengths, self._top_k)
        return self._selected

    def select_next(self) -> Tensor:
        assert self._selected is not None, "select_next before select"
        if self._seen.future is None or self._seen.candidates is None:
            return self._selected[:, :, -1]
        assert self._pending_scores is not None
        assert self._staying_lse is not None
        extended = self._scores.last_row(self._seen.lengths)
        extended.scatter_(-1, self._seen.future.expand_as(self._pending_scores), self._pending_scores)
        return self._kernels.select(PageScores(extended), self._staying_lse, self._seen.candidates, self._top_k)[:, :, 0]

    def attend_low_bit(self, positions: Tensor) -> None:
        """Do nothing: `attend_fetched` attends to all pairs at once."""

    def attend_fetched(self, positions: Tensor, kv_rows: Tensor) -> Tensor:
        """Return [B, n, Hq, D] in the query's dtype."""
        positions = positions.contiguous()
        if not self._is_exact:
            self.rescore(positions, kv_rows)
        low_bit_part = self._kernels.attend(self._scores, positions, kv_rows, self._layer.tables)
        return self._kernels.join(low_bit_part, self._recent, self._query.dtype)

    def _attend_recent(self, batch: DeviceBatch, keys: Tensor, values: Tensor) -> RecentPart:
        """Append the real token to the residual; attend exactly to it and the step's own tokens."""
        layer, query, params, pending = self._layer, self._query, self._params, self._seen.pending
        if pending is None:
            part = self._kernels.recent(query, keys, values, layer.residual, batch.inputs.counts, layer.finite, params)
            if part is not None:
                return part
        self._append(keys, values)
        own = slice(1, query.shape[2])
        seen_keys = torch.cat([layer.residual[:, 0], keys[:, :, own]], dim=2)  # [B, Hkv, T, D]
        seen_values = torch.cat([layer.residual[:, 1], values[:, :, own]], dim=2)
        score = scores(query.flatten(0, 1), seen_keys.flatten(0, 1), params).unflatten(0, (len(query), -1))
        score.masked_fill_(self._seen.hidden, -torch.inf)  # [B, Hkv, G, n, T]
        if pending is not None:
            last, g = score[:, :, :, -1:], batch.config.group_size
            self._pending_scores = last[..., :g].masked_fill(~pending, -torch.inf)
            leaves = pending & (torch.arange(last.shape[-1], device=last.device) < g)
            self._staying_lse = add_sinks(last.masked_fill(leaves, -torch.inf).logsumexp(-1), params)
        shape = score.shape[:4]
        out, lse = softmax_sum(score.flatten(0, 1), seen_values.flatten(0, 1))
        own_lse = lse.view(shape)
        return RecentPart(out.view(*shape, -1), add_sinks(own_lse, params), own_lse)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Append the real token to the residual, and record whether it is finite."""
        new = torch.stack([keys[:, :, 0], values[:, :, 0]], dim=1)  # [B, 2, Hkv, D]
        self._layer.finite.copy_(torch.isfinite(new).all())
        slot = self._seen.slot.expand(*new.shape[:3], 1, new.shape[3])
        self._layer.residual.scatter_(3, slot, new.unsqueeze(3))


class _StaticRows:
    """`specache.attention.decode.StepRows` of one layer, in buffers that all layers share."""

    def __init__(self, layer: LayerState, batch: DeviceBatch, queries: int) -> None:
        self._layer, self._batch, self._queries = layer, batch, queries

    def begin_step(self) -> None:
        if self._layer.row_fetcher is not None:
            self._layer.row_fetcher.begin_step()

    def start(self, selected: Tensor) -> Tensor:
        """Return a view of the positions, which are there once the rows are."""
        self._fetcher.fetch(selected[:, :, 0])
        if self._queries > 1:
            self._fetcher.available(selected[:, :, 1])
        return self._layer.buffers.positions_by_query

    def finish(self, step: LayerStep, positions: Tensor) -> Tensor:
        self._batch.streams.finish(Queue.COMPUTE)
        return step.attend_fetched(positions, self._layer.buffers.kv_rows_by_query)

    def prefetched(self) -> tuple[Tensor, Tensor]:
        layer = self._layer
        if layer.row_fetcher is None:
            return layer.buffers.positions_by_query, layer.buffers.kv_rows_by_query  # all -1
        positions = layer.used_positions.copy_(layer.next_positions)
        kv_rows = layer.row_fetcher.fetch(positions)
        self._batch.streams.finish(Queue.COMPUTE)
        n = self._queries
        return positions.unsqueeze(2).expand(-1, -1, n, -1), kv_rows.unsqueeze(2).expand(-1, -1, n, -1, -1)

    def submit(self, positions: Tensor) -> None:
        self._layer.next_positions.copy_(positions)
        self._fetcher.submit(self._layer.next_positions)

    def count_hits(self, wanted: Tensor, prefetched: Tensor) -> None:
        chosen, hits = find_hits(wanted, prefetched)
        self._batch.hits += torch.stack([chosen.sum(), hits.sum()])

    @property
    def _fetcher(self) -> DeviceRowFetcher:
        assert self._layer.row_fetcher is not None, "a policy without rows"
        return self._layer.row_fetcher
