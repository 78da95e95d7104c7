"""Reasoning between markers that are ordinary text, as Qwen3 and DeepSeek-R1 write it.

`specache chat` leaves it in the text, in which the templates of those models look for it. Clients
of a server expect it in `reasoning_content`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specache.templates.channels import PAIRS, Part
from specache.templates.markers import template_text

_NEWEST = 16  # tokens of a prompt in which a template may have opened reasoning


class TextReasoning:
    """Splits the text of an answer into reasoning, if it begins with some, and what follows.

    White space around the markers is omitted.

    Args:
        pairs: the markers that open and close reasoning.
        closing: the marker that closes what the prompt has opened; `None` if it has not.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], closing: str | None = None) -> None:
        self._pairs = pairs
        self._closing = closing
        self._held = ""
        self._begun = closing is not None  # the first marker was found, or cannot come any more
        self._strips = closing is not None  # white space where a part begins

    def push(self, text: str) -> list[tuple[Part, str]]:
        """Add text and return what became final, with its part."""
        self._held += text
        parts: list[tuple[Part, str]] = []
        if not self._begun and not self._open():
            return parts
        if self._closing is not None:
            parts += self._reason(self._closing)
        if self._closing is None:
            parts += self._final()
        return parts

    def finish(self) -> list[tuple[Part, str]]:
        """End the answer and return the text held back. Reasoning that was not closed stays so."""
        part = Part.REASONING if self._closing is not None else Part.TEXT
        held, self._held = self._held.rstrip() if part is Part.REASONING else self._held, ""
        return [(part, held)] if held and not (self._strips and not held.strip()) else []

    def _open(self) -> bool:
        """Look for an opening marker at the beginning. Return False while it may still come."""
        begins = self._held.lstrip()
        for opening, closing in self._pairs:
            if begins.startswith(opening):
                self._held, self._closing = begins[len(opening) :], closing
                self._begun = self._strips = True
                return True
            if opening.startswith(begins):
                return False
        self._begun = True
        return True

    def _reason(self, closing: str) -> list[tuple[Part, str]]:
        if self._strips:
            self._held = self._held.lstrip()
            self._strips = not self._held
        place = self._held.find(closing)
        if place >= 0:
            text, self._held = self._held[:place].rstrip(), self._held[place + len(closing) :]
            self._closing, self._strips = None, True
        else:
            text = self._held[: self._decided(closing)].rstrip()
            self._held = self._held[len(text) :]
        return [(Part.REASONING, text)] if text else []

    def _final(self) -> list[tuple[Part, str]]:
        if self._strips:
            self._held = self._held.lstrip()
            self._strips = not self._held
        text, self._held = self._held, ""
        return [(Part.TEXT, text)] if text else []

    def _decided(self, closing: str) -> int:
        """Return how many characters cannot belong to the closing marker."""
        most = min(len(self._held), len(closing) - 1)
        part = next((n for n in range(most, 0, -1) if self._held.endswith(closing[:n])), 0)
        return len(self._held) - part


def text_reasoning(tokenizer: Any, prompt: Sequence[int]) -> TextReasoning | None:
    """Return what splits the answer to a prompt that a chat template wrote.

    Return `None` for a model whose template and tokenizer know no such markers.
    """
    pairs = text_pairs(tokenizer)
    if not pairs:
        return None
    newest = str(tokenizer.decode(list(prompt[-_NEWEST:]), skip_special_tokens=False)).rstrip()
    opened = next((closing for opening, closing in pairs if newest.endswith(opening)), None)
    return TextReasoning(pairs, opened)


def text_pairs(tokenizer: Any) -> tuple[tuple[str, str], ...]:
    """Return the pairs of markers that the model knows and that are no special tokens."""
    added = {str(token.content): token for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    template = template_text(tokenizer)

    def known(text: str) -> bool:
        return (text in added and not added[text].special) or (text not in added and text in template)

    return tuple(pair for pair in PAIRS if all(known(text) for text in pair) or _only_closed(pair, template, added))


def _only_closed(pair: tuple[str, str], template: str, added: dict[str, Any]) -> bool:
    """Return whether a template only splits at the closing marker, and none is a special token."""
    return pair[1] in template and not any(text in added for text in pair)
