"""Find where a JSON object ends, while its text arrives."""

from __future__ import annotations

_CLOSING = {"{": "}", "[": "]"}


class JsonScanner:
    """Follows the brackets and strings of one JSON object.

    It does not check numbers, commas and names.

    Attributes:
        complete: the object has ended.
        broken: a bracket does not match.
    """

    def __init__(self) -> None:
        self.complete = self.broken = False
        self._open: list[str] = []  # the brackets that must follow
        self._in_string = self._escaped = False

    @property
    def depth(self) -> int:
        """Return how many brackets are open."""
        return len(self._open)

    @property
    def in_string(self) -> bool:
        """Return whether a string is open."""
        return self._in_string

    def push(self, character: str) -> None:
        """Take the next character. The first one must open the object."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in _CLOSING:
            self._open.append(_CLOSING[character])
        elif character in "}]":
            self.broken = not self._open or self._open.pop() != character
            self.complete = not self.broken and not self._open
