"""Small tasks and methods whose calls are counted, and a model to run them on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from specache.config import Policy
from specache.errors import MethodUnavailableError
from specache.eval.methods.base import Method
from specache.eval.methods.specache import SpeCacheMethod
from specache.eval.methods_option import NamedMethod
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel
from tests.tiny import llama

calls: Counter[tuple[str, str]] = Counter()  # (what, item) -> how often


def tiny_task_model() -> TaskModel:
    return TaskModel(llama(), None, "tiny")


@dataclass(frozen=True)
class Divergence:
    """KL per token along fixed tokens, in two groups. `shared` items have a common prefix."""

    name: ClassVar[str] = "divergence"
    summary: ClassVar[str] = "divergence along random tokens"
    unit: ClassVar[str] = "KL, nats"
    items_per_group: int = field(default=2, metadata={"help": "items in each group"})
    length: int = field(default=420, metadata={"help": "prompt tokens"})
    shared: int = 100
    tokens: int = 4
    names: tuple[str, ...] = field(default=("text", "answer"), metadata={"help": "groups"})

    def settings(self) -> dict[str, Any]:
        return {**self.__dict__, "names": list(self.names)}

    def items(self, model: TaskModel) -> Iterator[Item]:
        for group in self.names:
            beginning = _tokens(self.shared, seed=len(group))
            for number in range(self.items_per_group):
                prompt = beginning + _tokens(self.length - self.shared, seed=number + 10)
                yield Item(f"{group}/{number}", group, prompt, self.shared, {"number": number})

    def prepare(self, model: TaskModel, item: Item, prompt: Any) -> Prepared:
        calls["prepare", item.id] += 1
        assert prompt.token_ids == item.prompt
        ids = torch.tensor([item.prompt + _tokens(self.tokens, seed=99)])
        logits = model.model(ids, use_cache=False).logits[0, -self.tokens :].float()
        return Prepared(item, prompt, logits.log_softmax(-1))

    def measure(self, model: TaskModel, prepared: Prepared, session: Any) -> Measurement:
        calls["measure", prepared.item.id] += 1
        values, top1 = [], []
        for token, expected in zip(_tokens(self.tokens, seed=99), prepared.reference, strict=True):
            logp = session.feed(token).log_softmax(-1)
            values.append(max(0.0, float((expected.exp() * (expected - logp)).sum())))
            top1.append(float(logp.argmax() == expected.argmax()))
        return Measurement(values, {"top1": top1, "nll": [2.0] * self.tokens}, {"said": "nothing"})


@dataclass(frozen=True)
class AnswerScores:
    """A score per item, determined by the item and by whether the method is the full cache."""

    name: ClassVar[str] = "answers"
    summary: ClassVar[str] = "right or wrong"
    unit: ClassVar[str] = "score"
    count: int = field(default=4, metadata={"help": "how many"})
    seed: int = field(default=0, metadata={"help": "which"})
    easy: bool = field(default=False, metadata={"help": "all right"})

    def settings(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def items(self, model: TaskModel) -> Iterator[Item]:
        for number in range(self.count):
            yield Item(f"answer/{number}", "answers", _tokens(140, seed=number))

    def prepare(self, model: TaskModel, item: Item, prompt: Any) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Any) -> Measurement:
        session.feed(5)
        full = session.cache.config.policy is Policy.FULL
        number = int(prepared.item.id.split("/")[1])
        return Measurement([1.0 if self.easy or number % 2 == 0 or (full and number % 4 == 1) else 0.0])


@dataclass(frozen=True)
class MissingMethod(Method):
    """A method whose library is not installed."""

    name: ClassVar[str] = "missing"
    summary: ClassVar[str] = "cannot run"
    needs_all_queries: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        return {}

    def start(self, prompt: Any) -> Any:
        raise MethodUnavailableError("the library 'nowhere' is not installed")


@dataclass
class Failing:
    """A method that stops the run after `healthy` sessions, with an error or as Ctrl-C does."""

    error: BaseException
    healthy: int
    name: ClassVar[str] = "specache"
    needs_all_queries: ClassVar[bool] = False
    started: int = 0

    def settings(self) -> dict[str, Any]:
        return SpeCacheMethod().settings()

    def start(self, prompt: Any) -> Any:
        self.started += 1
        if self.started > self.healthy:
            raise self.error
        return SpeCacheMethod().start(prompt)


def failing(error: BaseException, healthy: int) -> NamedMethod:
    return NamedMethod("specache", Failing(error, healthy))


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
