"""Prefill of a batch: every text, equal ones once."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.cache.cache import SpeCache
from specache.engine.decoder import Decoder, Progress
from specache.platform import modes


def prefill_batch(decoder: Decoder, cache: SpeCache, token_ids: list[list[int]], chunk: int, progress: Progress | None) -> Tensor:
    """Prefill every sequence, equal ones once -> logits [B, V] of their last tokens.

    A failure leaves a cache that was empty empty, and others with what they held.
    """
    first: dict[tuple[int, ...], int] = {}
    fresh = not cache.sequences
    cache.expected_sequences = len(token_ids)
    total = sum(len(ids) for ids in token_ids)
    done = 0
    logits: list[Tensor] = []
    try:
        for index, ids in enumerate(token_ids):
            twin = first.setdefault(tuple(ids), index)
            if fresh:
                cache.sequences.append(cache.repeat(twin) if twin != index else cache.new_sequence())
            if fresh and twin != index:
                cache.sequences[index].prepare_decode()
                logits.append(logits[twin])
            else:
                report = _offset_progress(progress, done, total)
                logits.append(decoder.prefill(cache.sequences[index], ids, chunk, report))
            done += len(ids)
    except BaseException:
        if fresh:
            for sequence in cache.sequences:
                sequence.clear()
            cache.sequences.clear()
        raise
    return torch.stack(logits)


def _offset_progress(progress: Progress | None, offset: int, total: int) -> Progress:
    if progress is None:
        return lambda done, of: None

    def report(done: int, of: int) -> None:
        with modes.callers():
            progress(offset + done, total)

    return report
