"""Times chunks of a long prompt on this machine, before there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specache.cache.cache import SpeCache
from specache.engine.attention_hook import attached
from specache.engine.decoder import Decoder
from specache.errors import FastMemoryError
from specache.platform import modes

CONTEXT = 4096  # tokens in front of the chunks: a chunk takes longer, the longer the prompt is so far
CONTEXT_BYTES = 256 << 20  # most bytes of their 16-bit rows
FIRST_PASS = 32  # tokens that are really read, which makes the layers


class ChunkTimer:
    """Reads chunks behind a text of random keys and values. `over` makes one."""

    def __init__(self, model: Any, cache: SpeCache) -> None:
        info = cache.info
        limits = (info.max_positions, info.position_limit, info.rope_switch)
        self._most_tokens = min((limit for limit in limits if limit is not None), default=1 << 40)
        self._vocabulary = cache.resources.dimensions.vocabulary
        self._decoder = Decoder(model, cache)
        self._sequence = cache.new_sequence()
        row_bytes = sum(layer.row_bytes(info.dtype.itemsize) for layer in cache.resources.dimensions.full_layers)
        self._store(min(CONTEXT, CONTEXT_BYTES // row_bytes, self._most_tokens // 2))

    @classmethod
    @contextmanager
    def over(cls, model: Any, cache: SpeCache) -> Iterator[ChunkTimer]:
        """Yield a timer for an empty cache, which is empty again after the block.

        Raises:
            UsageError: a call uses the cache.
            FastMemoryError: not even a few tokens fit into the byte budget.
        """
        with modes.ours(), cache.in_use.by("timing a chunk"), attached(model):
            timer = cls(model, cache)
            try:
                yield timer
            finally:
                timer._sequence.clear()
                cache.context.count_from_zero()

    def __call__(self, tokens: int) -> float:
        """Return the seconds that a chunk takes; infinity if the model has no positions for it.

        Raises:
            FastMemoryError: the byte budget has no room for it.
        """
        if self._sequence.length + tokens > self._most_tokens:
            return math.inf
        started = time.perf_counter()
        self._read(tokens)
        return time.perf_counter() - started

    def _read(self, tokens: int) -> None:
        new = [token % self._vocabulary for token in range(tokens)]
        logits = self._decoder.prefill(self._sequence, self._sequence.token_ids + new, tokens, lambda done, total: None)
        logits[0].item()  # wait for the device

    def _store(self, tokens: int) -> None:
        """Store so many random tokens, or fewer if the budget does not allow them."""
        while True:
            try:
                self._read(min(FIRST_PASS, self._most_tokens))
                self._sequence.store_random(tokens)
                return self._read(min(FIRST_PASS, self._most_tokens - self._sequence.length))  # also a pass must fit
            except FastMemoryError:
                self._sequence.clear()
                if not tokens:
                    raise
            tokens //= 4
