"""Prefill of one request: every distinct prompt once."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.engine.decoder import Decoder, PrefillChunks, Progress
from specache.platform import modes


def prefill_texts(
    decoder: Decoder, cache: SpeCache, sequences: list[Sequence], token_ids: list[list[int]], chunk: int, progress: Progress | None
) -> PrefillChunks:
    """Prefill every prompt, one chunk at a time.

    If a chunk fails, or the generator is closed early, new sequences are removed and continued ones
    are restored.

    Args:
        sequences: the cached sequences that the prompts continue, one each. An empty list is filled
            with new ones; of equal prompts the first is prefilled and the others are forks of it.

    Yields:
        `None` after every chunk but the last.

    Returns:
        float32 logits [B, V] of the prompts' last tokens.
    """
    first: dict[tuple[int, ...], int] = {}
    fresh = not sequences
    cache.context.expected_sequences = len(cache.sequences) + (len(token_ids) if fresh else 0)
    total = sum(len(ids) for ids in token_ids)
    done = 0
    logits: list[Tensor] = []
    try:
        for index, ids in enumerate(token_ids):
            twin = first.setdefault(tuple(ids), index)
            if fresh:
                cache.sequences.append(cache.repeat(sequences[twin]) if twin != index else cache.new_sequence())
                sequences.append(cache.sequences[-1])
            if fresh and twin != index:
                sequences[index].prepare_decode()
                logits.append(logits[twin])
            else:
                if done:
                    yield
                report = _offset_progress(progress, done, total)
                logits.append((yield from decoder.prefill_chunks(sequences[index], ids, chunk, report)))
            done += len(ids)
    except BaseException:
        if fresh:
            for sequence in sequences:
                sequence.clear()
                cache.sequences.remove(sequence)
            sequences.clear()
        raise
    return torch.stack(logits)


def _offset_progress(progress: Progress | None, offset: int, total: int) -> Progress:
    if progress is None:
        return lambda done, of: None

    def report(done: int, of: int) -> None:
        with modes.callers():
            progress(offset + done, total)

    return report
