"""What the suite asks of a task: items, and how one method's session over one item is measured.

A task is a small frozen dataclass whose fields are its options. Items are deterministic for given options, seed and tokenizer. An
item's prompt is prefilled once and every method starts from it; items that follow each other and share `shared` leading tokens
share the prefill of those too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    """The model under evaluation, for tasks that need its tokenizer or its answers.

    Attributes:
        weights: what its weights are quantised to; `None` where they are in its dtype.
        variables: for its chat template.
        system: the system message of every question that the chat template writes.
    """

    model: Any
    tokenizer: Any
    name: str
    weights: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    system: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """Its chat template, with the date of the run's beginning."""
        return ChatTemplate(self.tokenizer, self.variables, system=self.system)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model was made for, in tokens; `None` where there is no such length."""
        return max_positions(self.model)

    def end_ids(self, *, chat: bool) -> list[int]:
        """Tokens that end an answer: to a message if `chat` and there is a chat template, else to a text as it is."""
        return end_tokens(self.model.generation_config, self.tokenizer, self.template if chat else None)

    def answer_text(self, tokens: list[int], prompt: list[int], *, chat: bool) -> str:
        """The text of an answer's tokens; of models that reason in a channel of its own, the final message."""
        parser = channel_parser(self.tokenizer, prompt) if chat and self.template.exists else None
        if parser is not None:
            pieces = [*(piece for token in tokens for piece in parser.push(token)), *parser.finish()]
            tokens = [token for piece in pieces if piece.part is Part.TEXT for token in piece.token_ids]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        id: unique in the task, the same in every run with the same options; for example `niah_single_1/4096/17`.
        group: what its value is averaged with, the row's `task`: `niah_single_1`, or `fidelity/answer`.
        prompt: token ids up to where the method takes over.
        shared: leading tokens of the prompt that neighbouring items have too (one document, several questions).
        facts: what the task needs to measure it: references, depth, length. JSON-ready.
    """

    id: str
    group: str
    prompt: list[int]
    shared: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What came out.

    Attributes:
        values: what is averaged: one score in [0, 1] for an answer, one divergence per token for a distribution.
        tokens: further figures per token, as long as `values` or empty: `top1` (0 or 1), `nll` (nats).
        details: for a reader of the results: the prediction, the references. JSON-ready.
    """

    values: list[float]
    tokens: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """An item whose prompt is prefilled, and what the full cache said along it where the task compares with that."""

    item: Item
    prompt: Prefilled
    reference: Any = None


class Task(Protocol):
    """A benchmark."""

    name: ClassVar[str]  # in the registry and on the command line
    summary: ClassVar[str]  # one line for `specache eval list`
    unit: ClassVar[str]  # of `mean`: "score" (higher is better) or "KL, nats" (lower is better) or "NLL, nats"

    def settings(self) -> dict[str, Any]:
        """JSON-ready options; with the model and the methods they identify a run."""

    def items(self, model: TaskModel) -> Iterator[Item]:
        """All items, in order.

        Raises:
            TaskDataError: a file of the task is missing or broken; the message names file and line.
        """

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        """What is computed once per item for all methods. Called under `no_grad`, the model attached."""

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        """One method's figures. Called under `no_grad`, the model attached; the caller closes the session."""


def greedy(
    first: Tensor,
    session: Session,
    max_new_tokens: int,
    end_ids: list[int],
    finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[int]:
    """The greedy continuation, without the end token.

    Args:
        first: logits [V] after the prompt (`Prefilled.logits`).
        finished: whether more tokens can no longer change the score.
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
