"""Prefill of one request: every distinct prompt once, from a stored prefix if there is one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.engine.chunked_prefill import PrefillChunks, Progress, StopReading
from specache.engine.decoder import Decoder
from specache.engine.prefix_reuse import PrefixReuse
from specache.platform import modes

OnPromptLogits = Callable[[int, int, Tensor], None]  # (row, first token, logits [n, V] that follow it)


def prefill_texts(
    decoder: Decoder,
    cache: SpeCache,
    sequences: list[Sequence],
    token_ids: list[list[int]],
    chunk: int,
    progress: Progress | None,
    on_logits: OnPromptLogits | None = None,
    reuse: PrefixReuse | None = None,
) -> PrefillChunks:
    """Prefill every prompt, one chunk at a time.

    If a chunk fails, or the generator is closed early, new sequences are removed and continued ones
    are restored. `StopReading`, thrown into it, leaves them with what was read.

    Args:
        sequences: the cached sequences that the prompts continue, one each. An empty list is filled
            with new ones; of equal prompts the first is prefilled and the others are forks of it.
        on_logits: called with the logits of every chunk.
        reuse: the stored prefixes that new sequences may begin with.

    Yields:
        `None` after every chunk but the last, and while a prefix is brought back from a disk.

    Returns:
        float32 logits [B, V] of the prompts' last tokens.
    """
    first: dict[tuple[int, ...], int] = {}
    fresh = not sequences
    cache.context.expected_sequences = len(cache.sequences) + (len(token_ids) if fresh else 0)
    total = sum(len(ids) for ids in (set(map(tuple, token_ids)) if fresh else token_ids))
    done = 0
    logits: list[Tensor] = []
    try:
        for index, ids in enumerate(token_ids):
            twin = first.setdefault(tuple(ids), index)
            if fresh:
                own = twin == index
                sequences.append((yield from _new_sequence(cache, ids, reuse)) if own else cache.repeat(sequences[twin]))
                if sequences[index] not in cache.sequences:
                    cache.sequences.append(sequences[index])
            if fresh and twin != index:
                sequences[index].prepare_decode()
                logits.append(logits[twin])
            else:
                if done:
                    yield
                report = _offset_progress(progress, done, total)
                of_row = None if on_logits is None else partial(on_logits, index)
                logits.append((yield from decoder.prefill_chunks(sequences[index], ids, chunk, report, on_logits=of_row)))
                if reuse is not None:
                    reuse.was_read(sequences[index])
                done += len(ids)
    except StopReading:
        raise
    except BaseException:
        if fresh:
            for sequence in sequences:
                sequence.clear()
                cache.sequences.remove(sequence)
            sequences.clear()
        raise
    return torch.stack(logits)


def _new_sequence(cache: SpeCache, token_ids: list[int], reuse: PrefixReuse | None) -> Generator[None, None, Sequence]:
    taken = None if reuse is None else (yield from reuse.take(cache, token_ids))
    return cache.new_sequence() if taken is None else taken


def _offset_progress(progress: Progress | None, offset: int, total: int) -> Progress:
    if progress is None:
        return lambda done, of: None

    def report(done: int, of: int) -> None:
        with modes.callers():
            progress(offset + done, total)

    return report
