"""The interface of a task: its items, and how one method's session over an item is measured.

A task is a small frozen dataclass whose fields are its options. Items are deterministic for given
options, seed and tokenizer. An item's prompt is prefilled once, and every method starts from it.
Consecutive items that share `shared` leading tokens also share the prefill of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.model.positions import max_positions
from specache.templates.channels import Part, channel_parser
from specache.templates.end_tokens import end_tokens
from specache.templates.template import ChatTemplate


@dataclass(frozen=True)
class TaskModel:
    """The model under evaluation, with its tokenizer.

    Attributes:
        weights: format of quantised weights, or `None` where they are in the model's dtype.
        variables: for its chat template.
        system: the system message of every question that the chat template writes.
        date: what the chat template writes as today's date; by default when it is first used.
    """

    model: Any
    tokenizer: Any
    name: str
    weights: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    date: datetime | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """Return the chat template, with the date on which the run began."""
        return ChatTemplate(self.tokenizer, self.variables, date=self.date, system=self.system)

    @property
    def max_positions(self) -> int | None:
        """Return the longest sequence that the model was made for, in tokens, or `None`."""
        return max_positions(self.model)

    def end_ids(self, *, chat: bool) -> list[int]:
        """Return the tokens that end an answer.

        With `chat` and a chat template it answers a message, else it continues a text.
        """
        return end_tokens(self.model.generation_config, self.tokenizer, self.template if chat else None)

    def answer_text(self, tokens: list[int], prompt: list[int], *, chat: bool) -> str:
        """Return the text of an answer's tokens.

        Of a model that reasons in a separate channel, it is the final message only.
        """
        parser = channel_parser(self.tokenizer, prompt) if chat and self.template.exists else None
        if parser is not None:
            pieces = [*(piece for token in tokens for piece in parser.push(token)), *parser.finish()]
            tokens = [token for piece in pieces if piece.part is Part.TEXT for token in piece.token_ids]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        id: unique in the task, the same in every run with the same options; for example
            `niah_single_1/4096/17`.
        group: the items that are averaged together, the row's `task`: `niah_single_1`, or
            `fidelity/answer`.
        prompt: token ids up to where the method takes over.
        shared: leading tokens of the prompt that neighbouring items also have (one document,
            several questions).
        facts: what the task needs to measure it: references, depth, length. JSON-ready.
    """

    id: str
    group: str
    prompt: list[int]
    shared: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The values of one item under one method.

    Attributes:
        values: what is averaged: one score in [0, 1] for an answer or for each of its parts, one
            divergence per token for a distribution.
        tokens: further values per token, as many as `values`, or none: `top1` (0 or 1), `nll`
            (nats), `nll_delta`, `right` and `full_right` (see `forced_answer`).
        details: for a reader of the results: the prediction, the references. JSON-ready.
    """

    values: list[float]
    tokens: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """An item with its prefilled prompt and, for tasks that compare, the full cache's output."""

    item: Item
    prompt: Prefilled
    reference: Any = None


class Task(Protocol):
    """A task of the suite."""

    name: ClassVar[str]  # in the catalogue and on the command line
    summary: ClassVar[str]  # one line for `specache eval list`
    unit: ClassVar[str]  # of `mean`: "score" (higher is better) or "KL, nats" (lower is better) or "NLL, nats"

    def settings(self) -> dict[str, Any]:
        """Return the options, JSON-ready. With the model and the methods they identify a run."""

    def items(self, model: TaskModel) -> Iterator[Item]:
        """Yield all items, in order.

        Raises:
            TaskDataError: a file of the task is missing or malformed. The message names file and
                line.
        """

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        """Compute once per item what all methods need.

        Called under `no_grad`, with the model attached.
        """

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        """Measure one method.

        Called under `no_grad`, with the model attached. The caller closes the session.
        """


def greedy(
    first: Tensor,
    session: Session,
    max_new_tokens: int,
    end_ids: list[int],
    finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[int]:
    """Decode greedily -> the tokens, without the end token.

    Args:
        first: logits [V] after the prompt (`Prefilled.logits`).
        finished: returns whether more tokens can no longer change the score.
    """
    tokens: list[int] = []
    logits = first
    while len(tokens) < max_new_tokens:
        token = int(logits.argmax())
        if token in end_ids:
            break
        tokens.append(token)
        if finished(tokens):
            break
        if len(tokens) < max_new_tokens:
            logits = session.feed(token)
    return tokens
