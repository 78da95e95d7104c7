"""From the tokens of an answer to its pieces: text, reasoning, calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolArguments, ToolCallBegin
from specache.server.text_reasoning import TextReasoning, text_reasoning
from specache.server.tool_formats.base import CallParser, ToolFormat
from specache.server.tool_use import ToolUse
from specache.templates.answer_text import AnswerText
from specache.templates.channels import Part, channel_parser
from specache.templates.markers import control_tokens


@dataclass(frozen=True)
class ChatContext:
    """What the answer to a conversation is parsed by.

    Attributes:
        prompt_ids: the prompt, which may have opened reasoning.
        tools: of the request; `None` if it has none.
    """

    prompt_ids: Sequence[int]
    tool_format: ToolFormat
    tools: ToolUse | None

    @property
    def callable(self) -> ToolUse | None:
        """Return the tools, if the answer may call one."""
        return self.tools if self.tools is not None and self.tools.callable else None


class AnswerParser:
    """One answer. Stop strings end its text or its reasoning; in a call they are arguments.

    Args:
        tokenizer: decodes the tokens.
        stops: stop strings.
        chat: of a conversation; `None` for the continuation of a raw text.
        before: that text's tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], chat: ChatContext | None, before: Sequence[int] = ()) -> None:
        self.text = self.reasoning = ""
        tools = None if chat is None else chat.callable
        self._tools = tools
        self._calls: CallParser | None = None
        self._thinking: TextReasoning | None = None
        self._new_call_id: Callable[[], str] = str
        self._begun = 0  # calls whose arguments are a part of their own
        self._is_empty = False  # the newest of them has no arguments yet
        self._stops: TextStops | None = None
        channels, shown = None, {}
        if chat is not None:
            channels = channel_parser(tokenizer, chat.prompt_ids, () if tools is None else tools.names)
            self._thinking = text_reasoning(tokenizer, chat.prompt_ids)
        if chat is not None and tools is not None:
            self._calls = chat.tool_format.parser(tools)
            self._new_call_id = chat.tool_format.new_call_id
            self._stops = TextStops(stops)
        if chat is not None and chat.tools is not None:  # also of a call that is not allowed, which is text
            special = control_tokens(tokenizer).special
            shown = {index: text for text, index in special.items() if text in chat.tool_format.markers}
        self._answer = AnswerText(tokenizer, () if tools else stops, channels, shown, before if chat is None else ())
        self._may_end = bool(stops) or self._answer.has_channels or (tools is not None and not tools.parallel)

    @property
    def may_end(self) -> bool:
        """Return whether the text can end the answer, rather than a token."""
        return self._may_end

    @property
    def ended(self) -> bool:
        """Return whether the answer is complete, whatever the model writes behind it."""
        stopped = self._stops is not None and self._stops.stopped
        return self._answer.ended or stopped or (self._calls is not None and self._calls.ended)

    @property
    def stop(self) -> str | None:
        """Return the stop string that ended the answer; `None` if none did."""
        return self._answer.stop if self._stops is None else self._stops.stop

    def push(self, token_id: int) -> list[AnswerPiece]:
        """Add a token and return the pieces that became final; none once it has ended."""
        return [] if self.ended else self._noted(self._pieces(self._answer.push(token_id)))

    def finish(self) -> list[AnswerPiece]:
        """End the answer and return the pieces held back."""
        if self._stops is not None and (self._stops.stopped or (self._calls is not None and self._calls.ended)):
            return self._noted(self._stops.finish())
        pieces = [*self._pieces(self._answer.finish()), *self._end_call()]
        if self._thinking is not None:
            pieces += self._split(self._thinking.finish())
        if self._calls is not None:
            pieces += self._stopped(self._calls.finish())
        if self._stops is not None:
            pieces += self._stops.finish()
        return self._noted(pieces)

    def _pieces(self, texts: Sequence[tuple[Part, str]]) -> list[AnswerPiece]:
        pieces = self._new_calls()
        for part, text in texts:
            if part is not Part.CALL and text:
                pieces += self._end_call()  # before another part begins
            if part is Part.CALL:
                pieces += [ToolArguments(self._begun - 1, text)] if text else []
                self._is_empty = self._is_empty and not text
            elif part is Part.TEXT and self._thinking is not None:
                pieces += self._split(self._thinking.push(text))
            else:
                pieces += self._split([(part, text)])
        return pieces

    def _new_calls(self) -> list[AnswerPiece]:
        """Return the beginnings of calls that are messages of their own."""
        pieces: list[AnswerPiece] = []
        for name in self._answer.calls[self._begun :]:
            pieces += [*self._end_call(), ToolCallBegin(self._begun, self._new_call_id(), name)]
            self._begun += 1
            self._is_empty = True
        return pieces

    def _end_call(self) -> list[AnswerPiece]:
        """Return an empty object for a call that the model wrote without arguments."""
        was_empty, self._is_empty = self._is_empty, False
        return [ToolArguments(self._begun - 1, "{}")] if was_empty else []

    def _split(self, texts: Sequence[tuple[Part, str]]) -> list[AnswerPiece]:
        """Return reasoning as it is, and find the calls in the text."""
        pieces: list[AnswerPiece] = []
        for part, text in texts:
            if part is Part.REASONING:
                pieces += self._stopped([ReasoningPiece(text)] if text else [])
            elif self._calls is not None:
                pieces += self._stopped(self._calls.push(text))
            else:
                pieces += self._stopped([TextPiece(text)] if text else [])
        return pieces

    def _stopped(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        return pieces if self._stops is None else self._stops.push(pieces)

    def _noted(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        self.text += "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
        self.reasoning += "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
        return pieces


class TextStops:
    """Ends text and reasoning in front of a stop string, but not calls.

    Attributes:
        stop: the one that was found, or `None`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stop: str | None = None
        self._texts = tuple(stops)
        self._held = ""
        self._kind: type[TextPiece | ReasoningPiece] = TextPiece

    @property
    def stopped(self) -> bool:
        """Return whether one was found."""
        return self.stop is not None

    def push(self, pieces: Sequence[AnswerPiece]) -> list[AnswerPiece]:
        """Add pieces and return what became final."""
        final: list[AnswerPiece] = []
        for piece in pieces:
            if self.stopped:
                break
            if not isinstance(piece, TextPiece | ReasoningPiece):
                final += [*self.finish(), piece]
                continue
            if type(piece) is not self._kind:
                final += self.finish()
                self._kind = type(piece)
            final += self._push(piece.text)
        return final

    def finish(self) -> list[AnswerPiece]:
        """Return what is held back."""
        held, self._held = self._held, ""
        return [self._kind(held)] if held else []

    def _push(self, text: str) -> list[AnswerPiece]:
        text = self._held + text
        found = [(place, stop) for stop in self._texts if (place := text.find(stop)) >= 0]
        if found:
            place, self.stop = min(found)
            text, self._held = text[:place], ""
        else:
            tails = (n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
            decided = len(text) - max(tails, default=0)
            text, self._held = text[:decided], text[decided:]
        return [self._kind(text)] if text else []
