"""A request to an engine (`Request`), and its result (`Handle`)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specache.cache.sequence import Sequence
from specache.engine.admission import planned_sequences
from specache.engine.chunked_prefill import Progress
from specache.engine.sampling import GenerationState, SamplingParams
from specache.errors import UsageError
from specache.planning.footprint import PlannedSequence
from specache.platform import modes
from specache.platform.notices import warn_and_go_on
from specache.stats import MemoryUse

if TYPE_CHECKING:
    from specache.engine.prefix_reuse import PrefixReuse


@dataclass
class Request:
    """The prompts of one call and how its tokens are chosen. `specache.make_request` makes one.

    Attributes:
        token_ids: prompts [B][tokens], without padding.
        state: the tokens generated so far; logits processors get its `input_ids` [B, S].
        params: how tokens are chosen. No other request may share processors, criteria or generator.
        stored_new_tokens: the most tokens that decoding stores per sequence.
        sequences: the cached sequences that the prompts continue, one each; empty for new prompts.
        chunk: prompt tokens per forward pass; `None` takes `prefill_chunk` of the configuration.
        streamer: `put` gets the new tokens [B] of every step; `end` is called once.
        callback: called with (row, token) of every new token.
        on_token: called with (row, token, float32 logits [V] of the model that it was chosen from).
        on_prompt_logits: called with (row, start, float32 logits [n, V] that follow the prompt's
            tokens from `start` on) for every chunk. The prompt is then read in full.
        progress: called with (prompt tokens done, prompt tokens in all) while prefilling.
        model: reference to the unwrapped model that it was made for; `None` fits any.
    """

    token_ids: list[list[int]]
    state: GenerationState
    params: SamplingParams
    stored_new_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    chunk: int | None = None
    streamer: Any = None
    callback: Callable[[int, int], None] | None = None
    on_token: Callable[[int, int, Tensor], None] | None = None
    on_prompt_logits: Callable[[int, int, Tensor], None] | None = None
    progress: Progress | None = None
    model: weakref.ref[Any] | None = None

    def check_model(self, model: Any) -> None:
        """Refuse an unwrapped model that the request was not made for.

        Raises:
            UsageError: says what to do.
        """
        if self.model is not None and self.model() is not model:
            raise UsageError(
                "This request was made for another model. Make it with specache.make_request(model, ...) for the engine's model."
            )

    def planned(self) -> list[PlannedSequence]:
        """Return the sequences for a plan before prefill. Equal prompts are prefilled once."""
        return planned_sequences([], self.token_ids, self.stored_new_tokens)

    def planned_rest(self) -> list[PlannedSequence]:
        """Return the running sequences for a plan: tokens stored, and tokens still to store."""
        planned = []
        for sequence, text in zip(self.sequences, self.token_ids, strict=True):
            remaining = max(0, self.stored_new_tokens - (sequence.length - len(text)))
            planned.append(PlannedSequence(sequence.length, remaining, stored=max(0, sequence.length - 1)))
        return planned

    def planned_now(self) -> list[PlannedSequence]:
        """Return the sequences for a plan while their prompts are read."""
        planned = self.planned()
        for index, sequence in enumerate(self.sequences):
            one = planned[index]
            planned[index] = PlannedSequence(one.prompt, one.new, stored=max(0, min(sequence.length, one.prompt) - 1))
        return planned

    @classmethod
    def of_sequences(cls, sequences: list[Sequence]) -> Request:
        """Return a request over prefilled sequences, whose new tokens the caller gives."""
        params = SamplingParams.greedy()
        state = GenerationState.start(torch.zeros(len(sequences), 1, dtype=torch.long), params)
        return cls([sequence.token_ids for sequence in sequences], state, params, 0, sequences)


class Handle:
    """The result of a request in an engine. Every method may be called from any thread.

    Attributes:
        request: the request.
        error: the exception that ended it, or `None`.
        finish_reasons: per sequence `stop`, `length`, `error`, `aborted` or `interrupted`; empty
            until the request is done.
        memory: the cache's bytes of the request when it ended, `None` until then.
        blocked_s: the `time.monotonic()` since when only stored prefixes may be in its way.
        reuse: the stored prefixes that it may use and leave, or `None`.
    """

    def __init__(self, request: Request, on_end: Callable[[Handle], None] | None = None, reuse: PrefixReuse | None = None) -> None:
        self.request = request
        self.reuse = reuse
        self.error: BaseException | None = None
        self.finish_reasons: list[str | None] = []
        self.memory: MemoryUse | None = None
        self.blocked_s: float | None = None
        self._on_end = on_end
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Return whether the request finished, failed or was aborted."""
        return self._done.is_set()

    @property
    def new_token_ids(self) -> list[list[int]]:
        """Return the new tokens [B][tokens] so far, without padding."""
        return self.request.state.new_token_ids() or [[] for _ in self.request.token_ids]

    def memory_now(self) -> MemoryUse:
        """Return the cache's bytes of the request now, or at its end if that has come."""
        now = sum((sequence.memory() for sequence in list(self.request.sequences)), MemoryUse())
        return self.memory or now  # asked for last: its sequences are freed after it is set

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds, and return whether it came."""
        return self._done.wait(timeout)

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait for the end and return prompts and new tokens [B, S + new], right-padded.

        Another thread must call `Engine.step` meanwhile.

        Raises:
            UsageError: the request was not done within `timeout` seconds.
            Exception: the error that ended the request.
        """
        if not self._done.wait(timeout):
            raise UsageError("The request is not done yet: call engine.step() until handle.done, or wait longer.")
        if self.error is not None:
            raise self.error
        return self.request.state.input_ids

    def finish(self, error: BaseException | None, reasons: list[str | None], streamer: Any) -> None:
        """Set the error and the finish reasons, end the streamer, and wake waiting threads.

        Called once. An error of the streamer is this request's, if it has no other.
        """
        self.error, self.finish_reasons = error, reasons
        try:
            if streamer is not None:
                with modes.callers():
                    streamer.end()
        except Exception as failed:
            self.error = error or failed
        finally:
            self._done.set()
            self._report_end()

    def _report_end(self) -> None:
        on_end, self._on_end = self._on_end, None  # what it belongs to may be freed with the last handle
        if on_end is not None:
            try:
                on_end(self)
            except Exception as error:  # the engine has other requests to go on with
                warn_and_go_on(f"A request's on_end failed: {error!r}", stacklevel=2)
