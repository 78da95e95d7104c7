"""What is asked of an engine (`Request`), and what becomes of it (`Handle`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specache.cache.sequence import Sequence
from specache.engine.admission import planned_sequences
from specache.engine.decoder import Progress
from specache.engine.sampling import GenerationState, SamplingParams
from specache.errors import UsageError
from specache.planning.footprint import PlannedSequence


@dataclass
class Request:
    """The prompts of one call, and how their answers are chosen. `specache.make_request` makes one.

    Attributes:
        token_ids: the texts [B][tokens], without padding.
        state: the answers so far; its `input_ids` [B, S] are what logits processors see.
        params: how tokens are chosen. Processors, criteria and the generator belong to this request alone.
        stored_new_tokens: most tokens that decoding stores per sequence.
        sequences: of the engine's cache, one per text, that the texts continue; empty where they begin anew.
        chunk: prompt tokens per pass; `None` takes the configuration's.
        streamer: `put` gets the new tokens [B] of every step; `end` is called once.
        callback: gets (row, token) of every new token.
        progress: called with (prompt tokens done, in all) while prefilling.
    """

    token_ids: list[list[int]]
    state: GenerationState
    params: SamplingParams
    stored_new_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    chunk: int | None = None
    streamer: Any = None
    callback: Callable[[int, int], None] | None = None
    progress: Progress | None = None

    def planned(self) -> list[PlannedSequence]:
        """Return the sequences as a plan sees them before anything of them is stored; equal texts are prefilled once."""
        return planned_sequences([], self.token_ids, self.stored_new_tokens)

    def planned_rest(self) -> list[PlannedSequence]:
        """Return the running sequences as a plan sees them: what they hold, and what they will store yet."""
        planned = []
        for sequence, text in zip(self.sequences, self.token_ids, strict=True):
            left = max(0, self.stored_new_tokens - (sequence.length - len(text)))
            planned.append(PlannedSequence(sequence.length, left, stored=max(0, sequence.length - 1)))
        return planned

    @classmethod
    def of_sequences(cls, sequences: list[Sequence]) -> Request:
        """Return a request whose texts are stored already, and whose tokens the caller gives."""
        params = SamplingParams.greedy()
        state = GenerationState.start(torch.zeros(len(sequences), 1, dtype=torch.long), params)
        return cls([sequence.token_ids for sequence in sequences], state, params, 0, sequences)


class Handle:
    """A request in an engine. Any thread may ask and wait.

    Attributes:
        request: what was asked.
        error: what ended it, or `None`.
        finish_reasons: per sequence `stop`, `length`, `error`, `aborted` or `interrupted`; empty until it is done.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.error: BaseException | None = None
        self.finish_reasons: list[str | None] = []
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Return whether it is finished, failed or aborted."""
        return self._done.is_set()

    @property
    def new_token_ids(self) -> list[list[int]]:
        """Return the tokens of every answer so far, without padding."""
        return self.request.state.new_token_ids() or [[] for _ in self.request.token_ids]

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait until it is done and return prompts and answers [B, S + new], padded behind the end.

        Another thread must call `Engine.step` meanwhile.

        Raises:
            UsageError: it was not done within `timeout` seconds.
            Exception: what ended it.
        """
        if not self._done.wait(timeout):
            raise UsageError("The request is not done yet: call engine.step() until handle.done, or wait longer.")
        if self.error is not None:
            raise self.error
        return self.request.state.input_ids

    def finish(self, error: BaseException | None, reasons: list[str | None]) -> None:
        """Set what became of it, and wake who waits. The engine calls this once."""
        self.error, self.finish_reasons = error, reasons
        self._done.set()
