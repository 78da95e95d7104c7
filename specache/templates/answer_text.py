"""Turn token ids into text as soon as it is final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from specache.templates.channels import ChannelParser, Part, Piece
from specache.templates.markers import control_tokens

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 64  # tokens that wait for the rest of a character; each new one decodes them all again
_CONTEXT = 8  # tokens of a prompt in whose light the first ones behind it are decoded
_WRITTEN = (Part.TEXT, Part.REASONING)


class TextAssembler:
    """Decodes one sequence's tokens to text, piece by piece.

    A piece is held back while it may change: half of a multi-byte character, or the beginning of a
    stop string. Stop strings, text behind them, and special tokens are omitted; two words separated
    by a special token get a space.

    Args:
        tokenizer: decodes the tokens.
        stops: stop strings.
        strip_start: omit leading whitespace.
        shown: special tokens that are part of the text, id -> text.
        before: the prompt, if the text continues it: alone, a first word may lose its space.

    Attributes:
        stop: the stop string that ended the text; None until then.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        strip_start: bool = False,
        shown: Mapping[int, str] | None = None,
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._strip_start = strip_start
        self._shown = shown or {}
        self._after_special = self._begins = False  # what precedes the next text
        self._ids = _context_of(tokenizer, before)
        self._context = 0  # first token of the text that was returned last
        self._decoded = len(self._ids)  # number of tokens decoded into `_text`, or in front of it
        self._text = ""
        self._given = 0  # number of characters of `_text` returned
        self.stop: str | None = None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(control_tokens(self._tokenizer).special.values())

    @property
    def stopped(self) -> bool:
        """Return True after a stop string."""
        return self.stop is not None

    @property
    def text(self) -> str:
        """Return all text returned so far."""
        return self._text[: self._given]

    def push(self, token_id: int) -> str:
        """Add a token and return the text that became final, often none."""
        if token_id in self._shown:
            return self._push_shown(self._shown[token_id])
        self._ids.append(token_id)
        self._after_special |= token_id in self._special_ids
        self._decode()
        return self._hand_out(len(self._text) - self._undecided())

    def begin_message(self) -> None:
        """Begin a new message: on a new line, if there is text before it."""
        self._end_part()
        self._begins = True

    def finish(self) -> str:
        """End the sequence and return the text held back."""
        self._decode(last=True)
        return self._hand_out(len(self._text))

    def _push_shown(self, text: str) -> str:
        self._end_part()
        self._after_special = False
        self._add(text)
        self._cut_at_stop()
        return self._hand_out(len(self._text) - self._undecided())

    def _end_part(self) -> None:
        """Decode what there is. Text behind it does not depend on it."""
        self._decode(last=True)
        self._context = self._decoded = len(self._ids)

    def _decode(self, last: bool = False) -> None:
        """Decode new tokens together with earlier ones, or tokenizers drop the space in front."""
        before = self._tokenizer.decode(self._ids[self._context : self._decoded], skip_special_tokens=True)
        both = self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        is_long = len(self._ids) - self._decoded > _MOST_HELD
        if len(both) <= len(before):
            if is_long:
                del self._ids[self._decoded :]  # special tokens without end
            return
        if both.endswith(_HALF_A_CHARACTER) and not (last or is_long):
            return
        self._add(both[len(before) :])
        self._context, self._decoded = self._decoded, len(self._ids)
        self._cut_at_stop()

    def _add(self, piece: str) -> None:
        if self._strip_start and not self._text:
            piece = piece.lstrip()
        if not piece:
            return
        if self._text and self._begins:
            piece = "\n" + piece
        elif self._text and self._after_special and self._text[-1].isalnum() and piece[0].isalnum():
            piece = " " + piece
        self._text += piece
        self._after_special = self._begins = False

    def _cut_at_stop(self) -> None:
        found = [(position, stop) for stop in self._stops if (position := self._text.find(stop, self._given)) >= 0]
        if found:
            position, self.stop = min(found)
            self._text = self._text[:position]

    def _undecided(self) -> int:
        """Return the number of trailing characters that may begin a stop string."""
        if self.stopped:
            return 0
        tails = (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(tails, default=0)

    def _hand_out(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


class AnswerText:
    """One answer's tokens, and their text and reasoning.

    Args:
        tokenizer: decodes the tokens.
        stops: stop strings.
        parser: assigns tokens to parts; None: everything is text.
        shown: special tokens that are part of the text, id -> text.
        before: the prompt, if the answer continues a raw text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        parser: ChannelParser | None = None,
        shown: Mapping[int, str] | None = None,
        before: Sequence[int] = (),
    ) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._parser = parser
        self._parts = {
            part: TextAssembler(tokenizer, stops, strip_start=parser is not None, shown=shown, before=before) for part in _WRITTEN
        }

    @property
    def has_channels(self) -> bool:
        """Return True if the model writes reasoning in a part of its own."""
        return self._parser is not None

    @property
    def text(self) -> str:
        """Return the text of the final message so far."""
        return self._parts[Part.TEXT].text

    @property
    def reasoning(self) -> str | None:
        """Return the reasoning; None if the model has no channels."""
        return None if self._parser is None else self._parts[Part.REASONING].text

    @property
    def stop(self) -> str | None:
        """Return the stop string that ended the answer; None if none did."""
        return next((part.stop for part in self._parts.values() if part.stop is not None), None)

    @property
    def calls(self) -> Sequence[str]:
        """Return the tool of every call so far whose arguments are a part of their own."""
        return () if self._parser is None else self._parser.calls

    @property
    def ended(self) -> bool:
        """Return True after a stop string or the end of a final message: the answer is complete."""
        return any(part.stopped for part in self._parts.values()) or (self._parser is not None and self._parser.ended)

    def push(self, token_id: int) -> list[tuple[Part, str]]:
        """Add a token and return the pieces of text that became final; none once it has ended."""
        if self.ended:
            return []
        if self._parser is None:
            return [(Part.TEXT, self._parts[Part.TEXT].push(token_id))]
        return self._assembled(self._parser.push(token_id))

    def finish(self) -> list[tuple[Part, str]]:
        """End the answer and return the pieces held back."""
        held = [] if self._parser is None else self._assembled(self._parser.finish())
        return [*held, *((part, assembler.finish()) for part, assembler in self._parts.items())]

    def _assembled(self, pieces: list[Piece]) -> list[tuple[Part, str]]:
        texts = []
        for piece in pieces:
            if piece.part is Part.CALL and (piece.begins or Part.CALL not in self._parts):
                self._parts[Part.CALL] = TextAssembler(self._tokenizer)
            elif piece.begins:
                self._parts[piece.part].begin_message()
            assembler = self._parts[piece.part]
            texts += [(piece.part, assembler.push(token_id)) for token_id in piece.token_ids]
        return texts


def _context_of(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """Return the end of a prompt that the text behind it is decoded with.

    Return none of it if it ends with half a character: that could not be told from the next text.
    """
    newest = list(prompt[-_CONTEXT:])
    is_whole = not tokenizer.decode(newest, skip_special_tokens=True).endswith(_HALF_A_CHARACTER)
    return newest if is_whole else []
