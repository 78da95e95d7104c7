"""The attention of a decode step in which no shape and no host number depends on how long the sequences are.

The same sums as `specache.attention.decode.mixed_attention`, for every policy over a low-bit copy, and those of sliding-window
layers. What differs from step to step is read from tensors: where the residual's next slot is, how many tokens are low bit, which
pages hold them. So a step can be captured as a CUDA graph and replayed, and nothing in it waits for the device.
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
from specache.device.device_rows import DeviceRows
from specache.device.page_kernels import RecentPart
from specache.device.windows import hidden_slots
from specache.kernels.triton.tables import PageScores
from specache.tiers.streams import Queue


@dataclass
class _Recent:
    """The part of a step outside the copy: residual and the step's own rows."""

    part: RecentPart
    pending_scores: Tensor | None = None  # [B, Hkv, G, 1, g] of the last row; -inf where a sequence's oldest group stays
    staying_lse: Tensor | None = None  # [B, Hkv, G, 1] of what does not retire, sinks included


@dataclass
class _Seen:
    """What a step's rows see outside the copy, the same in every layer. T = R + g + own rows.

    `oldest` and the two behind it are there only in a step after which a group retires.
    """

    hidden: Tensor  # bool [B, 1, 1, n, T]
    slot: Tensor  # int64 [B, 1, 1, 1, 1]: where row 0 goes in the residual
    lengths: Tensor  # int32 [B]
    pending_group_tokens: Tensor | None  # bool [B, 1, 1, 1, 1]
    future: Tensor | None  # int64 [B, 1, 1, 1, g]: positions that the oldest group has when it is low bit
    candidates: Tensor | None  # int32 [B]: low-bit tokens of the next step


class StaticPass:
    """One decode step of a batch, as the model's attention layers see it.

    Args:
        kind: `PAIR` or `SINGLE`.
        retires: some sequence's oldest group becomes low bit when the step is over, and the next step's candidates count.
    """

    def __init__(self, batch: DeviceBatch, kind: StepKind, policy: Policy, top_k: int, retires: bool) -> None:
        self._batch = batch
        self._kind = kind
        self._policy = policy
        self._top_k = top_k
        self._retires = retires
        self._seen = self._see()
        first = batch.inputs.position_ids[:, 0]
        self._hidden = {window: hidden_slots(first, window, kind) for window in {w.window for w in batch.windows.values()}}

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """query [B, Hq, n, D], keys and values [B, Hkv, n, D] of layer `index` -> [B, n, Hq, D], in the query's dtype."""
        if index in self._batch.windows:
            window, first = self._batch.windows[index], self._batch.inputs.position_ids[:, 0]
            out = window.attention(query, keys, values, first, self._hidden[window.window], params)
            return out.transpose(1, 2).to(query.dtype)
        layer, query = self._batch.layers[index], query.contiguous()  # once: every kernel wants it so
        layer.begun = True
        recent = self._recent(layer, query, keys, values, params)
        scores = layer.kernels.score(query, layer.tables, layer.weights, params.scaling, params.softcap)  # [B, Hkv, G, n, S]
        if layer.rows is None:
            positions, fetched = layer.buffers.positions_by_pass, layer.buffers.rows_by_pass  # of no pair
        else:
            positions, fetched = self._fetch(layer, layer.rows, query, scores, recent, params)
        copy = layer.kernels.attend(scores, positions, fetched, layer.tables)
        return layer.kernels.join(copy, recent.part, query.dtype)

    def _fetch(
        self, layer: LayerState, rows: DeviceRows, query: Tensor, scores: PageScores, recent: _Recent, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Pairs that are exact: positions [B, Hkv, n, k] and rows [B, Hkv, n, k, 2 D]; the next step's are on their way."""
        rows.begin_step()
        if self._policy.verifies:
            positions, fetched = self._verified_rows(layer, rows, scores, recent)
            layer.kernels.rescore(query, scores, positions, fetched, params.scaling, params.softcap)
            return positions, fetched
        positions, fetched = self._prefetched_rows(layer, rows, query.shape[2])
        layer.kernels.rescore(query, scores, positions, fetched, params.scaling, params.softcap)
        wanted = layer.kernels.select(scores, recent.part.lse, self._seen.lengths, self._top_k)
        self._count_hits(wanted[:, :, 0], positions)
        self._submit(layer, rows, self._next_positions(layer, scores, recent, wanted))
        return positions, fetched

    def _see(self) -> _Seen:
        batch, config = self._batch, self._batch.config
        inputs, size = batch.inputs, config.residual + config.group_size
        counts = inputs.counts.view(-1, 1, 1, 1, 1)  # before row 0 joins
        column = torch.arange(size + self._own, device=counts.device)
        hidden = (column > counts) & (column < size)  # [B, 1, 1, 1, T]
        if self._kind is StepKind.PAIR:  # row 0 does not see row 1
            row = torch.arange(2, device=counts.device).view(2, 1)
            hidden = hidden | ((column >= size) & (row == 0))
        batch.lengths.copy_(inputs.low_bit)
        batch.finite.fill_(True)  # kernels write only what is not
        if not self._retires:
            return _Seen(hidden, counts, batch.lengths, None, None, None)
        pending_group_tokens = counts + 1 == size
        future = inputs.low_bit.view(-1, 1, 1, 1, 1) + torch.arange(config.group_size, device=counts.device)
        candidates = batch.lengths + pending_group_tokens.view(-1).to(torch.int32) * config.group_size
        return _Seen(hidden, counts, batch.lengths, pending_group_tokens, future, candidates)

    @property
    def _own(self) -> int:
        """The step's rows that are not in the residual."""
        return self._kind.rows - 1

    def _append(self, layer: LayerState, keys: Tensor, values: Tensor) -> None:
        """Row 0 joins the residual, and whether it is finite is noted."""
        new = torch.stack([keys[:, :, 0], values[:, :, 0]], dim=1)  # [B, 2, Hkv, D]
        layer.finite.copy_(torch.isfinite(new).all())
        slot = self._seen.slot.expand(*new.shape[:3], 1, new.shape[3])
        layer.residual.scatter_(3, slot, new.unsqueeze(3))

    def _recent(self, layer: LayerState, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> _Recent:
        """Row 0 joins the residual; exact attention of the rows over it and over themselves."""
        if self._seen.pending_group_tokens is None:
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
        if seen.pending_group_tokens is not None:
            last, g = score[:, :, :, -1:], self._batch.config.group_size
            pending_scores = last[..., :g].masked_fill(~seen.pending_group_tokens, -torch.inf)
            leaves = seen.pending_group_tokens & (torch.arange(last.shape[-1], device=last.device) < g)
            staying_lse = add_sinks(last.masked_fill(leaves, -torch.inf).logsumexp(-1), params)
        shape = score.shape[:4]
        out, lse = softmax_sum(score.flatten(0, 1), seen_values.flatten(0, 1))
        own_lse = lse.view(shape)
        part = RecentPart(out.view(*shape, -1), add_sinks(own_lse, params), own_lse)
        return _Recent(part, pending_scores, staying_lse)

    def _verified_rows(self, layer: LayerState, rows: DeviceRows, scores: PageScores, recent: _Recent) -> tuple[Tensor, Tensor]:
        """Each row's own top-k [B, Hkv, n, k] and its rows. The real row gets all of them, the guess those that are here (-1)."""
        selected = layer.kernels.select(scores, recent.part.lse, self._seen.lengths, self._top_k)
        rows.fetch(selected[:, :, 0])
        if self._kind is StepKind.PAIR:
            rows.available(selected[:, :, 1])
            self._submit(layer, rows, self._next_positions(layer, scores, recent, selected))
        self._batch.streams.finish(Queue.COMPUTE)
        return layer.buffers.positions_by_pass.contiguous(), layer.buffers.rows_by_pass

    def _prefetched_rows(self, layer: LayerState, rows: DeviceRows, n: int) -> tuple[Tensor, Tensor]:
        """What the last step selected, the same for every row of this one."""
        positions = layer.used_positions.copy_(layer.next_positions)
        fetched = rows.fetch(positions)
        self._batch.streams.finish(Queue.COMPUTE)
        return positions.unsqueeze(2).expand(-1, -1, n, -1), fetched.unsqueeze(2).expand(-1, -1, n, -1, -1)

    def _next_positions(self, layer: LayerState, scores: PageScores, recent: _Recent, wanted: Tensor) -> Tensor:
        """The last row's top-k among the positions that are at low bit in the next step -> [B, Hkv, k].

        A group that retires when this step is over is a candidate with its exact scores. `wanted` [B, Hkv, n, k] is each row's
        top-k without it.
        """
        seen = self._seen
        if seen.future is None or seen.candidates is None:
            return wanted[:, :, -1]
        assert recent.pending_scores is not None
        assert recent.staying_lse is not None
        extended = scores.last_row(seen.lengths)
        extended.scatter_(-1, seen.future.expand_as(recent.pending_scores), recent.pending_scores)
        return layer.kernels.select(PageScores(extended), recent.staying_lse, seen.candidates, self._top_k)[:, :, 0]

    def _submit(self, layer: LayerState, rows: DeviceRows, positions: Tensor) -> None:
        """Start fetching, as soon as the layer knows what it will need."""
        layer.next_positions.copy_(positions)
        rows.submit(layer.next_positions)

    def _count_hits(self, wanted: Tensor, prefetched: Tensor) -> None:
        """How much of what the real row wants, [B, Hkv, k], the prefetch had brought; for the statistics only."""
        chosen = wanted >= 0
        hit = (wanted.unsqueeze(-1) == prefetched[:, :, 0].unsqueeze(-2)).any(-1) & chosen
        self._batch.hits += torch.stack([chosen.sum(), hit.sum()])
