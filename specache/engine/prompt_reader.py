"""The request whose prompts an engine reads, one chunk per step."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from specache.cache.cache import SpeCache
from specache.engine.chunked_prefill import PrefillChunks, StopReading
from specache.engine.decoder import Decoder
from specache.engine.handle import Handle
from specache.engine.prefilling import prefill_texts
from specache.errors import SlowTierError
from specache.stats import MemoryUse


class PromptReader:
    """Reads the prompts of one request at a time.

    Attributes:
        handle: the request, or `None`.
    """

    def __init__(self, decoder: Decoder, cache: SpeCache) -> None:
        self.handle: Handle | None = None
        self._decoder = decoder
        self._cache = cache
        self._chunks: PrefillChunks | None = None

    def begin(self, handle: Handle, chunk: int) -> None:
        """Begin a request's prompts, `chunk` tokens per pass, from the prefixes that it reuses."""
        request = handle.request
        texts = request.sequences, request.token_ids
        self._chunks = prefill_texts(
            self._decoder, self._cache, *texts, chunk, request.progress, request.on_prompt_logits, handle.reuse
        )
        self.handle = handle

    def next_chunk(self) -> Tensor | None:
        """Read a chunk. Return the logits [B, V] of the last tokens once everything is read."""
        assert self._chunks is not None, "only while there is a request"
        try:
            next(self._chunks)
        except StopIteration as end:
            self.handle = self._chunks = None
            return end.value
        return None

    def stop(self, handle: Handle, keeps: bool) -> None:
        """Stop reading this request's prompts. What was read stays stored if it `keeps` it."""
        if self.handle is not handle or self._chunks is None:
            return
        chunks, self.handle, self._chunks = self._chunks, None, None
        if not keeps:
            return chunks.close()
        with suppress(StopReading):
            chunks.throw(StopReading())


def free(cache: SpeCache, handle: Handle, error: BaseException | None) -> None:
    """Free a request's sequences at its end, or leave their prompts to the stored prefixes.

    Args:
        error: the error that ended it. The rows of a slow tier that failed are not left to others.
    """
    sequences, reuse = handle.request.sequences, handle.reuse
    handle.memory = sum((sequence.memory() for sequence in sequences), MemoryUse())
    if sequences:
        cache.release_device_batch()
    if reuse is not None:
        reuse.put_back(cache)
    seen: set[tuple[int, ...]] = set()
    for sequence, ids in zip(sequences, map(tuple, handle.request.token_ids), strict=False):
        if sequence in cache.sequences:
            cache.sequences.remove(sequence)
        if reuse is not None:
            is_twin, unreadable = ids in seen, isinstance(error, SlowTierError)
            seen.add(ids)
            if not is_twin and not unreadable and reuse.end(sequence):
                continue
            reuse.drop(sequence)
        sequence.clear()
    handle.request.sequences = []  # while they exist, hot sets are divided by them
