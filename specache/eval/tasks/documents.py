"""Excerpts of texts with a given number of tokens, for the distribution tasks."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specache.errors import TaskDataError
from specache.eval.tasks.texts import load_text
from specache.templates.template import ChatTemplate

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on average for text


@dataclass(frozen=True)
class Excerpt:
    """An excerpt of a text.

    Attributes:
        document: about as many tokens as were asked for.
        following: the text that comes after it.
    """

    name: str
    document: str
    following: str


def excerpts(tokenizer: Any, paths: tuple[Path, ...], lengths: Sequence[int], following: int, seed: int) -> list[Excerpt]:
    """Return one excerpt per length, spread over each text.

    The files are used in turn; without files, Python's own documentation.

    Args:
        lengths: tokens of each excerpt.
        following: tokens of text that come after it.
        seed: moves where the excerpts begin.

    Raises:
        TaskDataError: a text is too short.
    """
    sources: list[tuple[tuple[Path, ...], str]] = [((path,), path.name) for path in paths] or [((), "pydoc topics")]
    texts = [load_text(files) for files, _ in sources]
    found = []
    for index, length in enumerate(lengths):
        which = index % len(sources)
        text, name = texts[which], sources[which][1]
        start = _start(text, length + following, index, len(lengths), seed, name)
        piece = text[start : start + (length + following) * CHARACTERS_PER_TOKEN]
        places = _token_places(tokenizer, piece, (length, length + following))
        if places is None:
            raise TaskDataError(f"{name} is too short for an excerpt of {length + following:,} tokens. Pass a longer text.")
        cut, end = places
        found.append(Excerpt(f"{name}@{start}", piece[:cut], piece[cut:end]))
    return found


def _token_places(tokenizer: Any, text: str, numbers: tuple[int, int]) -> list[int] | None:
    """Return where the tokens of these numbers begin in a text, in characters.

    `None`: it has too few tokens. A tokenizer without offsets is asked for the tokens of the text's
    beginnings: each place is after the longest one that has fewer tokens.
    """
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [offsets[number][0] for number in numbers] if len(offsets) > numbers[-1] else None

    def tokens(characters: int) -> int:
        return len(tokenizer(text[:characters], add_special_tokens=False)["input_ids"])

    if tokens(len(text)) <= numbers[-1]:
        return None
    return [bisect_right(range(len(text) + 1), number, key=tokens) - 1 for number in numbers]


def _start(text: str, tokens: int, index: int, count: int, seed: int, name: str) -> int:
    """Return where excerpt `index` of `count` begins, after a blank line if possible.

    Excerpts are spread over the text, and the seed moves them.
    """
    room = len(text) - tokens * CHARACTERS_PER_TOKEN
    if room < 0:
        if len(text) < 2 * tokens:
            raise TaskDataError(f"{name} is too short for an excerpt of {tokens:,} tokens. Pass a longer text.")
        return 0
    place = int(room * ((index + 0.5) / count + 0.137 * seed) % max(room, 1))
    paragraph = text.find("\n\n", place)
    return paragraph + 2 if 0 <= paragraph < room else place


def prompts_around(template: ChatTemplate, document: str, question: str, chat: bool) -> tuple[list[int], list[int]]:
    """Encode a prompt that asks a question about a document.

    With `chat` and a chat template, the prompt is a user's message.

    Returns:
        The token ids up to the document's end, and all token ids.
    """
    if not (chat and template.exists):
        prompt = f"{document}\n\n{question}"
        head = prompt[: len(document.rstrip())]
        return list(template.tokenizer(head)["input_ids"]), list(template.tokenizer(prompt)["input_ids"])
    end = f"q{secrets.token_hex(8)}q"
    beginning = template.encode(template.ask(f"{document.rstrip()}{end}\n\n{question}"), cut=end)
    return beginning, template.encode(template.ask(f"{document}\n\n{question}"))
