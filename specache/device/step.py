"""The attention of a static decode step: no shape or host number depends on lengths.

It computes the same sums as `specache.attention.decode.mixed_attention`, for every policy over a
low-bit copy, and the attention of sliding-window layers. Everything that changes from step to step
is read from tensors: the residual's next slot, the number of low-bit tokens, the page addresses. So
a step can be captured as a CUDA graph and replayed, and nothing in it waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specache.attention.decode import StepKind, add_sinks
from specache.attention.dense import AttentionParams, softmax_sum
from specache.attention.dense import scores as exact_scores
from specache.config import Policy
from specache.device.batch import DeviceBatch, LayerState
from specache.device.device_rows import DeviceRowFetcher
from specache.device.page_kernels import RecentPart
from specache.device.windows import hidden_slots
from specache.kernels.triton.tables import PageScores
from specache.tiers.streams import Queue


@dataclass
class _Recent:
    """Exact attention of a step over the residual and the step's own tokens."""

    part: RecentPart
    pending_scores: Tensor | None = None  # [B, Hkv, G, 1, g] of the last query; -inf if no group is pending
    staying_lse: Tensor | None = None  # [B, Hkv, G, 1] of the tokens that stay exact, sinks included


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

    def __init__(self, batch: DeviceBatch, kind: StepKind, policy: Policy, top_k: int, pending_groups: bool) -> None:
        self._batch = batch
        self._kind = kind
        self._policy = policy
        self._top_k = top_k
        self._pending_groups = pending_groups
        self._seen = self._visibility()
        first = batch.inputs.position_ids[:, 0]
        self._hidden = {window: hidden_slots(first, window, kind) for window in {w.window for w in batch.windows.values()}}

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Compute the attention of layer `index`.

        Args:
            query: [B, Hq, n, D]; keys, values: [B, Hkv, n, D].

        Returns:
            [B, n, Hq, D] in the query's dtype.
        """
        if index in self._batch.windows:
            window, first = self._batch.windows[index], self._batch.inputs.position_ids[:, 0]
            out = window.attention(query, keys, values, first, self._hidden[window.window], params)
            return out.transpose(1, 2).to(query.dtype)
        layer, query = self._batch.layers[index], query.contiguous()  # every kernel needs it contiguous
        layer.begun = True
        recent = self._recent(layer, query, keys, values, params)
        scores = layer.kernels.score(query, layer.tables, layer.key_scales, params.scaling, params.softcap)  # [B, Hkv, G, n, S]
        if layer.row_fetcher is None:
            positions, fetched = layer.buffers.positions_by_query, layer.buffers.kv_rows_by_query  # all -1
        else:
            positions, fetched = self._fetch(layer, layer.row_fetcher, query, scores, recent, params)
        low_bit_part = layer.kernels.attend(scores, positions, fetched, layer.tables)
        return layer.kernels.join(low_bit_part, recent.part, query.dtype)

    def _fetch(
        self,
        layer: LayerState,
        fetcher: DeviceRowFetcher,
        query: Tensor,
        scores: PageScores,
        recent: _Recent,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor]:
        """Fetch the exact pairs, rescore them, and start to prefetch those of the next step.

        Returns:
            Positions [B, Hkv, n, k] and rows [B, Hkv, n, k, 2 D].
        """
        fetcher.begin_step()
        if self._policy.verifies:
            positions, fetched = self._verified_rows(layer, fetcher, scores, recent)
            layer.kernels.rescore(query, scores, positions, fetched, params.scaling, params.softcap)
            return positions, fetched
        positions, fetched = self._prefetched_rows(layer, fetcher, query.shape[2])
        layer.kernels.rescore(query, scores, positions, fetched, params.scaling, params.softcap)
        wanted = layer.kernels.select(scores, recent.part.lse, self._seen.lengths, self._top_k)
        self._count_hits(wanted[:, :, 0], positions)
        self._submit(layer, fetcher, self._next_positions(layer, scores, recent, wanted))
        return positions, fetched

    def _visibility(self) -> _Visibility:
        batch, config = self._batch, self._batch.config
        inputs, size = batch.inputs, config.residual + config.group_size
        counts = inputs.counts.view(-1, 1, 1, 1, 1)  # before the real token is appended
        column = torch.arange(size + self._own, device=counts.device)
        hidden = (column > counts) & (column < size)  # [B, 1, 1, 1, T]
        if self._kind is StepKind.PAIR:  # the real query does not see the draft token
            row = torch.arange(2, device=counts.device).view(2, 1)
            hidden = hidden | ((column >= size) & (row == 0))
        batch.lengths.copy_(inputs.low_bit)
        batch.finite.fill_(True)  # kernels write only False
        if not self._pending_groups:
            return _Visibility(hidden, counts, batch.lengths, None, None, None)
        pending = counts + 1 == size
        future = inputs.low_bit.view(-1, 1, 1, 1, 1) + torch.arange(config.group_size, device=counts.device)
        candidates = batch.lengths + pending.view(-1).to(torch.int32) * config.group_size
        return _Visibility(hidden, counts, batch.lengths, pending, future, candidates)

    @property
    def _own(self) -> int:
        """Number of the step's tokens that are not in the residual."""
        return self._kind.queries - 1

    def _append(self, layer: LayerState, keys: Tensor, values: Tensor) -> None:
        """Append the real token to the residual, and record whether it is finite."""
        new = torch.stack([keys[:, :, 0], values[:, :, 0]], dim=1)  # [B, 2, Hkv, D]
        layer.finite.copy_(torch.isfinite(new).all())
        slot = self._seen.slot.expand(*new.shape[:3], 1, new.shape[3])
        layer.residual.scatter_(3, slot, new.unsqueeze(3))

    def _recent(self, layer: LayerState, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> _Recent:
        """Append the real token to the residual; attend exactly to it and the step's own tokens."""
        if self._seen.pending is None:
            counts = self._batch.inputs.counts
            part = layer.kernels.recent(query, keys, values, layer.residual, counts, layer.finite, params)
            if part is not None:
                return _Recent(part)
        self._append(layer, keys, values)
        batch, own, seen = len(query), slice(1, 1 + self._own), self._seen
        seen_keys = torch.cat([layer.residual[:, 0], keys[:, :, own]], dim=2)  # [B, Hkv, T, D]
        seen_values = torch.cat([layer.residual[:, 1], values[:, :, own]], dim=2)
        score = exact_scores(query.flatten(0, 1), seen_keys.flatten(0, 1), params).unflatten(0, (batch, -1))
        score.masked_fill_(seen.hidden, -torch.inf)  # [B, Hkv, G, n, T]
        pending_scores = staying_lse = None
        if seen.pending is not None:
            last, g = score[:, :, :, -1:], self._batch.config.group_size
            pending_scores = last[..., :g].masked_fill(~seen.pending, -torch.inf)
            leaves = seen.pending & (torch.arange(last.shape[-1], device=last.device) < g)
            staying_lse = add_sinks(last.masked_fill(leaves, -torch.inf).logsumexp(-1), params)
        shape = score.shape[:4]
        out, lse = softmax_sum(score.flatten(0, 1), seen_values.flatten(0, 1))
        own_lse = lse.view(shape)
        part = RecentPart(out.view(*shape, -1), add_sinks(own_lse, params), own_lse)
        return _Recent(part, pending_scores, staying_lse)

    def _verified_rows(
        self, layer: LayerState, fetcher: DeviceRowFetcher, scores: PageScores, recent: _Recent
    ) -> tuple[Tensor, Tensor]:
        """Fetch each query's own top-k: positions [B, Hkv, n, k] and rows [B, Hkv, n, k, 2 D].

        The real query gets all of its rows; the draft query gets those in the hot set, and -1
        elsewhere.
        """
        selected = layer.kernels.select(scores, recent.part.lse, self._seen.lengths, self._top_k)
        fetcher.fetch(selected[:, :, 0])
        if self._kind is StepKind.PAIR:
            fetcher.available(selected[:, :, 1])
            self._submit(layer, fetcher, self._next_positions(layer, scores, recent, selected))
        self._batch.streams.finish(Queue.COMPUTE)
        return layer.buffers.positions_by_query.contiguous(), layer.buffers.kv_rows_by_query

    def _prefetched_rows(self, layer: LayerState, fetcher: DeviceRowFetcher, n: int) -> tuple[Tensor, Tensor]:
        """Fetch what the last step selected: positions [B, Hkv, n, k] and rows [B, Hkv, n, k, 2 D].

        All queries of this step use the same positions.
        """
        positions = layer.used_positions.copy_(layer.next_positions)
        fetched = fetcher.fetch(positions)
        self._batch.streams.finish(Queue.COMPUTE)
        return positions.unsqueeze(2).expand(-1, -1, n, -1), fetched.unsqueeze(2).expand(-1, -1, n, -1, -1)

    def _next_positions(self, layer: LayerState, scores: PageScores, recent: _Recent, wanted: Tensor) -> Tensor:
        """Return the last query's top-k [B, Hkv, k] among the low-bit positions of the next step.

        A pending group, which is quantised after this step, competes with its exact scores.

        Args:
            wanted: [B, Hkv, n, k], each query's top-k without pending groups.
        """
        seen = self._seen
        if seen.future is None or seen.candidates is None:
            return wanted[:, :, -1]
        assert recent.pending_scores is not None
        assert recent.staying_lse is not None
        extended = scores.last_row(seen.lengths)
        extended.scatter_(-1, seen.future.expand_as(recent.pending_scores), recent.pending_scores)
        return layer.kernels.select(PageScores(extended), recent.staying_lse, seen.candidates, self._top_k)[:, :, 0]

    def _submit(self, layer: LayerState, fetcher: DeviceRowFetcher, positions: Tensor) -> None:
        """Start to prefetch positions [B, Hkv, k] for the next step."""
        layer.next_positions.copy_(positions)
        fetcher.submit(layer.next_positions)

    def _count_hits(self, wanted: Tensor, prefetched: Tensor) -> None:
        """Count prefetched ones among the real query's positions [B, Hkv, k]; for statistics."""
        chosen = wanted >= 0
        hit = (wanted.unsqueeze(-1) == prefetched[:, :, 0].unsqueeze(-2)).any(-1) & chosen
        self._batch.hits += torch.stack([chosen.sum(), hit.sum()])
