"""Mixed-precision attention of one decode step: score, select, fetch, attend (paper Algorithm 3).

Policy `verified` is ours. A step has one or two queries per sequence (and query head). The *real*
query is that of the decoded token. The *draft* query, if there is one, is that of the draft token,
one position further. Every query sees the low-bit copy, the residual and its own token; the real
query does not see the draft token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from specache.attention.dense import AttentionParams, softmax_sum
from specache.attention.dense import scores as exact_scores
from specache.config import Policy
from specache.kernels import dispatch
from specache.kernels.cpu.native import NativeKernels, RecentTokens
from specache.kernels.types import LowBitKV
from specache.rows.fetch import InPlaceRowFetcher, RowFetcher
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


class CompressedLayer(Protocol):
    """One full-attention layer of one sequence, as the attention uses it.

    `residual_keys` and `residual_values` [Hkv, r, D] are the newest tokens in the model's dtype,
    with the step's committed token. The first `pending_group_tokens` of them (whole groups) are
    quantised after the step.
    """

    row_fetcher: RowFetcher
    next_positions: Tensor | None  # [Hkv, k], selected by the last step for this one

    @property
    def low_bit_kv(self) -> LowBitKV: ...
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
    top_k: int
    counters: Counters

    @property
    def selects_next(self) -> bool:
        """Whether the last query selects the positions to prefetch for the next step."""
        if self.policy is Policy.VERIFIED:
            return self.kind.draft_row is not None
        if self.policy is Policy.SPECULATIVE:
            return self.kind is not StepKind.SINGLE
        return self.policy is Policy.PREVIOUS


@dataclass
class _Recent:
    """Exact attention of a step over the residual and the step's own tokens."""

    out: Tensor  # [B, Hkv, G, n, D]
    lse: Tensor  # [B, Hkv, G, n], sinks included
    own_lse: Tensor  # the same without sinks
    pending_scores: list[Tensor]  # per sequence [Hkv, G, n, pending group tokens]
    staying_lse: Tensor  # [B, Hkv, G, n] of the tokens that stay exact, sinks included


def mixed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> Tensor:
    """Compute the attention of a step in one layer, for a ragged batch.

    Args:
        query: [B, Hq, n, D].
        keys, values: [B, Hkv, n, D] of the step's tokens. The committed token must be in its
            layer's residual already.

    Returns:
        float32 [B, Hq, n, D].
    """
    backend = dispatch.fused(query) if plan.policy.verifies else None
    if backend is not None:
        return _native_attention(backend, query, keys, values, layers, params, plan)
    recent = _recent(query, keys, values, layers, params, plan)
    low_bit_kvs = [layer.low_bit_kv for layer in layers]
    lengths = [low_bit_kv.length for low_bit_kv in low_bit_kvs]
    for layer in layers:
        layer.row_fetcher.begin_step()
    if max(lengths) == 0 and not any(layer.pending_group_tokens for layer in layers):
        return _heads(_merge_parts(None, recent))

    scores = dispatch.score(query, low_bit_kvs, lengths, params.scaling, params.softcap)  # [B, Hkv, G, n, S]
    if plan.policy.verifies:
        selected = dispatch.select(scores, recent.lse, lengths, plan.top_k)  # [B, Hkv, n, k]
        positions = _start(selected, layers, plan)
        if plan.selects_next:
            _submit(_next_positions(scores, recent, lengths, layers, plan, selected), layers)
        kv_rows = _fetched(layers)
        dispatch.rescore(query, scores, positions, kv_rows, params.scaling, params.softcap)
    else:
        positions, kv_rows = _prefetched_rows(layers, query, keys, plan)
        dispatch.rescore(query, scores, positions, kv_rows, params.scaling, params.softcap)
        if plan.selects_next:
            if plan.kind.commits:
                _count_hits(scores, recent, lengths, positions, plan)
            _submit(_next_positions(scores, recent, lengths, layers, plan, None), layers)
    return _heads(_merge_parts(dispatch.attend(scores, positions, kv_rows, low_bit_kvs, lengths), recent))


def _native_attention(
    backend: NativeKernels,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> Tensor:
    """`mixed_attention` of a verifying policy on the C++ kernels.

    A layer takes one call where rows are read in place. Otherwise it takes three, and the low-bit
    part is computed while missing rows are read.
    """
    low_bit_kvs = [layer.low_bit_kv for layer in layers]
    lengths = [low_bit_kv.length for low_bit_kv in low_bit_kvs]
    recent = _recent_tokens(keys, values, layers, plan.kind)
    fetchers = [layer.row_fetcher for layer in layers]
    stored = [fetcher.stored() for fetcher in fetchers if isinstance(fetcher, InPlaceRowFetcher)]
    if len(stored) == len(layers):
        if plan.kind is not StepKind.DRAFT:
            used = sum(low_bit_kv.num_kv_heads * min(plan.top_k, low_bit_kv.length) for low_bit_kv in low_bit_kvs)
            plan.counters.rows_selected += used
            plan.counters.rows_ready += used
        return backend.decode_in_place(query, low_bit_kvs, recent, stored, plan.top_k, params.scaling, params.softcap, params.sinks)

    for fetcher in fetchers:
        fetcher.begin_step()
    k = min(plan.top_k, max(lengths))
    step = backend.layer_step(query, low_bit_kvs, recent, k, params.scaling, params.softcap, params.sinks)
    selected = step.select()
    positions = _start(selected, layers, plan)
    step.attend_low_bit(positions)
    if plan.selects_next:
        if any(layer.pending_group_tokens for layer in layers):
            last = query[:, :, -1:]
            scores = dispatch.score(last, low_bit_kvs, lengths, params.scaling, params.softcap)
            outside = _recent(query, keys, values, layers, params, plan)
            _submit(_next_positions(scores, outside, lengths, layers, plan, None), layers)
        else:
            _submit(selected[:, :, -1:], layers)
    return step.attend_fetched(positions, _fetched(layers))


def _recent_tokens(keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], kind: StepKind) -> list[RecentTokens]:
    """Return per sequence the residual followed by the step's own tokens."""
    if kind is StepKind.SINGLE:
        return [RecentTokens(layer.residual_keys, layer.residual_values) for layer in layers]
    own = _own_tokens(kind)
    return [
        RecentTokens(
            torch.cat([layer.residual_keys, keys[b, :, own]], dim=1), torch.cat([layer.residual_values, values[b, :, own]], dim=1)
        )
        for b, layer in enumerate(layers)
    ]


def _own_tokens(kind: StepKind) -> slice:
    """Return which of the step's tokens are not in the residual."""
    return slice(1, None) if kind.commits else slice(0, None)


def select_first(query: Tensor, layer: CompressedLayer, params: AttentionParams, top_k: int) -> None:
    """Prefetch the top-k of the prompt's last token for the first decode step (policy `previous`).

    Args:
        query: [Hq, 1, D] of the last prompt token. Its key and value must be in the residual or the
            low-bit copy already.
    """
    low_bit_kv = layer.low_bit_kv
    score = exact_scores(query, layer.residual_keys, params)
    lse = add_sinks(score.logsumexp(-1)[None], params)
    scores = dispatch.score(query[None], [low_bit_kv], [low_bit_kv.length], params.scaling, params.softcap)
    _submit(dispatch.select(scores, lse, [low_bit_kv.length], top_k), [layer])


def _recent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> _Recent:
    """Attend exactly to the residual and to the step's own tokens."""
    own = _own_tokens(plan.kind)
    outs, lses, pending_scores, staying = [], [], [], []
    for b, layer in enumerate(layers):
        seen_keys = torch.cat([layer.residual_keys, keys[b, :, own]], dim=1)  # [Hkv, r + own, D]
        seen_values = torch.cat([layer.residual_values, values[b, :, own]], dim=1)
        score = exact_scores(query[b], seen_keys, params)  # [Hkv, G, n, r + own]
        if plan.kind is StepKind.PAIR:
            score[:, :, 0, -1] = -torch.inf  # the real query does not see the draft token
        pending_scores.append(score[..., : layer.pending_group_tokens].clone())
        staying.append(score[..., layer.pending_group_tokens :].logsumexp(-1))
        groups = score.shape[1]
        out, lse = softmax_sum(score, seen_values)
        outs.append(out.unflatten(0, (-1, groups)))
        lses.append(lse.unflatten(0, (-1, groups)))
    own_lse = torch.stack(lses)  # [B, Hkv, G, n]
    lse = add_sinks(own_lse, params)
    staying_lse = add_sinks(torch.stack(staying), params)
    return _Recent(torch.stack(outs), lse, own_lse, pending_scores, staying_lse)


def add_sinks(lse: Tensor, params: AttentionParams) -> Tensor:
    """Add the sinks' share to lse [B, Hkv, G, n], the log of every query's normaliser."""
    if params.sinks is None:
        return lse
    return torch.logaddexp(lse, params.sinks.float().reshape(1, *lse.shape[1:3], 1))


def _start(selected: Tensor, layers: Sequence[CompressedLayer], plan: StepSpec) -> Tensor:
    """Start to fetch each query's top-k [B, Hkv, n, k]; `_fetched` waits for the real query's rows.

    Returns:
        The same positions, with -1 where the draft query uses the low-bit pair instead.
    """
    real_queries = selected.shape[2] - (plan.kind.draft_row is not None)
    used = []
    for wanted, layer in zip(selected, layers, strict=True):
        positions, ready = layer.row_fetcher.start(wanted, real_queries)
        plan.counters.rows_selected += int((positions[:, :real_queries] >= 0).sum())
        plan.counters.rows_ready += ready
        used.append(positions)
    return torch.stack(used)


def _fetched(layers: Sequence[CompressedLayer]) -> Tensor:
    """Return the rows [B, Hkv, n, k, 2 D] of the positions that `_start` returned."""
    return torch.stack([layer.row_fetcher.finish() for layer in layers])


def _prefetched_rows(layers: Sequence[CompressedLayer], query: Tensor, keys: Tensor, plan: StepSpec) -> tuple[Tensor, Tensor]:
    """Fetch what the last step selected: positions [B, Hkv, n, k] and rows [B, Hkv, n, k, 2 D].

    All queries of this step use the same positions.
    """
    heads, n, dim = keys.shape[1], query.shape[2], query.shape[3]
    wanted = [layer.next_positions for layer in layers]
    k = max((w.shape[1] for w in wanted if w is not None), default=0) if plan.policy is not Policy.NONE else 0
    positions = torch.full((len(layers), heads, k), -1, device=query.device)
    kv_rows = torch.zeros(len(layers), heads, k, 2 * dim, dtype=keys.dtype, device=query.device)
    if k:
        for b, (layer, w) in enumerate(zip(layers, wanted, strict=True)):
            if w is not None:
                kv_rows[b, :, : w.shape[1]] = layer.row_fetcher.fetch(w)[0]
                positions[b, :, : w.shape[1]] = w
    return positions.unsqueeze(2).expand(-1, -1, n, -1), kv_rows.unsqueeze(2).expand(-1, -1, n, -1, -1)


def _next_positions(
    scores: Tensor,
    recent: _Recent,
    lengths: list[int],
    layers: Sequence[CompressedLayer],
    plan: StepSpec,
    selected: Tensor | None,
) -> Tensor:
    """Return the last query's top-k [B, Hkv, 1, k] among the low-bit positions of the next step.

    Pending groups, which are quantised after this step, compete with their exact scores.
    """
    pending_group_tokens = [layer.pending_group_tokens for layer in layers]
    if not any(pending_group_tokens):
        if selected is None:
            selected = dispatch.select(scores[:, :, :, -1:], recent.lse[..., -1:], lengths, plan.top_k)
        return selected[:, :, -1:]
    candidates = [length + count for length, count in zip(lengths, pending_group_tokens, strict=True)]
    extended = scores.new_full((*scores.shape[:3], 1, max(candidates)), -torch.inf)
    extended[..., : scores.shape[-1]] = scores[:, :, :, -1:]
    for b, (length, stop) in enumerate(zip(lengths, candidates, strict=True)):
        extended[b, ..., length:stop] = recent.pending_scores[b][:, :, -1:]
    return dispatch.select(extended, recent.staying_lse[..., -1:], candidates, plan.top_k)


def _submit(positions: Tensor, layers: Sequence[CompressedLayer]) -> None:
    """Start to prefetch positions [B, Hkv, 1, k] for the next step."""
    for b, layer in enumerate(layers):
        layer.next_positions = positions[b, :, 0]
        layer.row_fetcher.submit(layer.next_positions)


def _count_hits(scores: Tensor, recent: _Recent, lengths: list[int], prefetched: Tensor, plan: StepSpec) -> None:
    """Count how many of the real query's top-k were prefetched; for the statistics only."""
    wanted = dispatch.select(scores[:, :, :, :1], recent.lse[..., :1], lengths, plan.top_k)[:, :, 0]  # [B, Hkv, k]
    chosen = wanted >= 0
    if prefetched.shape[-1]:
        hit = (wanted.unsqueeze(-1) == prefetched[:, :, 0].unsqueeze(-2)).any(-1) & chosen
        plan.counters.rows_ready += int(hit.sum())
    plan.counters.rows_selected += int(chosen.sum())


def _merge_parts(low_bit_part: tuple[Tensor, Tensor] | None, recent: _Recent) -> Tensor:
    """Merge the low-bit part (out, lse) with the recent one -> [B, Hkv, G, n, D]."""
    if low_bit_part is None:
        return recent.out * (recent.own_lse - recent.lse).exp().unsqueeze(-1)
    out, lse = low_bit_part
    total = torch.logaddexp(lse, recent.lse)
    weight = (recent.own_lse - total).exp().unsqueeze(-1)
    return out * (lse - total).exp().unsqueeze(-1) + recent.out * weight


def _heads(out: Tensor) -> Tensor:
    """[B, Hkv, G, n, D] -> [B, Hq, n, D]."""
    return out.flatten(1, 2)
