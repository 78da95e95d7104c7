"""The forced answer: how a method ranks the right JSON, token by token, against the full cache.

It works on models that are too small to write the answer. Only tokens of values count, since a
model writes punctuation and field names without looking at the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specache.eval.methods.base import Session
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.extract.answers import AnswerTokens


@dataclass(frozen=True)
class ForcedReference:
    """The full cache along the right answer.

    Attributes:
        answer: `n` tokens.
        ranked_first: [n] whether the full cache ranks each token first. The first token's
            prediction comes from the prompt, so it is the same for every method and not counted.
        log_probs: token number -> float32 [V], before each token that holds a part of a value. They
            take 4 `V` bytes per such token: 0.8 GB for 60 records and a vocabulary of 262,144.
    """

    answer: AnswerTokens
    ranked_first: list[bool]
    log_probs: dict[int, Tensor]


def follow(answer: AnswerTokens, session: Session) -> ForcedReference:
    """Feed the answer to the full cache, and keep its distributions before tokens of values."""
    ranked_first, log_probs = [False], {}
    for number, logits in _logits_before(answer, session):
        ranked_first.append(int(logits.argmax()) == answer.ids[number])
        if answer.value[number] is not None:
            log_probs[number] = logits.log_softmax(-1)
    return ForcedReference(answer, ranked_first, log_probs)


def compare(reference: ForcedReference, session: Session) -> Measurement:
    """Feed the answer to a method, and compare it with the full cache before each token.

    Returns:
        The divergence before each token that holds a part of a value, in nats, with these tokens'
        `top1`, `nll` (nats), `nll_delta` (less that of the full cache), `right` and `full_right`
        (0 or 1: whether the method and the full cache rank the right token first). `details` counts
        the tokens that both rank first among all of JSON's own tokens and among the first tokens
        of values.
    """
    answer = reference.answer
    divergence: list[float] = []
    tokens: dict[str, list[float]] = {name: [] for name in ("top1", "nll", "nll_delta", "right", "full_right")}
    others = _Kept()
    first_of_value = _Kept()
    for number, logits in _logits_before(answer, session):
        token, best = answer.ids[number], int(logits.argmax())
        full_right = reference.ranked_first[number]
        if number not in reference.log_probs:
            others.count(full_right, best == token)
            continue
        if answer.value[number] != answer.value[number - 1]:
            first_of_value.count(full_right, best == token)
        expected, actual = reference.log_probs[number], logits.log_softmax(-1)
        divergence.append(max(0.0, float((expected.exp() * (expected - actual)).sum())))
        tokens["top1"].append(float(int(expected.argmax()) == best))
        tokens["nll"].append(-float(actual[token]))
        tokens["nll_delta"].append(float(expected[token] - actual[token]))
        tokens["right"].append(float(best == token))
        tokens["full_right"].append(float(full_right))
    return Measurement(divergence, tokens, {"json_tokens": others.to_dict(), "first_tokens": first_of_value.to_dict()})


def _logits_before(answer: AnswerTokens, session: Session) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each token but the first, with the logits [V] that predict it."""
    for number in range(1, len(answer.ids)):
        yield number, session.feed(answer.ids[number - 1])


@dataclass
class _Kept:
    """Counts of tokens, of those that the full cache ranks first, and of those kept among them."""

    tokens: int = 0
    full_right: int = 0
    kept: int = 0

    def count(self, full_right: bool, right: bool) -> None:
        self.tokens += 1
        self.full_right += full_right
        self.kept += full_right and right

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "full_right": self.full_right, "kept": self.kept}
