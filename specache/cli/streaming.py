"""Token ids in, text out as soon as it is certain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextAssembler:
    """Turns one sequence's token ids into text, a piece at a time.

    A piece is held back while it may still change: half of a multi-byte character, or the beginning of a stop text.
    The stop text itself and what follows it are left out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._context = 0  # first token of the text that was handed over last
        self._decoded = 0  # tokens whose text is in `_text`
        self._text = ""
        self._given = 0  # characters of `_text` that were returned
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return self._text[: self._given]

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that became certain with it, often none."""
        self._ids.append(token_id)
        self._decode()
        return self._hand_out(len(self._text) - self._undecided())

    def finish(self) -> str:
        """No more tokens come: returns what was held back."""
        self._decode(last=True)
        return self._hand_out(len(self._text))

    def _decode(self, last: bool = False) -> None:
        """Decode new tokens together with those before them: alone, tokenizers drop the space in front."""
        before = self._tokenizer.decode(self._ids[self._context : self._decoded], skip_special_tokens=True)
        both = self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        if len(both) <= len(before) or (both.endswith(_HALF_A_CHARACTER) and not last):
            return
        self._text += both[len(before) :]
        self._context, self._decoded = self._decoded, len(self._ids)
        self._cut_at_stop()

    def _cut_at_stop(self) -> None:
        found = [position for stop in self._stops if (position := self._text.find(stop, self._given)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        if self.stopped:
            return 0
        tails = (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(tails, default=0)

    def _hand_out(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


class AnswerRecorder:
    """A streamer that keeps each sequence's new tokens and text, without the padding after its end.

    Unlike transformers' `TextStreamer` it takes batches. What was generated before an interrupt is all here.

    Args:
        tokenizer: decodes the tokens.
        end_ids: token ids that end a sequence.
        stops: texts that end a sequence; they are left out of `texts`.
        on_text: called with (sequence index, new text).
        on_first: called once, before the first new token.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Collection[int],
        stops: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        self._new_assembler = lambda: TextAssembler(tokenizer, stops)
        self._end_ids = frozenset(end_ids)
        self._on_text = on_text or (lambda row, text: None)
        self._on_first = on_first
        self._saw_prompt = False
        self._assemblers: list[TextAssembler] = []
        self.token_ids: list[list[int]] = []

    @property
    def texts(self) -> list[str]:
        """Text so far, per sequence."""
        return [assembler.text for assembler in self._assemblers]

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then `[B]` token ids per step."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        tokens = value.reshape(-1).tolist()
        if not self._assemblers:
            self._begin(len(tokens))
        for row, token in enumerate(tokens):
            self._put_token(row, token)

    def end(self) -> None:
        """Hand over what was held back."""
        for row, assembler in enumerate(self._assemblers):
            self._say(row, assembler.finish())

    def _begin(self, rows: int) -> None:
        if self._on_first is not None:
            self._on_first()
        self._assemblers = [self._new_assembler() for _ in range(rows)]
        self.token_ids = [[] for _ in range(rows)]

    def _put_token(self, row: int, token: int) -> None:
        ids, assembler = self.token_ids[row], self._assemblers[row]
        if assembler.stopped or (ids and ids[-1] in self._end_ids):
            return  # padding
        ids.append(token)
        self._say(row, assembler.push(token))

    def _say(self, row: int, text: str) -> None:
        if text:
            self._on_text(row, text)
