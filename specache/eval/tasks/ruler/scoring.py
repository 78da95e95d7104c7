"""RULER's two scores. Both look for the references in the answer, whatever stands around them."""

from __future__ import annotations

import re
from collections.abc import Callable

Score = Callable[[str, list[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """The answer as it is scored: control characters are line breaks, and none at either end."""
    return _CONTROL.sub("\n", prediction).strip()


def string_match_all(prediction: str, references: list[str]) -> float:
    """The fraction of the references that occur in the answer, in any case: everything was asked for."""
    return sum(_hits(prediction, references)) / len(references)


def string_match_part(prediction: str, references: list[str]) -> float:
    """1 if any of the references occurs in the answer, in any case: they are ways to say the same."""
    return float(any(_hits(prediction, references)))


def _hits(prediction: str, references: list[str]) -> list[bool]:
    lowered = prediction.lower()
    return [reference.lower() in lowered for reference in references]


SCORES: dict[str, Score] = {score.__name__: score for score in (string_match_all, string_match_part)}
