"""`truncation: "auto"`: leave out the oldest turns of a conversation that is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from specache.server.error_responses import ApiError
from specache.server.responses.input_items import FunctionCallItem, FunctionCallOutputItem, InputItem, MessageItem

_Prompt = TypeVar("_Prompt")


class PromptTruncation(Generic[_Prompt]):
    """Makes a prompt of as many of the newest turns as fit.

    A turn begins with a message of the user where every call has its result, so that none loses the
    other. Messages of the system and the newest turn stay.

    Args:
        prompt_of: makes the prompt of a conversation.
        has_room: whether a prompt leaves enough room for an answer.
    """

    def __init__(self, prompt_of: Callable[[list[InputItem]], _Prompt], has_room: Callable[[_Prompt], bool]) -> None:
        self._prompt_of = prompt_of
        self._has_room = has_room
        self._full: _Prompt | None = None  # the shortest prompt that leaves too little room
        self._error: ApiError | None = None

    def longest(self, items: Sequence[InputItem]) -> _Prompt:
        """Return the prompt of the longest end of a conversation that fits, found by halving.

        Raises:
            ApiError: not even the newest turn fits, or `prompt_of` failed.
        """
        found = self._try(list(items))
        turns = _turns(items)
        fewest, most = 1, len(turns) - 1  # turns to leave out
        if found is not None:
            return found
        while fewest <= most:
            middle = (fewest + most) // 2
            prompt = self._try(_without_turns_before(items, turns[middle]))
            if prompt is None:
                fewest = middle + 1
            else:
                found, most = prompt, middle - 1
        if found is not None:
            return found
        if self._full is not None:
            return self._full
        assert self._error is not None
        raise self._error

    def _try(self, items: list[InputItem]) -> _Prompt | None:
        """Return the prompt of a conversation, or None if it is too long."""
        try:
            prompt = self._prompt_of(items)
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            self._error = error
            return None
        if self._has_room(prompt):
            return prompt
        self._full = prompt
        return None


def _turns(items: Sequence[InputItem]) -> list[int]:
    """Return where turns begin."""
    turns: list[int] = []
    open_calls: set[str] = set()
    for place, item in enumerate(items):
        if isinstance(item, FunctionCallItem):
            open_calls.add(item.call_id)
        elif isinstance(item, FunctionCallOutputItem):
            open_calls.discard(item.call_id)
        elif isinstance(item, MessageItem) and item.role == "user" and not open_calls:
            turns.append(place)
    return turns


def _without_turns_before(items: Sequence[InputItem], start: int) -> list[InputItem]:
    system = [item for item in items[:start] if isinstance(item, MessageItem) and item.role in ("system", "developer")]
    return [*system, *items[start:]]
