"""The interface of the 13 generators."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from specache.eval.tasks.ruler.scoring import Score

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Question:
    """One prompt and its answer.

    Attributes:
        text: the user's message: context first, question last.
        answer_prefix: the beginning of the answer, put after the message (and after the template's
            own beginning of an answer).
        references: the texts that the answer is scored against.
        depths: relative positions of the references in the context, from 0 to 1; empty where they
            are everywhere.
    """

    text: str
    answer_prefix: str
    references: list[str]
    depths: list[float] = field(default_factory=list)


class Subtask(Protocol):
    """One of the 13 generators."""

    @property
    def max_new_tokens(self) -> int:
        """Return the longest answer, in tokens."""

    @property
    def score(self) -> Score:
        """Return the score's function: (answer, references) -> score in [0, 1]."""

    def smallest(self, questions: int) -> int:
        """Return the smallest `size` that the generator can make."""

    def questions(self, asked: int) -> int:
        """Return how many questions it can ask over one context, at most `asked`."""

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        """Make questions over one context of `size` units (words, lines, documents).

        Args:
            rng: a fresh generator. Equal seeds give equal samples.
            length: tokens that prompt and answer may have; some tasks' proportions depend on it.
        """
