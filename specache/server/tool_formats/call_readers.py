"""Read one call of a tool while its text arrives."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Protocol

from specache.server.tool_formats.json_scanner import JsonScanner

_LONGEST_HEADER = 1024  # characters up to the arguments
_STRING = r'"((?:[^"\\]|\\.)*)"'
_HEADER = re.compile(
    rf'\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*{_STRING}\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no answer could hold it
_FIRST_KEY = re.compile(rf"\{{\s*{_STRING}\s*:")
_OUTSIDE_STRINGS = frozenset(' \t\r\n{}[],:"0123456789+-.eEtrufalsn')
_KEYS = {"name", "type", "id", "function", "arguments", "parameters"}


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        name: the tool, once it is known.
        raw: the text that was taken.
        complete: the call has ended.
        failed: the text is no call. Never set once `name` is known.
    """

    name: str | None
    raw: str
    complete: bool
    failed: bool

    def push(self, text: str) -> int:
        """Take text and return how many characters of it belong to the call."""
        ...

    def take_arguments(self) -> str:
        """Return what is new of the JSON text of the arguments."""
        ...

    def finish(self) -> None:
        """End the text: what is not known to be a call by now has failed."""
        ...


class _Reader:
    """What the readers have in common.

    Args:
        names: the tools that there are.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self.raw = ""
        self.complete = self.failed = False
        self._names = names
        self._scanner = JsonScanner()
        self._new: list[str] = []

    def take_arguments(self) -> str:
        new, self._new = "".join(self._new), []
        return new

    def finish(self) -> None:
        self.failed = self.name is None
        self.complete = not self.failed


class ObjectReader(_Reader):
    """Reads `{"name": ..., "arguments": {...}}`; `parameters` is another word for arguments.

    The arguments arrive as they are written if the name is in front of them, and otherwise at once.

    Args:
        names: the tools that there are. An object with another name is no call.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._in_arguments = self._after_arguments = False

    def push(self, text: str) -> int:
        for place, character in enumerate(text):
            if self.complete or self.failed:
                return place
            if self._after_arguments and not self._goes_on(character):
                self.complete = True
                return place
            self._take(character)
        return len(text)

    def _goes_on(self, character: str) -> bool:
        """Return whether the object goes on behind its arguments. Some models forget its end."""
        if character.isspace():
            return True
        self._after_arguments = False
        return character in ",}"

    def _take(self, character: str) -> None:
        self.raw += character
        self._scanner.push(character)
        if self._in_arguments:
            self._new.append(character)
            if self._scanner.depth == 1 and not self._scanner.in_string and character in "}]":
                self._in_arguments, self._after_arguments = False, True
        elif self.name is None:
            self._look_for_name(character)
        if self._scanner.broken:
            self._end_broken()
        elif self._scanner.complete:
            self._end()

    def _look_for_name(self, character: str) -> None:
        """Begin the call if the arguments begin here."""
        if not self._scanner.in_string and character not in _OUTSIDE_STRINGS:
            self.failed = True
            return
        if (
            character == "{"
            and self._scanner.depth == 2
            and (found := _HEADER.match(self.raw))
            and found.end() == len(self.raw) - 1
        ):
            name = _parsed(f'"{found[1]}"')
            if name in self._names:
                self.name, self._in_arguments = name, True
                self._new.append(character)
            else:
                self.failed = True
        elif character == ":" and self._scanner.depth == 1 and not self._scanner.in_string:
            first = _FIRST_KEY.match(self.raw)
            self.failed = first is None or first[1] not in _KEYS

    def _end(self) -> None:
        self.complete = True
        if self.name is None:
            call = call_of(_parsed(self.raw), self._names)
            if call is None:
                self.complete, self.failed = False, True
            else:
                self.name = call[0]
                self._new.append(call[1])

    def _end_broken(self) -> None:
        self.complete, self.failed = self.name is not None, self.name is None


class NamedReader(_Reader):
    """Reads `NAME[ARGS]{...}`, or `NAME[CALL_ID]...[ARGS]{...}`, or `NAME{...}`.

    Args:
        names: the tools that there are.
    """

    _HEADER = re.compile(r"\s*([^\[\]{}\s]+)\s*(?:\[CALL_ID\][A-Za-z0-9_-]*\s*)?(?:\[ARGS\])?\s*\{")

    def push(self, text: str) -> int:
        for place, character in enumerate(text):
            if self.complete or self.failed:
                return place
            self.raw += character
            if self.name is None:
                self._look_for_name(character)
            if self.name is not None:
                self._new.append(character)
                self._scanner.push(character)
                self.complete = self._scanner.complete or self._scanner.broken
        return len(text)

    def _look_for_name(self, character: str) -> None:
        if character == "{":
            found = self._HEADER.fullmatch(self.raw)
            self.name = found[1] if found is not None and found[1] in self._names else None
            self.failed = self.name is None
        else:
            self.failed = len(self.raw) > _LONGEST_HEADER


def call_of(value: Any, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments (JSON text) of a whole object; `None` if it is no call."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not (isinstance(arguments, str) and isinstance(_parsed(arguments), dict)):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return name, _LONE_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", arguments)


def _parsed(text: str) -> Any:
    """Return JSON text as a value; `None` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
