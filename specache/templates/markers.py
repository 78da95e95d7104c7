"""Control tokens of a conversation, and texts that only look like them.

A chat template writes `<|im_end|>` where a message ends, and the tokenizer makes one token of it.
The same characters in a message are text. Placeholders replace them before the template is applied,
so that both can be told apart.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_FRAGMENT = 8  # characters of a placeholder that do not occur by chance


@dataclass(frozen=True)
class ControlTokens:
    """Markers that a tokenizer encodes as single tokens.

    Attributes:
        special: text -> id of its special tokens.
        written: text -> id of other added tokens that the chat template writes (`<tool_call>`,
            `<think>`).
    """

    special: dict[str, int]
    written: dict[str, int]

    @cached_property
    def all(self) -> dict[str, int]:
        return {**self.written, **self.special}

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Return a pattern that finds markers as tokenizers do: leftmost, longest first.

        Return None without markers.
        """
        texts = sorted(self.all, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def found_in(self, text: str) -> list[tuple[int, str]]:
        """Return (position, marker) of every marker in a text."""
        return [(match.start(), match.group()) for match in self.pattern.finditer(text)] if self.pattern else []


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Return the control tokens of a tokenizer and its chat template."""
    special: dict[str, int] = {}
    others: dict[str, int] = {}
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        (special if token.special else others)[token.content] = token_id
    for text in getattr(tokenizer, "all_special_tokens", ()):
        special.setdefault(text, tokenizer.convert_tokens_to_ids(text))
    template = template_text(tokenizer)
    written = {text: token_id for text, token_id in others.items() if text in template and _is_marker(text) and text not in special}
    return ControlTokens({text: token_id for text, token_id in special.items() if text}, written)


def template_text(tokenizer: Any) -> str:
    """Return the chat template, or all of them joined; empty if there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)


def _is_marker(text: str) -> bool:
    """Return True for a text that is neither whitespace nor a word.

    Templates may contain both as ordinary text.
    """
    return not text.isspace() and not text.replace("_", "").isalnum()


class HiddenMarkers:
    """Placeholders for texts that look like markers in the messages of one conversation.

    A placeholder is a word of letters and digits that occurs in no text, so templates and
    tokenizers do not treat it specially.
    """

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []
        self._affixes: dict[int, tuple[Iterable[str], Affixes]] = {}  # by the identity of the markers, which is kept
        self._pattern = re.compile(f"q{self._nonce}h([0-9]+)q")

    def __bool__(self) -> bool:
        return bool(self._hidden)

    def hide(self, text: str, markers: Iterable[str]) -> str:
        """Replace every marker, and text that could form one with the template's text around it."""
        present = sorted((marker for marker in markers if marker in text), key=len, reverse=True)
        if present:
            text = re.sub("|".join(map(re.escape, present)), lambda match: self._placeholder(match.group()), text)
        return self._hide_ends(text, markers)

    def reveal(self, text: str) -> str:
        """Replace the placeholders by their texts."""
        return self._pattern.sub(lambda match: self._hidden[int(match.group(1))], text)

    def is_whole(self, text: str) -> bool:
        """Return True if no placeholder was split by a template."""
        rest = self._pattern.sub("", text)
        return not any(self._nonce[start : start + _FRAGMENT] in rest for start in range(len(self._nonce) - _FRAGMENT + 1))

    def _hide_ends(self, text: str, markers: Iterable[str]) -> str:
        core = text.strip()  # templates may strip
        if not core:
            return text
        start = text.index(core)
        before, after = text[:start], text[start + len(core) :]
        affixes = self._affixes_of(markers)
        end = affixes.at_end(core)
        if end:
            core = core[: len(core) - end] + self._placeholder(core[len(core) - end :])
        begin = affixes.at_beginning(core)
        if begin:
            core = self._placeholder(core[:begin]) + core[begin:]
        return before + core + after

    def _affixes_of(self, markers: Iterable[str]) -> Affixes:
        known = self._affixes.get(id(markers))
        if known is None:
            known = self._affixes[id(markers)] = (markers, Affixes(markers))
        return known[1]

    def _placeholder(self, text: str) -> str:
        self._hidden.append(text)
        return f"q{self._nonce}h{len(self._hidden) - 1}q"


class Affixes:
    """Beginnings and ends of markers, of which a tokenizer may have hundreds."""

    def __init__(self, markers: Iterable[str]) -> None:
        texts = list(markers)
        self._longest = max(map(len, texts), default=0)
        self._beginnings = frozenset(text[:length] for text in texts for length in range(1, len(text) + 1))
        self._ends = frozenset(text[-length:] for text in texts for length in range(1, len(text) + 1))

    def at_end(self, text: str) -> int:
        """Return the length of the longest end of a text that begins a marker."""
        return next((n for n in self._lengths(text) if text[len(text) - n :] in self._beginnings), 0)

    def at_beginning(self, text: str) -> int:
        """Return the length of the longest beginning of a text that ends a marker."""
        return next((n for n in self._lengths(text) if text[:n] in self._ends), 0)

    def _lengths(self, text: str) -> range:
        return range(min(len(text), self._longest), 0, -1)
