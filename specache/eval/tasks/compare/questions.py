"""Questions about one figure of all companies, with their right answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from specache.eval.tasks.compare.reports import Figure, Reports

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Comparison:
    """A question that needs all reports.

    Attributes:
        kind: a key of `KINDS`.
        text: the question.
        figures: the companies' figures that decide the answer, in the order of the reports.
        answer: names or a number. Where order matters, in that order.
        ordered: whether it does.
    """

    kind: str
    text: str
    figures: dict[str, int]
    answer: list[str]
    ordered: bool = True


def _largest(rng: Random, reports: Reports, figure: Figure) -> Comparison:
    """Ask for the company with the largest figure."""
    values = reports.of(figure)
    return Comparison("largest", f"Which company had the largest {_named(figure)}?", values, [max(values, key=values.__getitem__)])


def _order(rng: Random, reports: Reports, figure: Figure) -> Comparison:
    """Ask for all companies by a figure."""
    values = reports.of(figure)
    text = f"Which is the order of all companies by {_named(figure)}, from the largest to the smallest?"
    return Comparison("order", text, values, sorted(values, key=values.__getitem__, reverse=True))


def _count(rng: Random, reports: Reports, figure: Figure) -> Comparison:
    """Ask for the number of companies above a threshold: at least one, and not all."""
    values = reports.of(figure)
    ordered = sorted(values.values(), reverse=True)
    above = rng.randint(1, len(ordered) - 1)
    threshold = (ordered[above - 1] + ordered[above]) // 2  # below the one, and at least the other
    text = f"How many of the companies had a {_named(figure)} of more than {threshold}?"
    return Comparison("count", text, values, [str(above)])


def _equal(rng: Random, reports: Reports, figure: Figure) -> Comparison:
    """Ask for the two companies with equal figures."""
    values = reports.of(figure)
    numbers = list(values.values())
    names = [name for name, value in values.items() if numbers.count(value) == 2]
    return Comparison("equal", f"Which two companies had the same {_named(figure)}?", values, names, ordered=False)


KINDS: dict[str, Callable[[Random, Reports, Figure], Comparison]] = {
    "largest": _largest,
    "order": _order,
    "count": _count,
    "equal": _equal,
}


def read_answer(text: str, companies: Sequence[str]) -> list[str]:
    """Return what an answer's first line says: the companies it names, in order, or its number.

    Case does not count. A line that names no company is read as its first number, in digits or as a
    word up to twelve.
    """
    line = next((line for line in text.splitlines() if line.strip()), "").casefold()
    named = re.findall("|".join(re.escape(company.casefold()) for company in companies), line)
    if named:
        original = {company.casefold(): company for company in companies}
        return [original[name] for name in named]
    numbers = re.findall(rf"\d+|\b(?:{'|'.join(_NUMBERS)})\b", line)
    return [str(_NUMBERS.index(numbers[0])) if numbers[0] in _NUMBERS else numbers[0]] if numbers else []


def is_right(text: str, comparison: Mapping[str, Any]) -> bool:
    """Return whether an answer is right.

    Args:
        comparison: the fields of a `Comparison`.
    """
    said, answer = read_answer(text, list(comparison["figures"])), list(comparison["answer"])
    return said == answer if comparison["ordered"] else sorted(said) == sorted(answer)


def _named(figure: Figure) -> str:
    kind, period = figure
    return f"{kind.noun} in {period}"
