"""The forced answer: feed the right answer token by token, and judge the distribution after each.

A model that is too small to write a long answer by itself can still be measured along the right
one. Each method is fed the same tokens and compared with the full cache before every token of the
answer's values (names, figures): by the divergence, and by whether it ranks the right token first
where the full cache does. Keys and punctuation do not count: they can be told without the context.

The distribution before the first token comes from the exact prefill, which all methods share, so
that token does not count either. An answer should begin with a few words before its first value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from specache.errors import TaskDataError
from specache.eval.methods.base import Session
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.divergence import divergence

FORCED_UNIT = "KL, nats"  # the unit of a task's values with forced answers
KEPT_TOKENS = 2048  # likeliest tokens whose log-probability under the full cache is kept, per position

Span = tuple[int, int]  # of characters: begin, end


@dataclass(frozen=True)
class ForcedAnswer:
    """The tokens of a right answer.

    Attributes:
        tokens: the `n` token ids that are fed.
        counted: whether each token belongs to a value and has one before it, `n` flags, at least
            one of them set.
    """

    tokens: list[int]
    counted: list[bool]

    @property
    def begins_value(self) -> list[bool]:
        """Return, for each token that counts, whether the token before it does not."""
        return [not before for before, counts in pairwise(self.counted) if counts]

    @property
    def last_counted(self) -> int:
        """Return the place of the last token that counts; those before it are fed."""
        return max(place for place, counts in enumerate(self.counted) if counts)

    @classmethod
    def encode(cls, tokenizer: Any, text: str, spans: Sequence[Span]) -> ForcedAnswer:
        """Tokenise an answer. A token counts if at least one of its characters is in a value.

        A tokenizer without offsets tokenises the text between the ends of values piece by piece.

        Args:
            spans: the characters of each value in the text, in order.

        Raises:
            TaskDataError: no token counts.
        """
        if getattr(tokenizer, "is_fast", False):
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = list(encoding["input_ids"])
            counted = [_overlaps(begin, end, spans) for begin, end in encoding["offset_mapping"]]
        else:
            tokens, counted = [], []
            for piece, is_value in _pieces(text, spans):
                ids = list(tokenizer(piece, add_special_tokens=False)["input_ids"])
                tokens += ids
                counted += [is_value] * len(ids)
        counted[:1] = [False]
        if not any(counted):
            raise TaskDataError(f"the answer {text!r} cannot be forced: no token of a value comes after its first token.")
        return cls(tokens, counted)


@dataclass(frozen=True)
class ForcedReference:
    """The full cache's distributions before the `m` tokens of an answer that count.

    Attributes:
        answer: the answer.
        token_ids: int64 [m, K], the likeliest `K` tokens, best first.
        log_probs: float32 [m, K], theirs.
        rest: float32 [m], log-probability of all other tokens together; -inf if there are none.
        nll: float32 [m], negative log-likelihood of the answer's tokens, in nats.
    """

    answer: ForcedAnswer
    token_ids: Tensor
    log_probs: Tensor
    rest: Tensor
    nll: Tensor


def join_parts(parts: Sequence[tuple[str, bool]]) -> tuple[str, list[Span]]:
    """Join the parts of an answer.

    Args:
        parts: texts, each with whether it is a value.

    Returns:
        The text, and the characters of each value in it.
    """
    text, spans = "", []
    for part, is_value in parts:
        if is_value:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def prepare_forced(answer: ForcedAnswer, prompt: Prefilled) -> ForcedReference:
    """Feed the answer to the full cache, and keep its distributions before the tokens that count.

    Called under `no_grad`, with the model attached, as `Task.prepare`. Only the likeliest tokens of
    each position are kept: a whole distribution of 262,144 tokens would take 1 MB.

    In float32 the answer is read in chunks, as a prompt is: ten times as fast as token by token,
    and the same but for the last bits. In 16 bits those would be seen in the divergence.
    """
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def keep(place: int, logits: Tensor) -> None:
        """Keep the distribution after `answer.tokens[place]` if the next token counts."""
        if answer.counted[place + 1]:
            log_probs = logits.log_softmax(-1)
            best = log_probs.topk(min(KEPT_TOKENS, len(log_probs)))
            rows.append((best.indices, best.values, _rest(log_probs, best.indices), -log_probs[answer.tokens[place + 1]]))

    fed = answer.tokens[: answer.last_counted]
    if prompt.reads_on_in_chunks:

        def keep_all(first: int, logits: Tensor) -> None:
            for place, row in enumerate(logits, first):
                keep(place, row)

        prompt.read_on(fed, keep_all)
    else:
        session = FullMethod().start(prompt)
        try:
            for place, token in enumerate(fed):
                keep(place, session.feed(token))
        finally:
            session.close()
    return ForcedReference(answer, *(torch.stack(column) for column in zip(*rows, strict=True)))


def measure_forced(reference: ForcedReference, session: Session) -> Measurement:
    """Feed the answer to a method's session, and compare it with the full cache.

    Returns:
        Values: the Kullback-Leibler divergence from the full cache before each token that counts,
        in nats, with all but the likeliest `K` tokens taken as one outcome (never more than the
        divergence over all tokens). Per token: `nll` in nats, `nll_delta` (less the full cache's),
        and 1 or 0 for `top1` (the likeliest token is the full cache's), `right` and `full_right`
        (the method and the full cache rank the answer's token first). `details` counts, among the
        first tokens of values, those that the full cache and those that both rank first: the rest
        of a value is easier once its beginning is known.
    """
    divergences: list[float] = []
    tokens: dict[str, list[float]] = {name: [] for name in ("top1", "nll", "nll_delta", "right", "full_right")}
    first_tokens = {"tokens": 0, "full_right": 0, "kept": 0}
    begins = reference.answer.begins_value
    for row, (target, actual) in enumerate(_before_counted(reference.answer, session)):
        best, expected = int(actual.argmax()), int(reference.token_ids[row, 0])
        divergences.append(_divergence(reference, row, actual))
        tokens["top1"].append(float(best == expected))
        tokens["nll"].append(-float(actual[target]))
        tokens["nll_delta"].append(-float(actual[target]) - float(reference.nll[row]))
        tokens["right"].append(float(best == target))
        tokens["full_right"].append(float(expected == target))
        if begins[row]:
            first_tokens["tokens"] += 1
            first_tokens["full_right"] += expected == target
            first_tokens["kept"] += expected == target == best
    return Measurement(divergences, tokens, {"first_tokens": first_tokens})


def _before_counted(answer: ForcedAnswer, session: Session) -> Iterator[tuple[int, Tensor]]:
    """Feed the answer -> each token that counts, with the log-probabilities [V] before it."""
    for place in range(1, answer.last_counted + 1):
        logits = session.feed(answer.tokens[place - 1])
        if answer.counted[place]:
            yield answer.tokens[place], logits.log_softmax(-1)


def _divergence(reference: ForcedReference, row: int, actual: Tensor) -> float:
    ids, expected, rest = (column[row] for column in (reference.token_ids, reference.log_probs, reference.rest))
    others = float(rest.exp() * (rest - _rest(actual, ids))) if rest > -torch.inf else 0.0
    return divergence(expected, actual[ids], rest=others)


def _rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability [] of all tokens but `ids` together."""
    return log_probs.index_fill(0, ids, -torch.inf).logsumexp(-1)


def _overlaps(begin: int, end: int, spans: Sequence[Span]) -> bool:
    return any(begin < last and first < end for first, last in spans)


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    """Cut the text at the ends of its values -> the pieces, each with whether it is a value."""
    pieces, place = [], 0
    for begin, end in spans:
        pieces += [(text[place:begin], False), (text[begin:end], True)]
        place = end
    return [(piece, is_value) for piece, is_value in [*pieces, (text[place:], False)] if piece]
