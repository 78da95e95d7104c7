"""One call of `specache.generate` for a command: progress, streaming, interrupts and results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specache.cli.console import PrefillProgress
from specache.cli.models import LoadedModel
from specache.cli.prompts import pad_left
from specache.cli.streaming import AnswerRecorder
from specache.engine.answer_length import answer_limit
from specache.errors import SpeCacheError
from specache.templates.channels import channel_parser
from specache.templates.end_tokens import end_texts, end_tokens
from specache.templates.template import ChatTemplate

if TYPE_CHECKING:
    from specache import SpeCache

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Result:
    """One prompt's answer, complete or up to an interrupt or an error."""

    text: str  # the final message, if the model uses channels
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str | None  # "stop", "length", "interrupted" or "error"
    reasoning: str | None = None  # text in a reasoning channel before the final message

    @property
    def is_reasoning_alone(self) -> bool:
        """Return True if the answer ended before the final message began."""
        return bool(self.reasoning) and not self.text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        Keys are stable; `reasoning` is present if the model wrote any.
        """
        return {
            **({"reasoning": self.reasoning} if self.reasoning else {}),
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Outcome:
    """The results of one call."""

    results: list[Result]
    interrupted: bool
    reused_tokens: int  # prompt tokens already in the cache (of the first prompt)
    error: SpeCacheError | None = None  # the error that ended the answers early
    note: str | None = None  # a note that the model's positions shortened the answers

    def with_error(self, error: SpeCacheError) -> Outcome:
        """Return the outcome with a further error."""
        if self.error is None:
            return replace(self, error=error)
        both = SpeCacheError(f"{self.error} {error}")
        both.__cause__ = self.error
        return replace(self, error=both)

    def raise_error(self) -> None:
        """Raise the error, for callers that cannot use a partial answer."""
        if self.error is not None:
            raise self.error


def answer(
    loaded: LoadedModel,
    prompts: list[list[int]],
    cache: SpeCache,
    options: dict[str, Any],
    *,
    stops: Sequence[str] = (),
    template: ChatTemplate | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_reasoning: Callable[[int, str], None] | None = None,
    on_prefilled: Callable[[], None] = lambda: None,
    description: str = "Reading the prompt",
) -> Outcome:
    """Generate one answer per prompt into `cache`. Ctrl-C ends the answers early and is not raised.

    Neither is an error after the first token: `Outcome.error` holds it, with the answers so far.

    Args:
        loaded: model and tokenizer.
        prompts: token ids per sequence; whole conversations if `cache` already holds their
            beginning.
        cache: empty, or holding the text to continue. Another text is replaced by the prompts.
        options: arguments from `options.GenerationOptions.arguments`.
        stops: stop strings, beside those of the model's files.
        template: the chat template that rendered the prompts, if any.
        on_text: called with (sequence index, new text) as text becomes final.
        on_reasoning: the same for text before the final message.
        on_prefilled: called when the prompts are in the cache, before the first new token.
        description: label of the progress bar while the prompt is read.

    Raises:
        SpeCacheError: before there was a new token; `UsageError` if the model has no position left
            for one.
    """
    import torch

    import specache
    from specache.engine.continuing import begins_alike

    if not begins_alike(cache, prompts):  # the prompts are whole texts, which the library cannot know
        cache.reset()
    pad_id, end_ids = _special_ids(loaded, template)
    stops = [*stops, *end_texts(loaded.model.generation_config)]
    input_ids, attention_mask = pad_left(prompts, pad_id)
    device = loaded.model.device
    progress = PrefillProgress(description)

    def begin() -> None:
        progress.close()
        on_prefilled()

    parsers = None if template is None else [channel_parser(loaded.tokenizer, prompt) for prompt in prompts]
    raw = prompts if template is None else None
    recorder = AnswerRecorder(
        loaded.tokenizer, end_ids, stops, on_text, on_first=begin, parsers=parsers, on_reasoning=on_reasoning, before=raw
    )
    longest = answer_limit(options["max_new_tokens"], loaded.max_positions, input_ids.shape[1])
    arguments = {**options, "max_new_tokens": longest.new_tokens}
    if end_ids:
        arguments["eos_token_id"] = end_ids
    if parsers is not None and parsers[0] is not None:
        arguments["stopping_criteria"] = [lambda ids, scores: torch.tensor(recorder.ended)]
    if stops:
        arguments |= {"stop_strings": stops, "tokenizer": loaded.tokenizer}
    interrupted, failure = False, None
    try:
        with _rereading_warning_ignored():
            specache.generate(
                loaded.model,
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                past_key_values=cache,
                streamer=recorder,
                progress=progress,
                pad_token_id=pad_id,
                **arguments,
            )
    except KeyboardInterrupt:
        interrupted = True
    except SpeCacheError as error:
        if not any(recorder.token_ids):
            raise
        failure = error
    finally:
        progress.close()
    results = _results(prompts, recorder, cache, interrupted)
    note = longest.note(any(result.finish_reason == "length" for result in results))
    return Outcome(results, interrupted, progress.reused or 0, failure, note)


@contextmanager
def _rereading_warning_ignored() -> Iterator[None]:
    """Ignore the library's warning about rereading, since commands print a note of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The text differs from what the SpeCache holds")
        yield


def _results(prompts: list[list[int]], recorder: AnswerRecorder, cache: SpeCache, interrupted: bool) -> list[Result]:
    rows = len(prompts)
    unfinished = INTERRUPTED if interrupted else None
    token_ids = recorder.token_ids or [[] for _ in range(rows)]
    texts = recorder.texts or [""] * rows
    reasonings = recorder.reasonings or [None] * rows
    reasons = list(cache.finish_reasons)
    if len(reasons) != rows:  # interrupted before the first step
        reasons = [None] * rows
    return [
        Result(text, ids, len(prompt), reason or unfinished, reasoning)
        for text, ids, prompt, reason, reasoning in zip(texts, token_ids, prompts, reasons, reasonings, strict=True)
    ]


def _special_ids(loaded: LoadedModel, template: ChatTemplate | None) -> tuple[int, list[int]]:
    """Return (padding token, tokens that end a sequence)."""
    end_ids = end_tokens(loaded.model.generation_config, loaded.tokenizer, template)
    candidates = (loaded.model.generation_config.pad_token_id, loaded.tokenizer.pad_token_id, *end_ids, 0)
    return next(candidate for candidate in candidates if candidate is not None), end_ids
