"""The answers of one call to generate while they grow: choosing tokens, guesses and stopping as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria

from specache.cache.cache import SpeCache
from specache.engine.draft_tokens import DraftProcessors


class EndedOnce:
    """A streamer that is ended once, however a call ends: who waits for its text must not wait for ever."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        """Hand tokens on."""
        self._streamer.put(value)

    def end(self) -> None:
        """End it, if that was not done before."""
        streamer, self._streamer = self._streamer, None
        if streamer is not None:
            streamer.end()

    @classmethod
    @contextmanager
    def of(cls, streamer: Any) -> Iterator[EndedOnce | None]:
        """A block in which the streamer is used, if there is one."""
        once = None if streamer is None else cls(streamer)
        try:
            yield once
        finally:
            if once is not None:
                once.end()


@dataclass
class SamplingParams:
    """How a call to generate chooses tokens, and what it records of that."""

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    pad_token: Tensor | None  # what finished sequences get; None where no end token is set
    record_scores: bool
    record_logits: bool
    drafts: DraftProcessors


@dataclass
class GenerationState:
    """Tokens so far, and what is recorded on the way. `B` sequences.

    Finished ones get padding; where no end token is set they run on with the others, as in stock generate.
    """

    input_ids: Tensor  # [B, S + new]
    prompt_length: int  # S
    unfinished: Tensor  # bool [B]
    new: Tensor  # int64 [B], new tokens that are not padding
    pads_finished: bool
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def active(self) -> list[int]:
        """Sequences that the next step decodes."""
        runs = self.unfinished if self.pads_finished else self.unfinished.any().expand_as(self.unfinished)
        return runs.nonzero()[:, 0].tolist()

    def new_token_ids(self) -> list[list[int]] | None:
        """Each sequence's new tokens, without padding; `None` before the first ones."""
        rows = self.input_ids[:, self.prompt_length :].tolist()
        return [row[:count] for row, count in zip(rows, self.new.tolist(), strict=True)] if rows[0] else None


def sample_next(batch: GenerationState, logits: Tensor, request: SamplingParams, cache: SpeCache, streamer: Any) -> None:
    """Choose every sequence's next token as stock generate does, and see who is finished. logits [B, V], float32."""
    logits = logits.to(copy=True, dtype=torch.float32, device=batch.input_ids.device)
    scores = request.logits_processor(batch.input_ids, logits)
    if request.record_scores:
        batch.scores.append(scores)
    if request.record_logits:
        batch.logits.append(logits)
    if request.do_sample:
        tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    else:
        tokens = scores.argmax(dim=-1)
    if request.pad_token is not None:
        tokens = torch.where(batch.unfinished, tokens, request.pad_token)
    batch.input_ids = torch.cat([batch.input_ids, tokens[:, None]], dim=-1)
    batch.new += batch.unfinished if batch.pads_finished else 1
    if streamer is not None:
        streamer.put(tokens.cpu())
    _finish(batch, request, cache)


def _finish(batch: GenerationState, request: SamplingParams, cache: SpeCache) -> None:
    """Apply the stopping criteria and note why a sequence ended."""
    recorded = tuple(batch.scores) if request.record_scores else None
    by_length = torch.zeros_like(batch.unfinished)
    by_stop = torch.zeros_like(batch.unfinished)
    for criterion in request.stopping_criteria:
        target = by_length if isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria) else by_stop
        target |= torch.as_tensor(criterion(batch.input_ids, recorded), device=target.device).bool()
    for index in (batch.unfinished & (by_length | by_stop)).nonzero()[:, 0].tolist():
        cache.sequences[index].finish_reason = "stop" if by_stop[index] else "length"
    batch.unfinished &= ~(by_length | by_stop)


def draft(request: SamplingParams, context: Tensor, like: Tensor, logits: Tensor, active: list[int]) -> list[int]:
    """Speculative tokens [B] from the guess rows' logits [A, V], after the processors that may be applied to a guess."""
    full = torch.zeros_like(like)
    full[active] = logits
    return request.drafts(context, full.to(context.device)).argmax(dim=-1).tolist()


def with_drafts(batch: GenerationState, drafts: list[int]) -> Tensor:
    """Tokens that the guess row continues: everything so far and the guess."""
    column = torch.tensor(drafts, dtype=batch.input_ids.dtype, device=batch.input_ids.device)[:, None]
    return torch.cat([batch.input_ids, column], dim=-1)


def count_drafts(cache: SpeCache, batch: GenerationState, drafts: list[int], active: list[int]) -> None:
    """How many of the guesses for the `active` sequences were the tokens that came."""
    tokens = batch.input_ids[:, -1].tolist()
    cache.counters.drafts += len(active)
    cache.counters.drafts_right += sum(tokens[i] == drafts[i] for i in active)


def no_answers_yet(input_ids: Tensor, request: SamplingParams) -> GenerationState:
    """input_ids [B, S] and no new tokens."""
    batch, length = input_ids.shape
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    new = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
    return GenerationState(input_ids, length, unfinished, new, request.pad_token is not None)


def sampling_params(
    logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList, generation_config: Any
) -> SamplingParams:
    """From what transformers' `generate` hands to its own decoding loop."""
    returns_dict = generation_config.return_dict_in_generate
    has_end_token = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    return SamplingParams(
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        do_sample=generation_config.do_sample,
        pad_token=generation_config._pad_token_tensor if has_end_token else None,
        record_scores=bool(returns_dict and generation_config.output_scores),
        record_logits=bool(returns_dict and generation_config.output_logits),
        drafts=DraftProcessors(logits_processor),
    )
