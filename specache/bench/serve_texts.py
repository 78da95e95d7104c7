"""Texts of a certain number of tokens, out of Python's own documentation."""

from __future__ import annotations

import functools
import random
from typing import Any

from specache.errors import BenchmarkError


class Texts:
    """Cuts passages out of a text.

    Args:
        tokenizer: counts tokens, without special ones.
        seed: decides where passages begin.
        text: to cut from. Default: Python's documentation.
    """

    def __init__(self, tokenizer: Any, seed: int, text: str | None = None) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._ids: list[int] = self._encode(text if text is not None else _documentation())
        self.passage = functools.cache(self._passage)

    def length(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._encode(text))

    def _passage(self, name: str, tokens: int) -> str:
        """Return a text of about `tokens` tokens. Each name has a passage of its own."""
        start = random.Random(f"{name} {self._seed}").randrange(len(self._ids))
        ids = [self._ids[(start + offset) % len(self._ids)] for offset in range(tokens)]
        text: str = self._tokenizer.decode(ids)
        return text.strip().replace("\N{REPLACEMENT CHARACTER}", "")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _documentation() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BenchmarkError("this Python comes without its documentation (pydoc_data). Name a --trace with messages.") from None
    return "\n\n".join(topics[name] for name in sorted(topics))
