"""`perplexity`: the paper's PG19 setting. The end of a long text is decoded over the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel
from specache.eval.tasks.documents import CHARACTERS_PER_TOKEN, excerpts
from specache.eval.tasks.texts import check_at_least, check_length, json_settings

PAPER_TOKENS = 8196  # the paper's length of a PG19 excerpt
PG19 = "emozilla/pg19-test"  # the data set's test books, one text per row


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of the last tokens of long texts."""

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity of the end of long texts (the paper's PG19 setting)"
    unit: ClassVar[str] = "NLL, nats"
    text: tuple[Path, ...] = field(default=(), metadata={"help": "Text files to read from. Default: Python's own documentation."})
    pg19: bool = field(default=False, metadata={"help": "Read books of the PG19 test set from the hub (needs 'datasets')."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens of each text. Default: 8196, or the model's positions if fewer."}
    )
    new: int = field(default=256, metadata={"help": "Tokens at the end that are decoded; those before them are prefilled."})
    documents: int = field(default=4, metadata={"help": "Number of texts."})
    seed: int = field(default=0, metadata={"help": "Moves where the excerpts begin."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "new", "documents")
        if self.length and self.length < self.new + 1:
            raise ConfigError(f"--length must be more than --new ({self.new}), got {self.length}.")
        if self.pg19 and self.text:
            raise ConfigError("--pg19 and --text contradict each other: pass one of them.")

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        length = self.length or min(PAPER_TOKENS, model.max_positions or PAPER_TOKENS)
        check_length(length, model.max_positions, f"a text of {length:,} tokens")
        for number, (name, text) in enumerate(self._texts(model.tokenizer, length)):
            ids = list(model.tokenizer(text)["input_ids"])[:length]
            if len(ids) < length:
                raise TaskDataError(f"{name} has only {len(ids):,} tokens; {length:,} are needed. Pass a longer text.")
            facts = {"document": name, "following": ids[length - self.new :]}
            yield Item(f"text/{number}", self.name, ids[: length - self.new], 0, facts)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        logits, nll = prepared.prompt.logits, []
        following = prepared.item.facts["following"]
        for i, token in enumerate(following):
            nll.append(-float(logits.log_softmax(-1)[token]))
            if i + 1 < len(following):
                logits = session.feed(token)
        return Measurement(nll, {"nll": nll})

    def _texts(self, tokenizer: Any, length: int) -> Iterator[tuple[str, str]]:
        if self.pg19:
            yield from _pg19_books(self.documents, length)
            return
        for excerpt in excerpts(tokenizer, self.text, [length + 8] * self.documents, 8, self.seed):
            yield excerpt.name, excerpt.document


def _pg19_books(count: int, length: int) -> Iterator[tuple[str, str]]:
    """Yield the first `count` test books that are long enough."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise TaskDataError("--pg19 reads the data set with 'datasets': pip install datasets. Or pass --text FILE.") from None
    try:
        rows = iter(load_dataset(PG19, split="test", streaming=True))
        found = 0
        for number, row in enumerate(rows):
            if found < count and len(row["text"]) > length * CHARACTERS_PER_TOKEN:
                found += 1
                yield f"PG19 test book {number}", row["text"][: length * CHARACTERS_PER_TOKEN]
            if found == count:
                return
    except (OSError, ValueError) as error:
        raise TaskDataError(f"cannot read {PG19} from the hub: {error}. Pass --text FILE to use a local text.") from error
