"""Mixed-precision attention of one decode pass: score, select, fetch, attend (paper Algorithm 3; `verified` is ours).

A pass has one or two rows per sequence. The *real* row is the token that was decoded; the *guess* row, where there is one, is the
speculative token one position further. All rows see the copy, the residual and themselves; row 0 does not see row 1.
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
from specache.rows.fetch import InPlaceRows, Rows
from specache.stats import Counters


class StepKind(Enum):
    """Which rows a decode pass has, and which of them stays in the cache."""

    PRE_DECODE = "pre-decode"  # the first output token alone, dropped afterwards (Algorithm 2)
    PAIR = "pair"  # real and guess; the real one stays (Algorithm 3)
    SINGLE = "single"  # the real one, which stays
    DRAFT = "draft"  # the guess alone, dropped: where a pair may not share a forward pass

    @property
    def rows(self) -> int:
        return 2 if self is StepKind.PAIR else 1

    @property
    def commits(self) -> bool:
        """Whether row 0 stays in the cache."""
        return self in (StepKind.PAIR, StepKind.SINGLE)

    @property
    def draft_row(self) -> int | None:
        """Index of the row that must not wait, if there is one."""
        return {StepKind.PAIR: 1, StepKind.DRAFT: 0}.get(self)


class CompressedLayer(Protocol):
    """One full-attention layer of one sequence, as the attention sees it.

    `residual_keys` and `residual_values` [Hkv, r, D] are the exact newest tokens, the pass's committed row among them; their first
    `pending_group_tokens` ones (whole groups) become low bit when the pass is over.
    """

    rows: Rows
    next_positions: Tensor | None  # [Hkv, k]: what the last pass selected for this one

    @property
    def copy(self) -> LowBitKV: ...
    @property
    def residual_keys(self) -> Tensor: ...
    @property
    def residual_values(self) -> Tensor: ...
    @property
    def pending_group_tokens(self) -> int: ...


@dataclass(frozen=True)
class StepSpec:
    """What a pass does in every layer."""

    kind: StepKind
    policy: Policy
    top_k: int
    counters: Counters

    @property
    def selects_next(self) -> bool:
        """Whether the last row's attention says what to prefetch for the next pass."""
        if self.policy is Policy.VERIFIED:
            return self.kind.draft_row is not None
        if self.policy is Policy.SPECULATIVE:
            return self.kind is not StepKind.SINGLE
        return self.policy is Policy.PREVIOUS


@dataclass
class _Recent:
    """The part of a pass outside the copy: residual and the pass's own rows."""

    out: Tensor  # [B, Hkv, G, n, D]
    lse: Tensor  # [B, Hkv, G, n], sinks included
    own_lse: Tensor  # the same without sinks
    pending_scores: list[Tensor]  # per sequence [Hkv, G, n, retiring]
    staying_lse: Tensor  # lse of what is not retiring, sinks included


def mixed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> Tensor:
    """Attention of a pass in one layer, for a ragged batch.

    Args:
        query: [B, Hq, n, D]; keys, values: [B, Hkv, n, D], the rows' own. A committed row is in its layer's residual already.

    Returns:
        float32 [B, Hq, n, D].
    """
    backend = dispatch.fused(query) if plan.policy.verifies else None
    if backend is not None:
        return _whole_layer(backend, query, keys, values, layers, params, plan)
    recent = _recent(query, keys, values, layers, params, plan)
    copies = [layer.copy for layer in layers]
    lengths = [copy.length for copy in copies]
    for layer in layers:
        layer.rows.begin_step()
    if max(lengths) == 0 and not any(layer.pending_group_tokens for layer in layers):
        return _heads(_with_copy(None, recent))

    scores = dispatch.score(query, copies, lengths, params.scaling, params.softcap)  # [B, Hkv, G, n, S]
    if plan.policy.verifies:
        selected = dispatch.select(scores, recent.lse, lengths, plan.top_k)  # [B, Hkv, n, k]
        positions = _start(selected, layers, plan)
        if plan.selects_next:
            _submit(_next_positions(scores, recent, lengths, layers, plan, selected), layers)
        rows = _fetched(layers)
        dispatch.rescore(query, scores, positions, rows, params.scaling, params.softcap)
    else:
        positions, rows = _prefetched_rows(layers, query, keys, plan)
        dispatch.rescore(query, scores, positions, rows, params.scaling, params.softcap)
        if plan.selects_next:
            if plan.kind.commits:
                _count_hits(scores, recent, lengths, positions, plan)
            _submit(_next_positions(scores, recent, lengths, layers, plan, None), layers)
    return _heads(_with_copy(dispatch.attend(scores, positions, rows, copies, lengths), recent))


def _whole_layer(
    backend: NativeKernels,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> Tensor:
    """A verifying pass on kernels that do a layer in one call, or in three, the copy's part while missing rows are read.

    Arguments as in `mixed_attention`.
    """
    copies = [layer.copy for layer in layers]
    lengths = [copy.length for copy in copies]
    recent = _recent_tokens(keys, values, layers, plan.kind)
    fetched = [layer.rows for layer in layers]
    in_place = [rows.stored() for rows in fetched if isinstance(rows, InPlaceRows)]
    if len(in_place) == len(layers):
        if plan.kind is not StepKind.DRAFT:
            used = sum(copy.num_kv_heads * min(plan.top_k, copy.length) for copy in copies)
            plan.counters.rows_selected += used
            plan.counters.rows_ready += used
        return backend.decode_in_place(query, copies, recent, in_place, plan.top_k, params.scaling, params.softcap, params.sinks)

    for rows in fetched:
        rows.begin_step()
    k = min(plan.top_k, max(lengths))
    step = backend.layer_step(query, copies, recent, k, params.scaling, params.softcap, params.sinks)
    selected = step.select()
    positions = _start(selected, layers, plan)
    step.attend_copy(positions)
    if plan.selects_next:
        if any(layer.pending_group_tokens for layer in layers):
            last = query[:, :, -1:]
            scores = dispatch.score(last, copies, lengths, params.scaling, params.softcap)
            outside = _recent(query, keys, values, layers, params, plan)
            _submit(_next_positions(scores, outside, lengths, layers, plan, None), layers)
        else:
            _submit(selected[:, :, -1:], layers)
    return step.attend_fetched(positions, _fetched(layers))


def _recent_tokens(keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], kind: StepKind) -> list[RecentTokens]:
    """The residual and behind it the pass's own rows, per sequence."""
    if kind is StepKind.SINGLE:
        return [RecentTokens(layer.residual_keys, layer.residual_values) for layer in layers]
    own = _own_rows(kind)
    return [
        RecentTokens(
            torch.cat([layer.residual_keys, keys[b, :, own]], dim=1), torch.cat([layer.residual_values, values[b, :, own]], dim=1)
        )
        for b, layer in enumerate(layers)
    ]


def _own_rows(kind: StepKind) -> slice:
    """The pass's rows that are not in the residual."""
    return slice(1, None) if kind.commits else slice(0, None)


def select_first(query: Tensor, layer: CompressedLayer, params: AttentionParams, top_k: int) -> None:
    """Policy `previous`: what the prompt's last token wants is there when the first output token is decoded.

    Args:
        query: [Hq, 1, D] of the last prompt token, whose key and value are in the residual or the copy.
    """
    copy = layer.copy
    score = exact_scores(query, layer.residual_keys, params)
    lse = add_sinks(score.logsumexp(-1)[None], params)
    scores = dispatch.score(query[None], [copy], [copy.length], params.scaling, params.softcap)
    _submit(dispatch.select(scores, lse, [copy.length], top_k), [layer])


def _recent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    plan: StepSpec,
) -> _Recent:
    """Exact attention of the rows over the residual and over themselves."""
    own = _own_rows(plan.kind)
    outs, lses, pending_scores, staying = [], [], [], []
    for b, layer in enumerate(layers):
        seen_keys = torch.cat([layer.residual_keys, keys[b, :, own]], dim=1)  # [Hkv, r + own, D]
        seen_values = torch.cat([layer.residual_values, values[b, :, own]], dim=1)
        score = exact_scores(query[b], seen_keys, params)  # [Hkv, G, n, r + own]
        if plan.kind is StepKind.PAIR:
            score[:, :, 0, -1] = -torch.inf  # row 0 does not see row 1
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
    """The sinks' share joins every row's normaliser. lse [B, Hkv, G, n]."""
    if params.sinks is None:
        return lse
    return torch.logaddexp(lse, params.sinks.float().reshape(1, *lse.shape[1:3], 1))


def _start(selected: Tensor, layers: Sequence[CompressedLayer], plan: StepSpec) -> Tensor:
    """Begin to fetch each row's own top-k [B, Hkv, n, k] -> the same with -1 for what the guess does without. The real row's are
    waited for in `_fetched`.
    """
    real_rows = selected.shape[2] - (plan.kind.draft_row is not None)
    used = []
    for wanted, layer in zip(selected, layers, strict=True):
        positions, ready = layer.rows.start(wanted, real_rows)
        plan.counters.rows_selected += int((positions[:, :real_rows] >= 0).sum())
        plan.counters.rows_ready += ready
        used.append(positions)
    return torch.stack(used)


def _fetched(layers: Sequence[CompressedLayer]) -> Tensor:
    """The rows [B, Hkv, n, k, 2 D] of what was started."""
    return torch.stack([layer.rows.finish() for layer in layers])


def _prefetched_rows(layers: Sequence[CompressedLayer], query: Tensor, keys: Tensor, plan: StepSpec) -> tuple[Tensor, Tensor]:
    """What the last pass selected, the same for every row of this one."""
    heads, n, dim = keys.shape[1], query.shape[2], query.shape[3]
    wanted = [layer.next_positions for layer in layers]
    k = max((w.shape[1] for w in wanted if w is not None), default=0) if plan.policy is not Policy.NONE else 0
    positions = torch.full((len(layers), heads, k), -1, device=query.device)
    rows = torch.zeros(len(layers), heads, k, 2 * dim, dtype=keys.dtype, device=query.device)
    if k:
        for b, (layer, w) in enumerate(zip(layers, wanted, strict=True)):
            if w is not None:
                rows[b, :, : w.shape[1]] = layer.rows.fetch(w)[0]
                positions[b, :, : w.shape[1]] = w
    return positions.unsqueeze(2).expand(-1, -1, n, -1), rows.unsqueeze(2).expand(-1, -1, n, -1, -1)


def _next_positions(
    scores: Tensor,
    recent: _Recent,
    lengths: list[int],
    layers: Sequence[CompressedLayer],
    plan: StepSpec,
    selected: Tensor | None,
) -> Tensor:
    """The last row's top-k among the positions that are at low bit in the next pass -> [B, Hkv, 1, k].

    Groups that retire when this pass is over are candidates with their exact scores.
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
    """Start fetching, as soon as the layer knows what it will need. positions [B, Hkv, 1, k]."""
    for b, layer in enumerate(layers):
        layer.next_positions = positions[b, :, 0]
        layer.rows.submit(layer.next_positions)


def _count_hits(scores: Tensor, recent: _Recent, lengths: list[int], prefetched: Tensor, plan: StepSpec) -> None:
    """How much of what the real row wants the prefetch had brought; for the statistics only."""
    wanted = dispatch.select(scores[:, :, :, :1], recent.lse[..., :1], lengths, plan.top_k)[:, :, 0]  # [B, Hkv, k]
    chosen = wanted >= 0
    if prefetched.shape[-1]:
        hit = (wanted.unsqueeze(-1) == prefetched[:, :, 0].unsqueeze(-2)).any(-1) & chosen
        plan.counters.rows_ready += int(hit.sum())
    plan.counters.rows_selected += int(chosen.sum())


def _with_copy(copy_part: tuple[Tensor, Tensor] | None, recent: _Recent) -> Tensor:
    """Merge the copy's part with the recent one -> [B, Hkv, G, n, D]."""
    if copy_part is None:
        return recent.out * (recent.own_lse - recent.lse).exp().unsqueeze(-1)
    out, lse = copy_part
    total = torch.logaddexp(lse, recent.lse)
    weight = (recent.own_lse - total).exp().unsqueeze(-1)
    return out * (lse - total).exp().unsqueeze(-1) + recent.out * weight


def _heads(out: Tensor) -> Tensor:
    """[B, Hkv, G, n, D] -> [B, Hq, n, D]."""
    return out.flatten(1, 2)
