"""Decode greedily with a SpeCache, one step of the engine at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from specache.cache.cache import SpeCache
from specache.engine.attention_hook import attached
from specache.engine.chunked_prefill import Progress
from specache.engine.decoder import Decoder
from specache.engine.engine import Engine


class GreedySteps:
    """Decodes every sequence of a cache greedily, draft tokens included. The model is `attached`.

    Args:
        tokens: the first to decode, one per sequence.
        drafts: their draft tokens; `None` has pre-decoding choose them now.
    """

    def __init__(self, model: Any, cache: SpeCache, tokens: Sequence[int], drafts: Sequence[int] | None = None) -> None:
        self._model = model
        self._engine = Engine.over(model, cache)
        self._run = self._engine.resume(list(cache.sequences), list(tokens), drafts)
        self._counters = cache.counters
        self.tokens = list(tokens)

    @property
    def out_of_room(self) -> bool:
        """Return whether a GPU had no memory for static buffers, so that slower steps ran."""
        return self._engine.out_of_room

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the model use our attention inside the block, as at the beginning of an answer.

        A model that was the user's between two steps looks changed, and after a few changes an
        answer's steps run layer by layer.
        """
        with attached(self._model):
            self._engine.begin_answer()
            yield

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence."""
        self._run.give(self.tokens, self._counters)
        self._engine.step()
        assert self._run.logits is not None
        self.tokens = self._run.logits.argmax(-1).tolist()


@torch.no_grad()
def read_prompt(model: Any, cache: SpeCache, token_ids: list[int], progress: Progress) -> int:
    """Prefill a new sequence of the cache and return the first token of the answer."""
    cache.sequences.append(cache.new_sequence())
    logits = Decoder(model, cache).prefill(cache.sequences[-1], token_ids, cache.config.prefill_chunk, progress)
    return int(logits.argmax())
