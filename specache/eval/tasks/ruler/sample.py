"""What every one of the 13 generators makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from specache.eval.tasks.ruler.scoring import Score

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Question:
    """One prompt and what answers it.

    Attributes:
        text: the user's message: context first, question last.
        answer_prefix: how the answer begins, put after the message (and after the template's own beginning of an answer).
        references: what the answer is scored against.
        depths: where the references are in the context, 0 the beginning and 1 the end; empty where they are everywhere.
    """

    text: str
    answer_prefix: str
    references: list[str]
    depths: list[float] = field(default_factory=list)


class Subtask(Protocol):
    """One of the 13 generators."""

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""

    @property
    def score(self) -> Score:
        """(answer, references) -> score in [0, 1]."""

    def smallest(self, questions: int) -> int:
        """The smallest `size` that the generator can make."""

    def questions(self, asked: int) -> int:
        """How many questions it can ask over one context, at most `asked`."""

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        """Questions over one context of `size` units (words, lines, documents).

        Args:
            rng: fresh; equal ones give equal samples.
            length: tokens that prompt and answer may have; some tasks' proportions depend on it.
        """
