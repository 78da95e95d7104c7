"""What a load says about a server, and whether two servers answered alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from specache.bench.base import Result
from specache.bench.serve_client import Answered

ALIKE_CHARACTERS = 12  # two answers begin alike if these are equal
LEAST_ALIKE = 0.5  # of the answers must begin alike
MOST_LENGTH_RATIO = 1.5  # of the tokens of all answers


@dataclass(frozen=True)
class Load:
    """One run of a trace against one server.

    Attributes:
        answers: in the order of the trace.
        idle_bytes: resident memory of the server before the run, after its warm-up.
        peak_bytes: most resident memory during the run.
    """

    answers: Sequence[Answered]
    idle_bytes: int
    peak_bytes: int

    @property
    def completed(self) -> list[Answered]:
        """Return the answers without an error."""
        return [answer for answer in self.answers if answer.error is None]

    @property
    def wall_s(self) -> float:
        """Return the time from the first request to the end of the last, in seconds."""
        return max(answer.ended for answer in self.answers) - min(answer.sent for answer in self.answers)


def figures(loads: Sequence[Load]) -> Result:
    """Return the figures of all runs of one server.

    Rates are medians over runs; times to the first token and between tokens are percentiles over
    the requests and pieces of all runs; memory is the most of any run.
    """
    done = [answer for load in loads for answer in load.completed]
    first = [1000 * answer.first_s for answer in done if answer.first_s is not None]
    gaps = [1000 * gap for answer in done for gap in answer.gaps_s]
    minutes = sorted(60 * len(load.completed) / load.wall_s for load in loads)
    return {
        "requests": sum(len(load.answers) for load in loads),
        "completed": len(done),
        "errors": dict(Counter(answer.error for load in loads for answer in load.answers if answer.error is not None)),
        "wall_s": median(load.wall_s for load in loads),
        "requests_per_min": median(minutes),
        "spread": [percentile(minutes, 25), percentile(minutes, 75)],
        "tokens_per_s": median(sum(map(answer_tokens, load.completed)) / load.wall_s for load in loads),
        "ttft_ms_p50": percentile(first, 50),
        "ttft_ms_p99": percentile(first, 99),
        "tbt_ms_p50": percentile(gaps, 50),
        "tbt_ms_p99": percentile(gaps, 99),
        "prompt_tokens": _total(answer.prompt_tokens for answer in done),
        "cached_tokens": _total(answer.cached_tokens for answer in done),
        "answer_tokens": sum(map(answer_tokens, done)),
        "idle_bytes": max(load.idle_bytes for load in loads),
        "peak_bytes": max(load.peak_bytes for load in loads),
    }


def answer_tokens(answer: Answered) -> int:
    """Return the tokens of an answer as the server counts them, else its pieces of text."""
    return len(answer.arrivals) if answer.answer_tokens is None else answer.answer_tokens


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, interpolated between its neighbours; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def alike(ours: Sequence[Answered], theirs: Sequence[Answered]) -> float | None:
    """Return the share of requests whose two answers begin alike; None if no request has both."""
    pairs = [
        (one.text.strip(), other.text.strip())
        for one, other in zip(ours, theirs, strict=True)
        if one.error is None and other.error is None
    ]
    return sum(one[:ALIKE_CHARACTERS] == other[:ALIKE_CHARACTERS] for one, other in pairs) / len(pairs) if pairs else None


def refusal(ours: Load, theirs: Load) -> str | None:
    """Return why two servers cannot be compared, or `None`: then they did the same work."""
    share = alike(ours.answers, theirs.answers)
    if share is None:
        return "no request was answered by both"
    if len(theirs.completed) < len(theirs.answers) or len(ours.completed) < len(ours.answers):
        return f"{len(ours.completed)} of ours and {len(theirs.completed)} of its {len(theirs.answers)} requests were answered"
    if share < LEAST_ALIKE:
        return f"only {share:.0%} of its answers begin as ours do, so it is not the same model and prompt"
    lengths = [sum(map(answer_tokens, load.answers)) for load in (ours, theirs)]
    if max(lengths) > MOST_LENGTH_RATIO * max(1, min(lengths)):
        return f"its answers have {lengths[1]:,} tokens, ours {lengths[0]:,}"
    return None


def compare(ours: Result, theirs: Result, name: str) -> dict[str, Any]:
    """Return the ratios of our figures to another server's: speed-ups, and of memory a share."""
    return {
        f"vs_{name}": ours["requests_per_min"] / theirs["requests_per_min"],
        f"wall_share_of_{name}": ours["wall_s"] / theirs["wall_s"],
        f"ttft_vs_{name}": _over(theirs["ttft_ms_p50"], ours["ttft_ms_p50"]),
    }


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum, or None if a server does not report it."""
    known = list(counts)
    return None if not known or any(count is None for count in known) else sum(filter(None, known))
