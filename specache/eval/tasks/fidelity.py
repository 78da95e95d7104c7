"""`fidelity`: the divergence of a method's distribution from the full cache's, token by token.

An average perplexity hides a distorted distribution. Mean and tail of the Kullback-Leibler
divergence show it. The method is teacher-forced along a given text and along the full cache's own
greedy answer: answers of small models repeat themselves and flatter every method, texts do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specache.errors import ConfigError
from specache.eval.methods.base import Session
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel
from specache.eval.tasks.divergence import divergence
from specache.eval.tasks.documents import excerpts, prompts_around
from specache.eval.tasks.texts import check_at_least, check_length, json_settings, shared_prefix

TEXT, ANSWER = "text", "answer"


@dataclass(frozen=True)
class Reference:
    """The full cache's distributions along a continuation.

    Attributes:
        inputs: the `n` tokens that are fed.
        targets: the token after each of them.
        log_probs: float32 [n, V] after each of them.
    """

    inputs: list[int]
    targets: list[int]
    log_probs: Tensor


@dataclass(frozen=True)
class Fidelity:
    """Divergence from the full 16-bit cache, along a text and along its own answer."""

    name: ClassVar[str] = "fidelity"
    summary: ClassVar[str] = "KL divergence, top-1 agreement and perplexity against the full cache, token by token"
    unit: ClassVar[str] = "KL, nats"
    text: tuple[Path, ...] = field(default=(), metadata={"help": "Text files to read from. Default: Python's own documentation."})
    lengths: tuple[int, ...] = field(
        default=(4000, 5000, 6000, 7500), metadata={"help": "Tokens of each document; one document per number."}
    )
    new: int = field(default=128, metadata={"help": "Tokens that are compared per document and kind of continuation."})
    along: tuple[str, ...] = field(
        default=(TEXT, ANSWER),
        metadata={"help": "Continuations: 'text' (what follows in the document), 'answer' (the full cache's greedy answer)."},
    )
    question: str = field(
        default="Summarize the text above in a few paragraphs.", metadata={"help": "What the answer is asked to be."}
    )
    chat: bool = field(default=True, metadata={"help": "Write the document as a user's message, if the model has a chat template."})
    seed: int = field(default=0, metadata={"help": "Moves where the excerpts begin."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lengths", "new")
        unknown = set(self.along) - {TEXT, ANSWER}
        if unknown or not self.along:
            raise ConfigError(f"--along takes {TEXT} and {ANSWER}, got {', '.join(sorted(unknown)) or 'nothing'}.")

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        documents = excerpts(model.tokenizer, self.text, self.lengths, self.new + 1, self.seed)
        for number, (excerpt, length) in enumerate(zip(documents, self.lengths, strict=True)):
            head, whole = prompts_around(model.template, excerpt.document, self.question, self.chat)
            prompts = {TEXT: head, ANSWER: whole}
            prompts = {kind: prompts[kind] for kind in (TEXT, ANSWER) if kind in self.along}
            shared = shared_prefix(list(prompts.values()))
            for kind, prompt in prompts.items():
                check_length(len(prompt) + self.new, model.max_positions, f"a document of {length:,} tokens")
                facts = {"document": excerpt.name, "tokens": len(prompt)}
                if kind == TEXT:
                    facts["following"] = excerpt.following
                yield Item(f"{kind}/{number}", f"{self.name}/{kind}", prompt, shared, facts)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        given = None
        if "following" in item.facts:
            given = model.tokenizer(item.facts["following"], add_special_tokens=False)["input_ids"][: self.new + 1]
        session = FullMethod().start(prompt)
        try:
            reference = self._along(prompt.logits, session, given, model.end_ids(chat=self.chat))
        finally:
            session.close()
        return Prepared(item, prompt, reference)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        reference: Reference = prepared.reference
        divergences, same, nll = [], [], []
        for i, token in enumerate(reference.inputs):
            expected, actual = reference.log_probs[i], session.feed(token).log_softmax(-1)
            divergences.append(divergence(expected, actual))
            same.append(float(expected.argmax() == actual.argmax()))
            nll.append(-float(actual[reference.targets[i]]))
        return Measurement(divergences, {"top1": same, "nll": nll})

    def _along(self, first: Tensor, session: Session, given: list[int] | None, end_ids: list[int]) -> Reference:
        """Follow a given text, or the greedy answer, in which end tokens are not allowed."""
        tokens: list[int] = []
        rows: list[Tensor] = []
        logits = first
        count = self.new if given is None else min(self.new, len(given) - 1)
        for i in range(count + 1):
            tokens.append(given[i] if given is not None else _greedy_token(logits, end_ids))
            if i < count:
                logits = session.feed(tokens[-1])
                rows.append(logits.log_softmax(-1))
        return Reference(tokens[:-1], tokens[1:], torch.stack(rows))


def _greedy_token(logits: Tensor, end_ids: list[int]) -> int:
    logits = logits.clone()
    logits[end_ids] = -torch.inf
    return int(logits.argmax())
