"""The task `compare`: questions over the reports of several companies that need all of them.

The form is that of Loong (Wang et al., 2024): no document can be left out, since the answer
compares one figure of each. Several questions are asked about the same reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, ClassVar

from specache.errors import ConfigError
from specache.eval.tasks.answer_task import AnswerTask, Generated, Question
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.compare.questions import KINDS, Comparison, is_right
from specache.eval.tasks.compare.reports import MOST_COMPANIES, MOST_FIGURES, make_reports
from specache.eval.tasks.texts import check_at_least, check_distinct

PROMPT = (
    "Here are the reports of {count} companies.\n\n{reports}\n\nEnd of the reports. Answer a question about them with names of "
    "companies, separated by commas, or with a number. Two examples, about other companies:\n\n{examples}\n\n"
    "Question: {question}"
)
FIGURES, ANSWER = "Figures:", "Answer:"
_EXAMPLE_FIGURES = {"Amber Ships": 41, "Coral Lines": 17, "Lagoon Freight": 41}
_EXAMPLES = (
    Comparison(
        "equal", "Which two companies had the same number of ships in 1990?", _EXAMPLE_FIGURES, ["Amber Ships", "Lagoon Freight"]
    ),
    Comparison("count", "How many of the companies had a number of ships in 1990 of more than 30?", _EXAMPLE_FIGURES, ["2"]),
)


@dataclass(frozen=True)
class Compare(AnswerTask):
    """Compare one figure of every document."""

    name: ClassVar[str] = "compare"
    summary: ClassVar[str] = "questions that compare a figure of every document (the form of Loong)"
    companies: int = field(default=6, metadata={"help": "Documents of a prompt: one report per company."})
    questions: int = field(default=8, metadata={"help": "Questions about the same reports, each an item."})
    kinds: tuple[str, ...] = field(default=tuple(KINDS), metadata={"help": "Kinds of questions, taken in turn."})
    steps: bool = field(default=False, metadata={"help": "The answer first lists the figure of every company (for small models)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "questions")
        check_at_least(self, 3, "companies")
        check_distinct(self, "kinds")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(f"--kinds must be of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}.")
        if self.companies > MOST_COMPANIES:
            raise ConfigError(f"--companies can be at most {MOST_COMPANIES}, got {self.companies}.")
        if self.questions > MOST_FIGURES:
            raise ConfigError(f"--questions can be at most {MOST_FIGURES:,}, got {self.questions:,}.")

    def generated(self, length: int) -> Iterator[Generated]:
        for number in range(self.documents):
            key = f"{length}/{number}"

            def make(size: int, key: str = key) -> list[Question]:
                return self._questions(Random(f"{self.name} {self.seed} {key}"), size)

            yield Generated(key, f"{self.name}/{length}", make, smallest=self.questions)

    def is_complete(self, prediction: str, facts: dict[str, Any]) -> bool:
        answer = self._answer_of(prediction)
        return answer is not None and "\n" in answer.lstrip()

    def score(self, prediction: str, facts: dict[str, Any]) -> Measurement:
        """Score an answer: 1 if it names the right companies or number, else 0."""
        right = is_right(self._answer_of(prediction) or "", facts["comparison"])
        return Measurement([float(right)], details={"prediction": prediction, "references": facts["comparison"]["answer"]})

    def _answer_of(self, prediction: str) -> str | None:
        """Return what is written after the figures, if they are asked for; `None` before that."""
        if not self.steps:
            return prediction
        _, found, answer = prediction.partition(ANSWER)
        return answer if found else None

    def _questions(self, rng: Random, size: int) -> list[Question]:
        if size > MOST_FIGURES:
            raise ConfigError(f"a report has at most {MOST_FIGURES:,} figures: pass more --companies, or a shorter --lengths.")
        asked = sorted((self.kinds[number % len(self.kinds)] for number in range(self.questions)), key=lambda kind: kind != "equal")
        reports = make_reports(rng, self.companies, size, asked.count("equal"))
        comparisons = [KINDS[kind](rng, reports, figure) for kind, figure in zip(asked, reports.figures, strict=False)]
        rng.shuffle(comparisons)
        examples = "\n\n".join(f"Question: {one.text}\n{self._written(one)}" for one in _EXAMPLES)
        return [
            Question(
                PROMPT.format(count=self.companies, reports=reports.text, examples=examples, question=one.text),
                self._answer(one),
                {"comparison": asdict(one)},
            )
            for one in comparisons
        ]

    def _answer(self, comparison: Comparison) -> list[tuple[str, bool]]:
        parts = [(ANSWER, False)]
        if self.steps:
            parts = []
            for company, figure in comparison.figures.items():
                parts += [(f"; {company}" if parts else f"{FIGURES} {company}", False), (" ", False), (str(figure), True)]
            parts.append((f". {ANSWER}", False))
        for number, text in enumerate(comparison.answer):
            parts += [(", " if number else " ", False), (text, True)]
        return parts

    def _written(self, comparison: Comparison) -> str:
        return "".join(text for text, _ in self._answer(comparison))
