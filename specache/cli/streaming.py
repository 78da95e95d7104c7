"""A streamer that keeps the answers of a command as tokens and as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from specache.templates.answer_text import AnswerText
from specache.templates.channels import ChannelParser, Part

if TYPE_CHECKING:
    import torch


class AnswerRecorder:
    """A streamer that keeps each sequence's new tokens and text, without padding.

    Unlike transformers' `TextStreamer` it takes batches. It keeps everything generated before an
    interrupt.

    Args:
        tokenizer: decodes the tokens.
        end_ids: token ids that end a sequence; they are in `token_ids`, but not in the text.
        stops: stop strings, omitted from `texts`.
        on_text: called with (sequence index, new text).
        on_first: called once, before the first new token.
        parsers: per sequence, the parser of its channels; None: everything is text.
        on_reasoning: called with (sequence index, new reasoning).
        before: per sequence, the prompt that its answer continues as a raw text.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Collection[int],
        stops: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        on_first: Callable[[], None] | None = None,
        *,
        parsers: Sequence[ChannelParser | None] | None = None,
        on_reasoning: Callable[[int, str], None] | None = None,
        before: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._new_row = lambda index: AnswerText(
            tokenizer, stops, parsers[index] if parsers else None, before=before[index] if before else ()
        )
        self._end_ids = frozenset(end_ids)
        self._callbacks = {Part.TEXT: on_text, Part.REASONING: on_reasoning}
        self._on_first = on_first
        self._saw_prompt = False
        self._rows: list[AnswerText] = []

    @property
    def token_ids(self) -> list[list[int]]:
        """Return the tokens so far, per sequence."""
        return [row.token_ids for row in self._rows]

    @property
    def texts(self) -> list[str]:
        """Return the text so far, per sequence."""
        return [row.text for row in self._rows]

    @property
    def reasonings(self) -> list[str | None]:
        """Return the reasoning so far, per sequence; None for models without channels."""
        return [row.reasoning for row in self._rows]

    @property
    def ended(self) -> list[bool]:
        """Return per sequence True if its answer has ended, whatever its last token is."""
        return [row.ended for row in self._rows]

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then `[B]` token ids per step."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        tokens = value.reshape(-1).tolist()
        if not self._rows:
            self._begin(len(tokens))
        for index, token in enumerate(tokens):
            self._put_token(index, token)

    def end(self) -> None:
        """Emit the text held back."""
        for index, row in enumerate(self._rows):
            self._say(index, row.finish())

    def _begin(self, rows: int) -> None:
        if self._on_first is not None:
            self._on_first()
        self._rows = [self._new_row(index) for index in range(rows)]

    def _put_token(self, index: int, token: int) -> None:
        row = self._rows[index]
        if row.ended or (row.token_ids and row.token_ids[-1] in self._end_ids):
            return  # padding
        row.token_ids.append(token)
        if token not in self._end_ids:
            self._say(index, row.push(token))

    def _say(self, index: int, texts: list[tuple[Part, str]]) -> None:
        for part, text in texts:
            callback = self._callbacks[part]
            if text and callback is not None:
                callback(index, text)
