"""Mixed-precision attention of one decode step: score, select, fetch, attend (paper Algorithm 3).

`attend` is the one algorithm, for every policy. What it asks of the kernels is a `LayerStep` (C++,
PyTorch, or a GPU's static buffers), and of the rows a `StepRows` (a ragged batch here, static
buffers in `specache.device.step`).

Policy `verified` is ours. A step has one or two queries per sequence (and query head). The *real*
query is that of the decoded token. The *draft* query, if there is one, is that of the draft token,
one position further. Every query sees the low-bit copy, the residual and its own token; the real
query does not see the draft token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from specache.config import Policy, TopK
from specache.kernels import dispatch
from specache.kernels.cpu.native import NativeLayerStep
from specache.kernels.types import AttentionParams, LayerStep, RecentTokens, StoredLayer
from specache.rows.fetch import HotSetRowFetcher, RowFetcher
from specache.stats import Counters


class StepKind(Enum):
    """The tokens of a decode step, and which of them stays in the cache."""

    PRE_DECODE = "pre-decode"  # the first output token alone; not kept (Algorithm 2)
    PAIR = "pair"  # real and draft token; the real one is kept (Algorithm 3)
    SINGLE = "single"  # the real token, which is kept
    DRAFT = "draft"  # the draft token alone, not kept: where a pair may not share a forward pass

    @property
    def queries(self) -> int:
        """Queries per sequence and query head, `n`."""
        return 2 if self is StepKind.PAIR else 1

    @property
    def commits(self) -> bool:
        """Whether the token of query 0 is kept in the cache."""
        return self in (StepKind.PAIR, StepKind.SINGLE)

    @property
    def draft_row(self) -> int | None:
        """Index of the draft query, which never waits for rows; `None` if there is none."""
        return {StepKind.PAIR: 1, StepKind.DRAFT: 0}.get(self)


class CompressedLayer(StoredLayer, Protocol):
    """One full-attention layer of one sequence, as the attention uses it.

    `residual_keys` and `residual_values` [Hkv, r, D] are the newest tokens in the model's dtype,
    with the step's committed token. The first `pending_group_tokens` of them (whole groups) are
    quantised after the step.
    """

    row_fetcher: RowFetcher
    next_positions: Tensor | None  # [Hkv, k], selected by the last step for this one

    def append(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store one token: query [Hq, 1, D], key and value [Hkv, 1, D]."""

    def count_appended(self, query: Tensor, sequence: int) -> None:
        """Count a token that kernels have stored, the sequence's first of query [B, Hq, n, D]."""

    @property
    def observes_next(self) -> bool:
        """Whether the next token's query is observed, so that `count_stored` is not enough."""

    def count_stored(self) -> None:
        """Count a token that kernels have stored, whose query is not observed."""

    @property
    def has_room(self) -> bool:
        """Whether kernels may store the next token."""

    def pending_after(self, tokens: int) -> int:
        """Return `pending_group_tokens` after `tokens` more tokens were appended."""

    @property
    def residual_keys(self) -> Tensor: ...
    @property
    def residual_values(self) -> Tensor: ...
    @property
    def pending_group_tokens(self) -> int: ...


@dataclass(frozen=True)
class StepSpec:
    """What a step does in every layer."""

    kind: StepKind
    policy: Policy
    top_k: TopK
    counters: Counters

    @cached_property
    def verifies(self) -> bool:
        """Whether each query waits for the rows that it selects (`Policy.verifies`)."""
        return self.policy.verifies

    @cached_property
    def commits(self) -> bool:
        """Whether the token of query 0 is kept in the cache (`StepKind.commits`)."""
        return self.kind.commits

    @cached_property
    def selects_next(self) -> bool:
        """Whether the last query selects the positions to prefetch for the next step."""
        if not self.policy.drafts:
            return self.policy.prefetches
        return self.kind.draft_row is not None or (self.kind is StepKind.PRE_DECODE and not self.policy.verifies)


class StepRows(Protocol):
    """The exact rows of one layer for a decode step of a batch.

    Positions are [B, Hkv, n, k], -1 where there is no pair; rows are [B, Hkv, n, k, 2 D].
    """

    def begin_step(self) -> None:
        """Wait for the rows that the last step submitted."""

    def start(self, selected: Tensor) -> Tensor:
        """Start to fetch each query's selected rows.

        Return the positions, with -1 where the draft query uses the low-bit pair instead.
        """

    def finish(self, step: LayerStep, positions: Tensor) -> Tensor:
        """Wait for the rows of the positions that `start` returned -> `step.attend_fetched`."""

    def prefetched(self) -> tuple[Tensor, Tensor]:
        """Return positions and rows that the last step selected, the same for all queries."""

    def submit(self, positions: Tensor) -> None:
        """Start to prefetch positions [B, Hkv, k] for the next step."""

    def count_hits(self, wanted: Tensor, prefetched: Tensor) -> None:
        """Count which of the real query's top-k [B, Hkv, k] were prefetched, for statistics."""


def attend(step: LayerStep, rows: StepRows, spec: StepSpec) -> Tensor:
    """Compute the attention of a decode step in one layer, of which `step` has scored the keys.

    A verifying policy fetches what each query selects now. The others use what the last step
    selected, and the selection for the next step sees the exact scores of those.

    Returns:
        The result of `LayerStep.attend_fetched`.
    """
    rows.begin_step()
    if spec.policy.verifies:
        positions = rows.start(step.select())
        step.attend_low_bit(positions)  # while missing rows are read
        if spec.selects_next:
            rows.submit(step.select_next())
        return rows.finish(step, positions)
    positions, kv_rows = rows.prefetched()
    if spec.selects_next:
        step.rescore(positions, kv_rows)
        wanted = step.select()
        if spec.kind.commits:
            rows.count_hits(wanted[:, :, 0], positions[:, :, 0])
        rows.submit(step.select_next())
    step.attend_low_bit(positions)
    return step.attend_fetched(positions, kv_rows)


def find_hits(wanted: Tensor, prefetched: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the positions [B, Hkv, k] are pairs, and which of those were prefetched."""
    chosen = wanted >= 0
    return chosen, (wanted.unsqueeze(-1) == prefetched.unsqueeze(-2)).any(-1) & chosen


def mixed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    spec: StepSpec,
) -> Tensor:
    """Compute the attention of a step in one layer, for a ragged batch.

    Args:
        query: [B, Hq, n, D].
        keys, values: [B, Hkv, n, D] of the step's tokens. The committed token must be in its
            layer's residual already.

    Returns:
        float32 [B, Hq, n, D].
    """
    low_bit_kvs = [layer.low_bit_kv for layer in layers]
    recent = _recent_tokens(keys, values, layers, spec.kind)
    step = dispatch.layer_step(query, low_bit_kvs, recent, spec.top_k, params)
    return attend(step, _BatchRows(layers, query.shape[2], spec), spec)


def select_first(query: Tensor, layer: CompressedLayer, params: AttentionParams, top_k: TopK) -> None:
    """Prefetch the top-k of the prompt's last token for the first decode step (policy `previous`).

    Args:
        query: [Hq, 1, D] of the last prompt token. Its key and value must be in the residual or the
            low-bit copy already.
    """
    recent = RecentTokens(layer.residual_keys, layer.residual_values)
    step = dispatch.layer_step(query[None], [layer.low_bit_kv], [recent], top_k, params)
    _submit(step.select()[0, :, 0], layer)


def _recent_tokens(keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], kind: StepKind) -> list[RecentTokens]:
    """Return per sequence the residual followed by the step's own tokens that are not in it."""
    own = slice(1 if kind.commits else 0, None)
    recent = []
    for b, layer in enumerate(layers):
        seen = layer.residual_keys, layer.residual_values
        if kind is not StepKind.SINGLE:
            seen = torch.cat([seen[0], keys[b, :, own]], dim=1), torch.cat([seen[1], values[b, :, own]], dim=1)
        recent.append(RecentTokens(*seen, layer.pending_group_tokens))
    return recent


class _BatchRows:
    """`StepRows` of one layer of a ragged batch: a row fetcher per sequence."""

    def __init__(self, layers: Sequence[CompressedLayer], queries: int, spec: StepSpec) -> None:
        self._layers = layers
        self._queries = queries
        self._spec = spec

    def begin_step(self) -> None:
        for layer in self._layers:
            layer.row_fetcher.begin_step()

    def start(self, selected: Tensor) -> Tensor:
        real_queries = self._queries - (self._spec.kind.draft_row is not None)
        used = []
        for wanted, layer in zip(selected, self._layers, strict=True):
            positions, count, ready = layer.row_fetcher.start(wanted, real_queries)
            self._count(count, ready)
            used.append(positions)
        return _stacked(used)

    def finish(self, step: LayerStep, positions: Tensor) -> Tensor:
        fetchers = [layer.row_fetcher for layer in self._layers]
        hot = [fetcher for fetcher in fetchers if isinstance(fetcher, HotSetRowFetcher) and fetcher.fits]
        if isinstance(step, NativeLayerStep) and len(hot) == len(fetchers):
            slots = _stacked([fetcher.finish_in_slots() for fetcher in hot])
            return step.attend_hot(positions, [fetcher.hot for fetcher in hot], slots)
        return step.attend_fetched(positions, torch.stack([fetcher.finish() for fetcher in fetchers]))

    def prefetched(self) -> tuple[Tensor, Tensor]:
        wanted = [layer.next_positions for layer in self._layers]
        k = max((w.shape[1] for w in wanted if w is not None), default=0) if self._spec.policy.fetches else 0
        residual = self._layers[0].residual_keys
        heads, dim = residual.shape[0], residual.shape[2]
        positions = torch.full((len(wanted), heads, k), -1, device=residual.device)
        kv_rows = residual.new_zeros(len(wanted), heads, k, 2 * dim)
        if k:
            for b, (layer, w) in enumerate(zip(self._layers, wanted, strict=True)):
                if w is not None:
                    kv_rows[b, :, : w.shape[1]] = layer.row_fetcher.fetch(w)[0]
                    positions[b, :, : w.shape[1]] = w
        n = self._queries
        return positions.unsqueeze(2).expand(-1, -1, n, -1), kv_rows.unsqueeze(2).expand(-1, -1, n, -1, -1)

    def submit(self, positions: Tensor) -> None:
        for layer, of_sequence in zip(self._layers, positions, strict=True):
            _submit(of_sequence, layer)

    def count_hits(self, wanted: Tensor, prefetched: Tensor) -> None:
        chosen, hits = find_hits(wanted, prefetched)
        self._count(chosen.sum(), hits.sum())

    def _count(self, selected: Tensor | int, ready: Tensor | int) -> None:
        self._spec.counters.rows_selected += int(selected)
        self._spec.counters.rows_ready += int(ready)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one shape as one; one tensor as a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _submit(positions: Tensor, layer: CompressedLayer) -> None:
    """Start to prefetch positions [Hkv, k] for a layer's next step."""
    layer.next_positions = positions
    layer.row_fetcher.submit(positions)
