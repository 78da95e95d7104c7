"""Answers in several parts: reasoning, and the final message.

Two forms of them are known. GPT-OSS (the "harmony" format) writes

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

Others put their reasoning between two special tokens (`[THINK]` and `[/THINK]`). Pairs that are
ordinary text to the tokenizer (`<think>` of Qwen3 and DeepSeek-R1) stay in the text: the templates
of those models look for them in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

PAIRS = (
    *(("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>", "<channel|>"), ("<|START_THINKING|>", "<|END_THINKING|>")),
    *(("<seed:think>", "</seed:think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<reasoning>", "</reasoning>")),
)

_LONGEST_RECIPIENT = 64  # tokens
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class Part(Enum):
    """The part of an answer that a token belongs to."""

    TEXT = "the final message"
    REASONING = "reasoning, or a message to a tool"
    CALL = "the arguments of a call of a tool"


@dataclass(frozen=True)
class Piece:
    """Tokens of one part; `begins` if they begin a new message of it."""

    part: Part
    token_ids: list[int]
    begins: bool = False


@dataclass(frozen=True)
class ChannelTokens:
    """The markers of the harmony format, as token ids."""

    start: int
    channel: int
    message: int
    end: int
    answer_ends: frozenset[int]  # <|return|> and <|call|>, if they exist

    @classmethod
    def of(cls, tokenizer: Any) -> ChannelTokens | None:
        """Return the markers of a tokenizer; None if it lacks one."""
        ids = {token.content: token_id for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        needed = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
        if any(text not in ids for text in needed):
            return None
        start, channel, message, end = (ids[text] for text in needed)
        return cls(start, channel, message, end, frozenset(ids[text] for text in ("<|return|>", "<|call|>") if text in ids))


def channel_parser(tokenizer: Any, prompt: Sequence[int], tools: Collection[str] = ()) -> ChannelParser | None:
    """Return the parser of the answer to a prompt that a chat template wrote.

    It assigns the tokens of the answer to parts as they are generated. `push` adds a token and
    returns the tokens whose part is now known, without markers; `finish` returns those held back.
    `ended` is True if the final message is complete although no end token of the model says so.

    Return None for a model without channels.

    Args:
        tools: names of tools; a message to one of them is a call. One to another is reasoning.
    """
    tokens = ChannelTokens.of(tokenizer)
    if tokens is not None:
        return HarmonyParser(tokenizer, tokens, prompt, tools)
    special = {token.content: i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    pairs = {special[begin]: special[end] for begin, end in PAIRS if begin in special and end in special}
    return PairParser(pairs, prompt) if pairs else None


class PairParser:
    """Parses reasoning between two special tokens. The prompt may contain the opening one.

    Args:
        pairs: opening token -> closing token.
    """

    ended = False
    calls: Sequence[str] = ()

    def __init__(self, pairs: dict[int, int], prompt: Sequence[int]) -> None:
        self._pairs = pairs
        self._closing: int | None = None
        self._begins = False
        markers = {*pairs, *pairs.values()}
        last = next((token_id for token_id in reversed(prompt) if token_id in markers), None)
        if last in pairs:
            self._closing = pairs[last]

    def push(self, token_id: int) -> list[Piece]:
        if self._closing is None and token_id in self._pairs:
            self._closing, self._begins = self._pairs[token_id], True
        elif token_id == self._closing:
            self._closing, self._begins = None, True
        else:
            part = Part.TEXT if self._closing is None else Part.REASONING
            begins, self._begins = self._begins, False
            return [Piece(part, [token_id], begins)]
        return []

    def finish(self) -> list[Piece]:
        return []


class HarmonyParser:
    """Parses messages with headers: a role, perhaps a channel, and a recipient.

    The message on channel `final`, or without a channel, is the text. A model tuned without
    channels writes its answer where a header would be, so tokens that cannot be a header are text
    too.

    Attributes:
        calls: the tool of every call so far; its arguments follow.
    """

    def __init__(self, tokenizer: Any, tokens: ChannelTokens, prompt: Sequence[int], tools: Collection[str] = ()) -> None:
        self.ended = False
        self.calls: list[str] = []
        self._tools = tools
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._markers = {tokens.start, tokens.channel, tokens.message, tokens.end, *tokens.answer_ends}
        self._part: Part | None = Part.TEXT  # part of the message; `None` between messages, and for another role
        self._role: list[int] = []
        self._given = 0  # tokens of the role given by the prompt
        self._channel: list[int] | None = None
        self._in_header = self._may_be_text = self._begins = False
        self._is_first = True
        starts = [place for place, token_id in enumerate(prompt) if token_id == tokens.start]
        for token_id in prompt[starts[-1] :] if starts else ():
            self.push(token_id)
        self._may_be_text = self._in_header and self._channel is None
        self._given = len(self._role)

    def finish(self) -> list[Piece]:
        """Return the tokens held back: an answer that is only the beginning of a header is text."""
        return self._release() if self._may_be_text else []

    def push(self, token_id: int) -> list[Piece]:
        if token_id in self._markers:
            self._mark(token_id)
            return []
        if not self._in_header:
            return self._piece([token_id])
        (self._role if self._channel is None else self._channel).append(token_id)
        if self._may_be_text:
            role = self._role[self._given :]
            if len(role) > _LONGEST_RECIPIENT or not "to=".startswith(self._decoded(role)[:3]):
                return self._release()
        return []

    def _mark(self, token_id: int) -> None:
        self._may_be_text = False
        if token_id == self._tokens.start:
            self._in_header, self._role, self._channel = True, [], None
        elif token_id == self._tokens.channel:
            if not self._in_header:  # a header without a role
                self._in_header, self._role = True, []
            self._channel = []
        elif token_id == self._tokens.message:
            self._part, self._begins, self._in_header = self._part_of_header(), not self._is_first, False
        else:
            self.ended = self._part is Part.TEXT and not self._is_first
            self._part, self._in_header = None, False

    def _part_of_header(self) -> Part | None:
        role, channel = self._decoded(self._role), self._decoded(self._channel or [])
        if role and not role.startswith(("assistant", "to=")):
            return None
        if "to=" in role or "to=" in channel:
            return self._part_of_recipient()
        return Part.TEXT if self._channel is None or channel.split()[:1] in ([], ["final"]) else Part.REASONING

    def _part_of_recipient(self) -> Part:
        headers = (str(self._tokenizer.decode(ids, skip_special_tokens=False)) for ids in (self._role, self._channel or []))
        recipient = next((found for header in headers if (found := _RECIPIENT.search(header))), None)
        if recipient is None or recipient[1] not in self._tools:
            return Part.REASONING
        self.calls.append(recipient[1])
        return Part.CALL

    def _release(self) -> list[Piece]:
        """Return the tokens of a presumed header as text of the message."""
        held, self._in_header, self._may_be_text, self._part = self._role[self._given :], False, False, Part.TEXT
        return self._piece(held) if held else []

    def _piece(self, token_ids: list[int]) -> list[Piece]:
        if self._part is None:
            return []
        begins, self._begins, self._is_first = self._begins, False, False
        return [Piece(self._part, token_ids, begins)]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


ChannelParser = HarmonyParser | PairParser
