"""The decoding state of a prefilled request: its next tokens, and what its logits are for."""

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
    """A request that the engine decodes.

    Attributes:
        sequences: its `B` cached sequences.
        drafts: the draft tokens [B] that follow the next tokens; `None` before pre-decoding.
    """

    sequences: list[Sequence]
    drafts: list[int] | None

    @property
    def active(self) -> list[int]:
        """Return the indices of the sequences that the next step decodes."""

    @property
    def tokens(self) -> list[int]:
        """Return the tokens [B] that are the input of the next step."""

    def take_first_drafts(self, active: list[int], logits: Tensor) -> None:
        """Choose draft tokens from the logits [A, V] of pre-decoding."""

    def take(self, active: list[int], real: Tensor, drafts: Tensor | None, counters: Counters) -> None:
        """Take a step's logits [A, V] of the real tokens, and of the draft tokens if any."""


class SampledRun:
    """A request whose tokens are sampled as its parameters say.

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
        """Choose the next token of every sequence, in the caller's PyTorch modes."""
        request = self._request
        before = request.state.new.tolist()
        with modes.callers():
            sample_next(request.state, self._logits, request.params, self.sequences, request.streamer)
            if request.callback is None and request.on_token is None:
                return
            tokens = request.state.last_tokens
            for row, (count, earlier) in enumerate(zip(request.state.new.tolist(), before, strict=True)):
                if count > earlier and request.callback is not None:
                    request.callback(row, tokens[row])
                if count > earlier and request.on_token is not None:
                    request.on_token(row, tokens[row], self._logits[row])

    def take_first_drafts(self, active: list[int], logits: Tensor) -> None:
        with modes.callers():
            self.drafts = draft_tokens(self._request.params, self._request.state.input_ids, logits, active)

    def take(self, active: list[int], real: Tensor, drafts: Tensor | None, counters: Counters) -> None:
        self._logits[active] = real
        previous = self.drafts
        context = None if previous is None else with_drafts(self._request.state, previous)
        self.sample()
        if previous is not None and drafts is not None and context is not None:
            _count_drafts(counters, [self.tokens[i] for i in active], [previous[i] for i in active])
            with modes.callers():
                self.drafts = draft_tokens(self._request.params, context, drafts, active)


class GivenRun:
    """A request whose tokens the caller gives, one step at a time. Its drafts are greedy.

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
    """Count draft tokens, and those that equal the real tokens."""
    counters.drafts += len(tokens)
    counters.drafts_right += sum(token == draft for token, draft in zip(tokens, drafts, strict=True))
