"""RULER's two scores. Both look for the references anywhere in the answer."""

from __future__ import annotations

import re
from collections.abc import Callable

Score = Callable[[str, list[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """Return the answer as RULER scores it: control characters as line breaks, ends stripped."""
    return _CONTROL.sub("\n", prediction).strip()


def string_match_all(prediction: str, references: list[str]) -> float:
    """Return the share of the references in the answer, ignoring case: all were asked for."""
    return sum(_hits(prediction, references)) / len(references)


def string_match_part(prediction: str, references: list[str]) -> float:
    """Return 1 if any reference is in the answer, ignoring case: they mean the same."""
    return float(any(_hits(prediction, references)))


def _hits(prediction: str, references: list[str]) -> list[bool]:
    lowered = prediction.lower()
    return [reference.lower() in lowered for reference in references]


SCORES: dict[str, Score] = {score.__name__: score for score in (string_match_all, string_match_part)}
