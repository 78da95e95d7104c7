"""Where the final message of an answer begins, behind reasoning, and what may stand before it.

A grammar describes the final message. Reasoning in front of it is free, but must lead to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from specache.templates.channels import PAIRS, ChannelTokens

_CHANNELS = ("analysis", "final")


class FinalMessage(Protocol):
    """Tells reasoning and final message apart. Every method is a function of the answer alone.

    Attributes:
        openings: tokens that may begin the answer although the final message cannot begin so.
    """

    openings: frozenset[int]

    def start(self, answer: Sequence[int]) -> int | None:
        """Return the index of the final message's first token; `None` if it has not begun."""

    def allowed(self, answer: Sequence[int]) -> frozenset[int] | None:
        """Return the only tokens that may follow before the final message; `None` for any."""


def final_message(tokenizer: Any, prompt: Sequence[int]) -> FinalMessage | None:
    """Return what finds the final message of the answer to a prompt that a chat template wrote.

    Return `None` if the answer is the final message from its first token on.
    """
    tokens = ChannelTokens.of(tokenizer)
    if tokens is not None:
        return AfterChannels(tokenizer, tokens, prompt)
    ids = {token.content: token_id for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    pairs = {ids[begin]: ids[end] for begin, end in PAIRS if begin in ids and end in ids}
    return _after_pair(tokenizer, pairs, prompt) if pairs else None


def _after_pair(tokenizer: Any, pairs: dict[int, int], prompt: Sequence[int]) -> AfterPair | None:
    markers = {*pairs, *pairs.values()}
    place = next((place for place in range(len(prompt) - 1, -1, -1) if prompt[place] in markers), None)
    if place is None or tokenizer.decode(list(prompt[place + 1 :])).strip():
        return AfterPair(pairs, None)  # what an earlier message left open does not count
    if prompt[place] in pairs:
        return AfterPair({}, pairs[prompt[place]])
    return None  # the template closes empty reasoning: thinking is off


class AfterPair:
    """The final message follows a closing marker (`</think>`), or there is no reasoning.

    Args:
        pairs: opening token -> closing token, if the answer itself may open reasoning.
        closing: the closing token, if the prompt has opened it.
    """

    def __init__(self, pairs: dict[int, int], closing: int | None) -> None:
        self.openings = frozenset(pairs)
        self._pairs = pairs
        self._closing = closing

    def start(self, answer: Sequence[int]) -> int | None:
        closing = self._closing
        if closing is None:
            closing = self._pairs.get(answer[0]) if answer else None
        if closing is None:
            return 0
        return answer.index(closing) + 1 if closing in answer else None

    def allowed(self, answer: Sequence[int]) -> frozenset[int] | None:
        return None


class AfterChannels:
    """The final message is that of channel `final` (the harmony format).

    The header of each message is `<|start|>assistant<|channel|>NAME<|message|>`; the prompt may
    have begun the first one.
    """

    openings: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Any, tokens: ChannelTokens, prompt: Sequence[int]) -> None:
        def ids(text: str) -> list[int]:
            return [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]

        self._tokens = tokens
        role = ids("assistant")
        self._headers = [[tokens.start, *role, tokens.channel, *ids(name), tokens.message] for name in _CHANNELS]
        self._final = [tokens.channel, *ids("final"), tokens.message]
        starts = [place for place, token_id in enumerate(prompt) if token_id == tokens.start]
        self._begun = list(prompt[starts[-1] :]) if starts else []

    def start(self, answer: Sequence[int]) -> int | None:
        tokens, place = [*self._begun, *answer], -1
        with suppress(ValueError):  # no further message
            while True:
                place = tokens.index(self._tokens.message, place + 1)
                if tokens[max(0, place + 1 - len(self._final)) : place + 1] == self._final:
                    return place + 1 - len(self._begun)
        return None

    def allowed(self, answer: Sequence[int]) -> frozenset[int] | None:
        backwards = [*self._begun, *answer][::-1]
        borders = [backwards.index(token) for token in (self._tokens.start, self._tokens.end) if token in backwards]
        header = backwards[: min(borders, default=-1) + 1][::-1]  # from the newest border on
        if header == [self._tokens.end]:
            return frozenset({self._tokens.start})
        following = [one[len(header)] for one in self._headers if len(header) < len(one) and one[: len(header)] == header]
        return frozenset(following) or None
