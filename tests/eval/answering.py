"""Sessions that answer with a given text, over a tokenizer with one token per byte."""

from __future__ import annotations

from typing import Any

import torch

from specache.eval.methods.base import SessionStats
from specache.eval.tasks.answer_task import AnswerTask
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

TOKENIZER = byte_tokenizer()


def tiny_model(*, chat_template: bool = True) -> TaskModel:
    """Return random weights that end an answer with the tokenizer's end token."""
    tokenizer = byte_tokenizer()
    if not chat_template:
        tokenizer.chat_template = None
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=20_000)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return TaskModel(model, tokenizer, "tiny")


class Recites:
    """A session that writes a text after it was fed the answer's beginning.

    Attributes:
        fed: all tokens that it was fed.
    """

    def __init__(self, beginning: str, text: str) -> None:
        self._beginning = TOKENIZER(beginning)["input_ids"]
        self._text = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
        self.fed: list[int] = []

    def feed(self, token: int) -> torch.Tensor:
        self.fed.append(token)
        place = len(self.fed) - len(self._beginning)
        return torch.nn.functional.one_hot(torch.tensor(self._text[max(place, 0)]), len(TOKENIZER)).float()

    def stats(self) -> SessionStats:
        return SessionStats(1.0)

    def close(self) -> None:
        pass


class NoPrefill:
    """A prefilled prompt of which only the logits are read, and they are of no use."""

    logits = torch.zeros(len(TOKENIZER))


def right_answer(item: Item) -> str:
    """Return the whole right answer of an item."""
    return "".join(text for text, _ in item.facts["answer"])


def beginning(item: Item) -> str:
    """Return what the model is given of the answer."""
    return str(item.facts["answer"][0][0])


def written(model: TaskModel, task: AnswerTask, item: Item, text: str) -> Measurement:
    """Score an answer, its beginning included."""
    assert text.startswith(beginning(item))
    session = Recites(beginning(item), text.removeprefix(beginning(item)))
    prepared: Any = Prepared(item, NoPrefill())  # type: ignore[arg-type]
    measured = task.measure(model, prepared, session)
    assert session.fed[: len(beginning(item))] == TOKENIZER(beginning(item))["input_ids"], "through the method's cache"
    return measured


def prompt_text(item: Item) -> str:
    """Return the user's message of an item."""
    text = str(TOKENIZER.decode(item.prompt))
    return text.removeprefix("<user>").removesuffix("<end><assistant>")
