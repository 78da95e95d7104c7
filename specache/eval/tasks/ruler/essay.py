"""Running text as a haystack."""

from __future__ import annotations

import re
from itertools import cycle

_SENTENCE_END = re.compile(r"[.!?][\"')\]*`]*$")


class Essay:
    """The sentences of a text, repeated without end. The text must not be empty.

    Whitespace becomes single spaces, as in RULER.
    """

    def __init__(self, text: str) -> None:
        self._sentences: list[list[str]] = [[]]
        for word in text.split():
            self._sentences[-1].append(word)
            if _SENTENCE_END.search(word):
                self._sentences.append([])
        if not self._sentences[-1]:
            self._sentences.pop()

    def sentences(self, words: int) -> list[str]:
        """Return the first `words` words as sentences. The last sentence may be cut short."""
        taken: list[str] = []
        for sentence in cycle(self._sentences):
            if words <= len(sentence):
                return [*taken, " ".join(sentence[:words])]
            taken.append(" ".join(sentence))
            words -= len(sentence)
        raise AssertionError("a cycle does not end")
