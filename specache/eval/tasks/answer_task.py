"""The common part of tasks whose answers have many values: write the answer, or be forced along it.

A subclass generates documents of any size and scores a written answer. Prompts fill the lengths
that were asked for, and are the same for written and for forced answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from specache.errors import ConfigError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.fitting import largest_that_fits
from specache.eval.tasks.forced_answer import FORCED_UNIT, ForcedAnswer, join_parts, measure_forced, prepare_forced
from specache.eval.tasks.texts import check_at_least, check_distinct, check_length, encode_prompt, json_settings, shared_prefix

SCORE_UNIT = "score"
_SURPLUS = 0.1  # part of the right answer's tokens that a written one may have in addition
_SURPLUS_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A question over a document, with the right answer.

    Attributes:
        text: the user's message: document first, question last.
        answer: the parts of the right answer, each with whether it is a value. The first part
            begins the answer for the model and is no value, so that no value comes from the
            prefill, which all methods share.
        facts: what the task needs to score it. JSON-ready.
    """

    text: str
    answer: list[tuple[str, bool]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def answer_text(self) -> str:
        """Return the whole right answer."""
        return "".join(text for text, _ in self.answer)


@dataclass(frozen=True)
class Generated:
    """A document of any size, and the questions over it.

    Attributes:
        id: unique in the task.
        group: the items that are averaged together.
        make: size -> the questions over a document of that size. Equal sizes give equal questions.
        smallest: the smallest size.
        first: the size that is tried first.
    """

    id: str
    group: str
    make: Callable[[int], list[Question]]
    smallest: int = 1
    first: int = 20


@dataclass(frozen=True)
class AnswerTask(ABC):
    """A task whose right answers are known, with its options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    lengths: tuple[int, ...] = field(default=(2000, 4000), metadata={"help": "Prompt and answer together, in tokens."})
    documents: int = field(default=4, metadata={"help": "Documents per length (and kind, if there are several)."})
    forced: bool = field(
        default=False,
        metadata={
            "help": "Feed the right answer, and compare each token of its values with the full cache (for models too small to "
            "write it)."
        },
    )
    chat: bool = field(default=True, metadata={"help": "Ask as a user's message, if the model has a chat template."})
    seed: int = field(default=0, metadata={"help": "Decides documents and questions."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lengths", "documents")
        check_distinct(self, "lengths")

    @property
    def unit(self) -> str:
        """Return the unit of the values: scores, or divergences per token of forced answers."""
        return FORCED_UNIT if self.forced else SCORE_UNIT

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    @abstractmethod
    def generated(self, length: int) -> Iterator[Generated]:
        """Yield the documents of one length."""

    @abstractmethod
    def score(self, prediction: str, facts: dict[str, Any]) -> Measurement:
        """Score a written answer.

        Args:
            prediction: the answer after its given beginning.
        """

    @abstractmethod
    def is_complete(self, prediction: str, facts: dict[str, Any]) -> bool:
        """Return whether what follows can no longer change the score."""

    def items(self, model: TaskModel) -> Iterator[Item]:
        """Yield the items of each length.

        Raises:
            ConfigError: a length exceeds the model's positions, or is too short for a document.
        """
        for length in self.lengths:
            check_length(length, model.max_positions, f"{self.name} at length {length:,}")
            first: dict[str, int] = {}
            for document in self.generated(length):
                size = first.get(document.group, document.first)
                first[document.group], filled = self._fill(model, document, length, size)
                shared = shared_prefix([prompt for _, prompt, _ in filled])
                for number, (question, prompt, room) in enumerate(filled):
                    facts = {"length": len(prompt), "answer": question.answer, "max_new_tokens": room, **question.facts}
                    name = f"{document.id}/{number}" if len(filled) > 1 else document.id
                    yield Item(name, document.group, prompt, shared, facts)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        if not self.forced:
            return Prepared(item, prompt)
        answer = ForcedAnswer.encode(model.tokenizer, *join_parts(item.facts["answer"]))
        return Prepared(item, prompt, prepare_forced(answer, prompt))

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        if self.forced:
            return measure_forced(prepared.reference, session)
        facts, logits = prepared.item.facts, prepared.prompt.logits
        beginning = _token_ids(model, facts["answer"][0][0])
        for token in beginning:
            logits = session.feed(token)
        prompt = [*prepared.item.prompt, *beginning]

        def text(tokens: list[int]) -> str:
            return model.answer_text(tokens, prompt, chat=self.chat)

        tokens = greedy(
            logits,
            session,
            facts["max_new_tokens"],
            model.end_ids(chat=self.chat),
            finished=lambda tokens: self.is_complete(text(tokens), facts),
        )
        return self.score(text(tokens), facts)

    def _fill(
        self, model: TaskModel, document: Generated, length: int, first: int
    ) -> tuple[int, list[tuple[Question, list[int], int]]]:
        """Return the size that fills `length` tokens, and each question, its prompt and room."""
        made: dict[int, list[tuple[Question, list[int], int]]] = {}

        def tokens(size: int) -> int:
            questions = document.make(size)
            made[size] = [(question, self._encode(model, question.text), _room(model, question)) for question in questions]
            return max(len(prompt) + room for _, prompt, room in made[size])

        size = largest_that_fits(tokens, length, smallest=document.smallest, first=first)
        if size is None:
            least = max(len(prompt) + room for _, prompt, room in made[document.smallest])
            raise ConfigError(f"--lengths: {document.group} needs at least {least:,} tokens, got {length:,}.")
        return size, made[size]

    def _encode(self, model: TaskModel, text: str) -> list[int]:
        if self.chat and model.template.exists:
            return encode_prompt(model.template, text, chat=True)
        return encode_prompt(model.template, f"{text}\n\n", chat=False)


def room_for(tokens: int) -> int:
    """Return the most tokens of a written answer: a little more than the right one has."""
    return tokens + int(tokens * _SURPLUS) + _SURPLUS_TOKENS


def _room(model: TaskModel, question: Question) -> int:
    return room_for(len(_token_ids(model, question.answer_text)))


def _token_ids(model: TaskModel, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
