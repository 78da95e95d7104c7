"""A prefilled request while it is decoded: which tokens go into the next step, and what is done with its logits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specache.cache.sequence import Sequence
from specache.engine.handle import Request
from specache.engine.sampling import draft_tokens, sample_next, with_drafts
from specache.platform import modes
from specache.stats import Counters


class Run(Protocol):
    """What the engine decodes.

    Attributes:
        sequences: of the cache, `B`.
        drafts: the draft tokens [B] beside the next tokens; `None` before pre-decoding.
    """

    sequences: list[Sequence]
    drafts: list[int] | None

    @property
    def active(self) -> list[int]:
        """Return which sequences the next step decodes."""

    @property
    def tokens(self) -> list[int]:
        """Return the tokens [B] that the next step feeds."""

    def take_first_drafts(self, active: list[int], logits: Tensor) -> None:
        """Choose draft tokens from pre-decoding's logits [A, V]."""

    def take(self, active: list[int], real: Tensor, drafts: Tensor | None, counters: Counters) -> None:
        """Go on with a step's logits [A, V] of the real rows, and of the draft rows where there are some."""


class SampledRun:
    """Chooses tokens as the request's parameters say.

    Args:
        logits: float32 [B, V] of the prompts' last tokens.
    """

    def __init__(self, request: Request, sequences: list[Sequence], logits: Tensor) -> None:
        self.sequences = sequences
        self.drafts: list[int] | None = None
        self._request = request
        self._logits = logits

    @property
    def active(self) -> list[int]:
        return self._request.state.active

    @property
    def tokens(self) -> list[int]:
        return self._request.state.last_tokens

    def sample(self) -> None:
        """Choose the next token of every sequence, in the modes of PyTorch that the caller set."""
        request = self._request
        before = request.state.new.tolist()
        with modes.callers():
            sample_next(request.state, self._logits, request.params, self.sequences, request.streamer)
            if request.callback is not None:
                tokens = request.state.last_tokens
                for row, (count, earlier) in enumerate(zip(request.state.new.tolist(), before, strict=True)):
                    if count > earlier:
                        request.callback(row, tokens[row])

    def take_first_drafts(self, active: list[int], logits: Tensor) -> None:
        with modes.callers():
            self.drafts = draft_tokens(self._request.params, self._request.state.input_ids, logits, active)

    def take(self, active: list[int], real: Tensor, drafts: Tensor | None, counters: Counters) -> None:
        self._logits[active] = real
        earlier = self.drafts
        context = None if earlier is None else with_drafts(self._request.state, earlier)
        self.sample()
        if earlier is not None and drafts is not None and context is not None:
            _count_drafts(counters, [self.tokens[i] for i in active], [earlier[i] for i in active])
            with modes.callers():
                self.drafts = draft_tokens(self._request.params, context, drafts, active)


class GivenRun:
    """Decodes tokens that the caller gives, one step at a time; its draft tokens are the likeliest ones.

    Attributes:
        logits: float32 [B, V] of the last step.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.drafts: list[int] | None = None
        self.logits: Tensor | None = None
        self.tokens: list[int] = []
        self._given = False
        self._counted_drafts: list[int] | None = None

    @property
    def active(self) -> list[int]:
        return list(range(len(self.sequences))) if self._given else []

    def give(self, tokens: list[int], counters: Counters) -> None:
        """Set the tokens [B] of the next step."""
        if self._counted_drafts is not None:
            _count_drafts(counters, tokens, self._counted_drafts)
        self.tokens, self._given = list(tokens), True

    def take_first_drafts(self, active: list[int], logits: Tensor) -> None:
        self.drafts = logits.argmax(-1).tolist()

    def take(self, active: list[int], real: Tensor, drafts: Tensor | None, counters: Counters) -> None:
        self.logits, self._given = real, False
        if drafts is not None:
            self._counted_drafts, self.drafts = self.drafts, torch.argmax(drafts, -1).tolist()


def _count_drafts(counters: Counters, tokens: list[int], drafts: list[int]) -> None:
    """Count how many draft tokens became the real ones."""
    counters.drafts += len(tokens)
    counters.drafts_right += sum(token == draft for token, draft in zip(tokens, drafts, strict=True))
