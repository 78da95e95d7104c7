"""One layer of a decode step in one call of the kernels, its committed tokens stored as well.

Kernels do what `specache.attention.decode.attend` does, with the same bits, for policies whose
queries use what they select (`Policy.verifies`): over rows in memory, which they read in place or
copy through hot sets, and over rows on a disk, which they read through io_uring.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specache.attention.decode import CompressedLayer, StepKind, StepSpec, mixed_attention
from specache.errors import NonFiniteError
from specache.kernels import dispatch
from specache.kernels.types import AttentionParams, FetchedRows, FetchedStep
from specache.rows.fetch import HotSetRowFetcher


def decode_at_once(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[CompressedLayer],
    params: AttentionParams,
    spec: StepSpec,
) -> Tensor | None:
    """Store the committed tokens and compute a step in one layer, in one call of the kernels.

    Args:
        query: [B, Hq, n, D].
        keys, values: [B, Hkv, n, D] of the step's tokens, in the layers' dtype.

    Returns:
        [B, n, Hq, D] in the query's dtype. `None` if the step takes several calls: policy, rows or
        kernels need them. Nothing was stored then.

    Raises:
        NonFiniteError: a committed key or value is NaN or infinity.
        SlowTierError: rows cannot be read.
    """
    if not spec.verifies:
        return None
    if layers[0].row_fetcher.in_place:
        return _in_place(query, keys, values, layers, params, spec)
    return _fetched(query, keys, values, layers, params, spec)


def _in_place(
    query: Tensor, keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], params: AttentionParams, spec: StepSpec
) -> Tensor | None:
    """Compute a step that reads its rows in place."""
    for layer in layers:
        if not layer.row_fetcher.in_place:
            return None
    out = dispatch.decode_in_place(query, keys, values, layers, spec.commits, spec.top_k, params)
    if out is None:
        return None
    used = 0
    for b, layer in enumerate(layers):
        used += spec.top_k.of(layer.table.length)
        if spec.commits:
            layer.count_appended(query, b)
    if spec.kind is not StepKind.DRAFT:
        used *= keys.shape[1]
        spec.counters.rows_selected += used
        spec.counters.rows_ready += used
    return out


def _fetched(
    query: Tensor, keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], params: AttentionParams, spec: StepSpec
) -> Tensor | None:
    """Compute a step that fetches its rows into hot sets."""
    fetchers = [layer.row_fetcher for layer in layers if isinstance(layer.row_fetcher, HotSetRowFetcher)]
    can = len(fetchers) == len(layers) and all(fetcher.fetches_at_once for fetcher in fetchers)
    if not (can and dispatch.fetches_at_once(query, keys.shape[3], layers[0])):
        return None
    real_queries = query.shape[2] - (spec.kind.draft_row is not None)
    stored = _store_full_blocks(query, keys, values, layers, spec)
    pending = [layer.pending_after(spec.commits and not there) for layer, there in zip(layers, stored, strict=True)]
    pairs = real_queries * spec.top_k.of(max(layer.table.length for layer in layers))
    if spec.selects_next:
        longest = max(layer.table.length + more for layer, more in zip(layers, pending, strict=True))
        pairs = max(pairs, spec.top_k.of(longest))
    fetched = [
        FetchedRows(*fetcher.begin_at_once(pairs), stored=there, pending=more)
        for fetcher, there, more in zip(fetchers, stored, pending, strict=True)
    ]
    try:
        step = dispatch.decode_fetched(
            query, keys, values, layers, fetched, spec.commits, spec.top_k, params, real_queries, spec.selects_next
        )
    except NonFiniteError:
        raise  # before anything was fetched
    except Exception:
        for fetcher in fetchers:
            fetcher.drop()  # a hot set may lack rows that it counts as cached
        raise
    if spec.commits:
        for b, layer in enumerate(layers):
            if not stored[b]:
                layer.count_appended(query, b)
    if step.out is None:  # in a way that reports the cause
        return mixed_attention(query, keys, values, layers, params, spec).transpose(1, 2).to(query.dtype)
    _count(step, layers, fetchers, spec)
    return step.out


def _store_full_blocks(
    query: Tensor, keys: Tensor, values: Tensor, layers: Sequence[CompressedLayer], spec: StepSpec
) -> list[bool]:
    """Store the committed tokens that kernels cannot: those that fill a block of a disk.

    Return which were stored.
    """
    stored = [spec.commits and not layer.has_room for layer in layers]
    for b, layer in enumerate(layers):
        if stored[b]:
            layer.append(query[b, :, :1], keys[b, :, :1], values[b, :, :1])
    return stored


def _count(step: FetchedStep, layers: Sequence[CompressedLayer], fetchers: Sequence[HotSetRowFetcher], spec: StepSpec) -> None:
    """Count what a step fetched, and keep what it selected for the next one."""
    for b, (layer, fetcher, count) in enumerate(zip(layers, fetchers, step.counts, strict=True)):
        spec.counters.rows_selected += count.selected
        spec.counters.rows_ready += count.ready
        fetcher.count_fetched(count.copied, count.seconds)
        if step.next_positions is not None:
            layer.next_positions = step.next_positions[b]
