"""The demo's task: find one planted sentence in a long document."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from specache.errors import ConfigError, SpeCacheError

QUESTION = "What is the secret access code of the archive?"
_FACT = "The secret access code of the archive is {code}. Remember it."
NEXT_QUESTION = "What is the telephone number of the lighthouse?"
_NEXT_FACT = "The telephone number of the lighthouse is {code}. Remember it."
_OVERHEAD = 120  # tokens of the question, the facts and the chat template, at most


class DemoError(SpeCacheError):
    """The demo's document cannot be created."""


class LengthError(DemoError, ConfigError):
    """No document has this length."""


@dataclass(frozen=True)
class DemoTask:
    """A document with a planted fact, and a question about it.

    `next` is another question about the same document, whose fact is planted half as deep.
    """

    prompt: str
    fact: str
    code: str
    question: str = QUESTION
    next: DemoTask | None = None

    def is_right(self, answer: str) -> bool:
        """Return True if the first number in an answer is the planted one."""
        first = re.search(r"\d+", answer)
        return first is not None and first[0] == self.code


def make_task(tokenizer: Any, *, tokens: int, seed: int, depth: float) -> DemoTask:
    """Return a task over Python's own documentation, topic by topic, up to a length.

    Args:
        tokenizer: tokenizer that counts tokens.
        tokens: approximate length of the prompt.
        seed: seed of the planted number.
        depth: position of the fact, as a fraction of the document.

    Raises:
        LengthError: `tokens` is out of range.
        DemoError: this Python has no documentation.
    """
    if tokens <= 2 * _OVERHEAD:
        raise LengthError(f"--tokens must be more than {2 * _OVERHEAD}, got {tokens}.")
    numbers = random.Random(seed)
    code, next_code = (str(numbers.randrange(10_000, 100_000)) for _ in range(2))
    paragraphs, lengths = _document(tokenizer, tokens - _OVERHEAD)
    fact, next_fact = _FACT.format(code=code), _NEXT_FACT.format(code=next_code)
    paragraphs.insert(_paragraph_at(lengths, depth), fact)
    paragraphs.insert(_paragraph_at(lengths, depth / 2), next_fact)
    document = "\n\n".join(paragraphs)
    text = f"Here is a document.\n\n{document}\n\nEnd of the document.\n\n"
    return DemoTask(text + QUESTION, fact, code, next=DemoTask(text + NEXT_QUESTION, next_fact, next_code, NEXT_QUESTION))


def _document(tokenizer: Any, budget: int) -> tuple[list[str], list[int]]:
    """Return paragraphs that fill `budget` tokens, and the tokens of each."""
    paragraphs: list[str] = []
    lengths: list[int] = []
    for paragraph in _topics():
        length = len(tokenizer(paragraph + "\n\n", add_special_tokens=False)["input_ids"])
        if sum(lengths) + length > budget:
            return paragraphs, lengths
        paragraphs.append(paragraph)
        lengths.append(length)
    raise LengthError(f"Python's documentation has only {sum(lengths):,} tokens; pass a smaller --tokens.")


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError(
            "this Python comes without its documentation (pydoc_data), which the demo reads. Use a full Python installation."
        ) from None
    return [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n") if paragraph.strip()]


def _paragraph_at(lengths: list[int], depth: float) -> int:
    """Return the index of the first paragraph that begins at or after `depth` of the document."""
    before, target = 0, depth * sum(lengths)
    for index, length in enumerate(lengths):
        if before >= target:
            return index
        before += length
    return len(lengths)
