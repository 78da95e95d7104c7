"""One call of `specache.generate` for a command: progress, streaming, interrupts, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specache.cli.console import PrefillProgress, err
from specache.cli.models import LoadedModel
from specache.cli.options import DEFAULT_MAX_NEW_TOKENS
from specache.cli.prompts import pad_left
from specache.cli.streaming import AnswerRecorder
from specache.errors import SpeCacheError

if TYPE_CHECKING:
    from specache import SpeCache

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Result:
    """One prompt's answer, whole or up to an interrupt or an error."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str | None  # "stop", "length", "interrupted" or "error"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Outcome:
    """What one call produced."""

    results: list[Result]
    interrupted: bool
    reused_tokens: int  # prompt tokens that the cache had already (of the first prompt)
    error: SpeCacheError | None = None  # what ended the answers in the middle

    def with_error(self, error: SpeCacheError) -> Outcome:
        """The same, after something more went wrong."""
        if self.error is None:
            return replace(self, error=error)
        both = SpeCacheError(f"{self.error} {error}")
        both.__cause__ = self.error
        return replace(self, error=both)

    def raise_error(self) -> None:
        """For callers with no use for half an answer."""
        if self.error is not None:
            raise self.error


def answer(
    loaded: LoadedModel,
    prompts: list[list[int]],
    cache: SpeCache,
    options: dict[str, Any],
    *,
    stops: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    on_prefilled: Callable[[], None] = lambda: None,
    description: str = "Reading the prompt",
) -> Outcome:
    """Generate one answer per prompt into `cache`. Ctrl-C ends the answers where they are and is not raised.

    Neither is an error in the middle of them: `Outcome.error` is it, and the answers are there as far as they came.

    Args:
        loaded: model and tokenizer.
        prompts: token ids per sequence; whole conversations if `cache` already holds their beginning.
        cache: empty, or holding what is to be continued.
        options: from `options.GenerationOptions.arguments`.
        stops: texts to stop before.
        on_text: called with (sequence index, new text) as text becomes certain.
        on_prefilled: called when the prompts are in the cache, before the first new token.
        description: what the progress bar says while the prompt is read.

    Raises:
        SpeCacheError: before there was a new token.
    """
    import specache
    from specache.continuing import begins_alike

    if not begins_alike(cache, prompts):
        _replace(cache)
    pad_id, end_ids = _special_ids(loaded)
    input_ids, attention_mask = pad_left(prompts, pad_id)
    device = loaded.model.device
    progress = PrefillProgress(description)

    def begin() -> None:
        progress.close()
        on_prefilled()

    recorder = AnswerRecorder(loaded.tokenizer, end_ids, stops, on_text, on_first=begin)
    arguments = {**options, "max_new_tokens": room(options["max_new_tokens"], loaded, input_ids.shape[1])}
    if stops:
        arguments |= {"stop_strings": list(stops), "tokenizer": loaded.tokenizer}
    interrupted, failure = False, None
    try:
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
    return Outcome(_results(prompts, recorder, cache, interrupted), interrupted, progress.reused or 0, failure)


def _replace(cache: SpeCache) -> None:
    """Make way for a whole text that is another than the one that the cache holds."""
    err.print(f"The {cache.get_seq_length():,} tokens that were stored are another text, which this one replaces.", style="dim")
    cache.reset()


def room(max_new_tokens: int | None, loaded: LoadedModel, prompt_tokens: int) -> int:
    """`max_new_tokens`, or where it was not given the default, shortened to the positions that the model has left."""
    if max_new_tokens is not None:
        return max_new_tokens
    left = (loaded.max_positions or 0) - prompt_tokens
    return min(DEFAULT_MAX_NEW_TOKENS, left) if left > 0 else DEFAULT_MAX_NEW_TOKENS


def _results(prompts: list[list[int]], recorder: AnswerRecorder, cache: SpeCache, interrupted: bool) -> list[Result]:
    rows = len(prompts)
    unfinished = INTERRUPTED if interrupted else None
    token_ids = recorder.token_ids or [[] for _ in range(rows)]
    texts = recorder.texts or [""] * rows
    reasons = list(cache.finish_reasons)
    if len(reasons) != rows:  # interrupted before the first step
        reasons = [None] * rows
    return [
        Result(text, ids, len(prompt), reason or unfinished)
        for text, ids, prompt, reason in zip(texts, token_ids, prompts, reasons, strict=True)
    ]


def _special_ids(loaded: LoadedModel) -> tuple[int, list[int]]:
    """The padding token, and the tokens that end a sequence."""
    generation_config = loaded.model.generation_config
    end = generation_config.eos_token_id
    end_ids = [] if end is None else [end] if isinstance(end, int) else list(end)
    candidates = (generation_config.pad_token_id, loaded.tokenizer.pad_token_id, *end_ids, 0)
    return next(candidate for candidate in candidates if candidate is not None), end_ids
