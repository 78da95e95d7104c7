"""Choosing tokens and draft tokens, and stopping, as transformers' `generate` does.

One `GenerationState` holds the tokens of one request. Nothing here knows the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria

from specache.cache.sequence import Sequence
from specache.engine.draft_tokens import DraftProcessors


class ClosingStreamer:
    """A streamer that is ended exactly once, however the call ends: its reader never hangs."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        """Pass tokens to the streamer."""
        self._streamer.put(value)

    def end(self) -> None:
        """End the streamer unless it was ended before."""
        streamer, self._streamer = self._streamer, None
        if streamer is not None:
            streamer.end()

    @classmethod
    @contextmanager
    def of(cls, streamer: Any) -> Iterator[ClosingStreamer | None]:
        """Yield the streamer wrapped, or `None` where there is none, and end it after the block."""
        closing = None if streamer is None else cls(streamer)
        try:
            yield closing
        finally:
            if closing is not None:
                closing.end()


@dataclass
class SamplingParams:
    """How a request chooses tokens, and what it records.

    Attributes:
        logits_processor: applied to the logits [B, V] of every step.
        stopping_criteria: a sequence ends when any of them is true.
        do_sample: sample from the scores; `False` takes the argmax.
        pad_token: the token that finished sequences get; `None` if no end token is set.
        record_scores, record_logits: whether `GenerationState` keeps them for every step.
        drafts: the processors that are applied to draft tokens.
        generator: random number generator; `None` takes PyTorch's global one.
    """

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    pad_token: Tensor | None
    record_scores: bool
    record_logits: bool
    drafts: DraftProcessors
    generator: torch.Generator | None = None

    @classmethod
    def of(
        cls, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList, generation_config: Any
    ) -> SamplingParams:
        """Return the parameters from what `generate` prepares for its decoding loop."""
        returns_dict = generation_config.return_dict_in_generate
        has_end_token = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        return cls(
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            do_sample=generation_config.do_sample,
            pad_token=generation_config._pad_token_tensor if has_end_token else None,
            record_scores=bool(returns_dict and generation_config.output_scores),
            record_logits=bool(returns_dict and generation_config.output_logits),
            drafts=DraftProcessors(logits_processor),
        )

    @classmethod
    def greedy(cls) -> SamplingParams:
        """Return parameters of greedy decoding that never stops."""
        return cls(LogitsProcessorList(), StoppingCriteriaList(), False, None, False, False, DraftProcessors(LogitsProcessorList()))


@dataclass
class GenerationState:
    """The tokens of one request of `B` sequences so far, and its recorded scores and logits.

    Finished sequences get padding. If no end token is set, they are decoded until all have
    finished, as in stock generate.
    """

    input_ids: Tensor  # [B, S + new]
    prompt_length: int  # S
    unfinished: Tensor  # bool [B]
    new: Tensor  # int64 [B], new tokens that are not padding
    pads_finished: bool
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, input_ids: Tensor, params: SamplingParams) -> GenerationState:
        """Begin with the prompts [B, S] and no new tokens."""
        batch, length = input_ids.shape
        unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        new = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
        return cls(input_ids, length, unfinished, new, params.pad_token is not None)

    @property
    def active(self) -> list[int]:
        """Return the indices of the sequences that the next step decodes."""
        runs = self.unfinished if self.pads_finished else self.unfinished.any().expand_as(self.unfinished)
        return runs.nonzero()[:, 0].tolist()

    @property
    def last_tokens(self) -> list[int]:
        """Return the newest token of each sequence [B]."""
        return self.input_ids[:, -1].tolist()

    def new_token_ids(self) -> list[list[int]] | None:
        """Return each sequence's new tokens, without padding; `None` before the first token."""
        rows = self.input_ids[:, self.prompt_length :].tolist()
        return [row[:count] for row, count in zip(rows, self.new.tolist(), strict=True)] if rows[0] else None


def sample_next(
    state: GenerationState, logits: Tensor, params: SamplingParams, sequences: Sequences[Sequence], streamer: Any
) -> None:
    """Choose every sequence's next token from logits [B, V] as stock generate does, and stop."""
    logits = logits.to(copy=True, dtype=torch.float32, device=state.input_ids.device)
    scores = params.logits_processor(state.input_ids, logits)
    if params.record_scores:
        state.scores.append(scores)
    if params.record_logits:
        state.logits.append(logits)
    if params.do_sample:
        probabilities = torch.softmax(scores, dim=-1)
        tokens = torch.multinomial(probabilities, num_samples=1, generator=params.generator).squeeze(1)
    else:
        tokens = scores.argmax(dim=-1)
    if params.pad_token is not None:
        tokens = torch.where(state.unfinished, tokens, params.pad_token)
    state.input_ids = torch.cat([state.input_ids, tokens[:, None]], dim=-1)
    state.new += state.unfinished if state.pads_finished else 1
    if streamer is not None:
        streamer.put(tokens.cpu())
    _finish(state, params, sequences)


def _finish(state: GenerationState, params: SamplingParams, sequences: Sequences[Sequence]) -> None:
    """Apply the stopping criteria and set `finish_reason` of the sequences that ended."""
    recorded = tuple(state.scores) if params.record_scores else None
    by_length = torch.zeros_like(state.unfinished)
    by_stop = torch.zeros_like(state.unfinished)
    for criterion in params.stopping_criteria:
        target = by_length if isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria) else by_stop
        target |= torch.as_tensor(criterion(state.input_ids, recorded), device=target.device).bool()
    for index in (state.unfinished & (by_length | by_stop)).nonzero()[:, 0].tolist():
        sequences[index].finish_reason = "stop" if by_stop[index] else "length"
    state.unfinished &= ~(by_length | by_stop)


def draft_tokens(params: SamplingParams, context: Tensor, logits: Tensor, active: list[int]) -> list[int]:
    """Return draft tokens [B]: the argmax of the logits after `params.drafts`.

    Args:
        context: [B, n], the tokens before the draft: the text, and the previous draft token if any.
        logits: [A, V] of the draft rows of the `active` sequences.
    """
    full = logits.new_zeros(context.shape[0], logits.shape[-1])
    full[active] = logits
    return params.drafts(context, full.to(context.device)).argmax(dim=-1).tolist()


def with_drafts(state: GenerationState, drafts: list[int]) -> Tensor:
    """Return [B, n + 1]: all tokens so far, and the draft token of every sequence."""
    column = torch.tensor(drafts, dtype=state.input_ids.dtype, device=state.input_ids.device)[:, None]
    return torch.cat([state.input_ids, column], dim=-1)
