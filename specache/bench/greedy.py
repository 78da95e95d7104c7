"""Greedy generation with a SpeCache, one step at a time. The model must be `attached`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specache.cache.cache import SpeCache
from specache.engine.decoder import Decoder, Progress


class GreedySteps:
    """Decodes; the guess is the likeliest token, as in `generate` without sampling.

    Args:
        tokens: the first to decode, of every sequence.
        guesses: of the tokens after these; ignored where the policy has no guess row.
    """

    def __init__(self, model: Any, cache: SpeCache, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        self._decoder = Decoder(model, cache)
        self._sequences = range(len(cache.sequences))
        self.tokens = list(tokens)
        self._drafts = list(drafts) if cache.config.policy.drafts else None

    @property
    def out_of_room(self) -> bool:
        """Whether memory did not suffice for the steps as they are on a GPU, and slower ones were taken."""
        return self._decoder.out_of_room

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence."""
        logits = self._decoder.step(self._sequences, self.tokens, self._drafts)
        self.tokens = logits.real.argmax(-1).tolist()
        if self._drafts is not None:
            self._drafts = logits.draft.argmax(-1).tolist()


@torch.no_grad()
def read_prompt(model: Any, cache: SpeCache, token_ids: list[int], progress: Progress) -> int:
    """Prefill a new sequence of the cache, in chunks of its configuration -> the first token of the answer."""
    cache.sequences.append(cache.new_sequence())
    logits = Decoder(model, cache).prefill(cache.sequences[-1], token_ids, cache.config.prefill_chunk, progress)
    return int(logits.argmax())


@torch.no_grad()
def start(model: Any, cache: SpeCache, tokens: Sequence[int]) -> GreedySteps:
    """Steps that begin with `tokens`, of every sequence; the first guesses come from pre-decoding (Algorithm 2)."""
    for sequence in cache.sequences:
        sequence.prepare_decode()  # of a fork nobody else did it
    if not cache.config.policy.drafts:
        return GreedySteps(model, cache, tokens, ())
    drafts = Decoder(model, cache).pre_decode(range(len(cache.sequences)), tokens).argmax(-1)
    return GreedySteps(model, cache, tokens, drafts.tolist())
