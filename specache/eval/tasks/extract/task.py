"""The task `extract`: all records of a long document as a JSON list.

The form is that of Text2JSON (*KV Cache Offloading for Context-Intensive Tasks*, arXiv 2604.08426),
whose answers need many places of the context at once. Documents are generated here, or read from a
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from specache.errors import ConfigError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.answer_task import room_for
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.extract.answers import ANSWER_PREFIX, write_answer
from specache.eval.tasks.extract.draft import Draft
from specache.eval.tasks.extract.folder import FieldNames, FileRecord, read_folder
from specache.eval.tasks.extract.list_scores import field_scores, intersection_over_union, parse_items
from specache.eval.tasks.extract.prompt import Examples, ask_about
from specache.eval.tasks.extract.schemas import SCHEMAS
from specache.eval.tasks.fitting import largest_that_fits
from specache.eval.tasks.forced_answer import FORCED_UNIT, ForcedAnswer, measure_forced, prepare_forced
from specache.eval.tasks.texts import check_at_least, check_distinct, check_length, encode_prompt, json_settings

_TOKENS_OF_A_SENTENCE = 20  # about, and more than most have


@dataclass(frozen=True)
class Extract:
    """Extract all records of a document: write them, or be forced along the right list.

    Raises:
        ConfigError: an option is out of range.
    """

    name: ClassVar[str] = "extract"
    summary: ClassVar[str] = "structured extraction: tens of records scattered in prose, as JSON (the form of Text2JSON)"
    forced: bool = field(
        default=False,
        metadata={
            "help": "Feed the right list, and compare each token of its values with the full cache (for models too small to "
            "write it). Otherwise the written list is scored by intersection over union."
        },
    )
    schemas: tuple[str, ...] = field(default=tuple(SCHEMAS), metadata={"help": "Kinds of documents, taken in turn."})
    lengths: tuple[int, ...] = field(default=(2000, 4000), metadata={"help": "Prompt and answer together, in tokens."})
    documents: int = field(default=4, metadata={"help": "Documents per length; with --folder: of each file (0: all)."})
    values_per_1000: float = field(
        default=20.0, metadata={"help": "Values in the answer, per 1,000 tokens of the length without the worked examples."}
    )
    most_items: int = field(default=60, metadata={"help": "The most records in a document."})
    corrected: float = field(default=0.15, metadata={"help": "Share of the records of which the text corrects a field later."})
    repeated: float = field(default=0.25, metadata={"help": "Share of the others of which a field is repeated in other words."})
    examples: int = field(default=2, metadata={"help": "Short worked examples in the prompt."})
    folder: Path | None = field(
        default=None,
        metadata={"help": "Read documents from a folder's files (.json, .jsonl, .jsonl.gz) instead."},
    )
    text_field: str = field(default="text", metadata={"help": "In files: the document."})
    question_field: str = field(default="question", metadata={"help": "In files: the instruction or schema."})
    answer_field: str = field(default="answer", metadata={"help": "In files: the list of objects, also as JSON text."})
    most_tokens: int = field(
        default=0, metadata={"help": "With --folder: leave out documents that need more tokens with their answer (0: none)."}
    )
    chat: bool = field(default=True, metadata={"help": "Ask as a user's message, if the model has a chat template."})
    seed: int = field(default=0, metadata={"help": "Decides records, sentences and places."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lengths", "most_items")
        check_at_least(self, 0, "documents", "examples", "most_tokens")
        check_distinct(self, "schemas", "lengths")
        unknown = [name for name in self.schemas if name not in SCHEMAS]
        if unknown or not self.schemas:
            raise ConfigError(f"--schemas must be of {', '.join(SCHEMAS)}, got {', '.join(unknown) or 'none'}.")
        for name in ("corrected", "repeated"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} must be a share from 0 to 1, got {getattr(self, name)}.")
        if not 0 < self.values_per_1000 <= 100:
            raise ConfigError(f"--values-per-1000 must be more than 0 and at most 100, got {self.values_per_1000}.")
        if self.documents == 0 and self.folder is None:
            raise ConfigError("--documents 0 means all of each file: pass --folder, or at least one document.")

    @property
    def unit(self) -> str:
        """Return the unit of the values: a score, or a divergence per token."""
        return FORCED_UNIT if self.forced else "score"

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        yield from self._generated(model) if self.folder is None else self._from_files(model, self.folder)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        if not self.forced:
            return Prepared(item, prompt)
        return Prepared(item, prompt, prepare_forced(_right_answer(model, item.facts["references"]), prompt))

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        if self.forced:
            return measure_forced(prepared.reference, session)
        facts, tokenizer = prepared.item.facts, model.tokenizer
        tokens = greedy(
            prepared.prompt.logits,
            session,
            facts["max_new_tokens"],
            model.end_ids(chat=self.chat),
            finished=lambda tokens: "]" in tokenizer.decode(tokens[-1:]) and _is_complete(tokenizer.decode(tokens)),
        )
        prediction = ANSWER_PREFIX + model.answer_text(tokens, prepared.item.prompt, chat=self.chat)
        found = parse_items(prediction)
        details = {"prediction": prediction, "by_field": field_scores(found, facts["references"], facts["key"])}
        return Measurement([intersection_over_union(found, facts["references"])], details=details)

    def _generated(self, model: TaskModel) -> Iterator[Item]:
        for length in self.lengths:
            check_length(length, model.max_positions, f"extraction at length {length:,}")
            for number in range(self.documents):
                yield self._generated_item(model, length, number)

    def _generated_item(self, model: TaskModel, length: int, number: int) -> Item:
        schema = SCHEMAS[self.schemas[number % len(self.schemas)]]
        examples = Examples(schema, self.examples, self.seed)
        rng = Random(f"extract {self.seed} {schema.name} {length} {number}")
        left = length - len(self._encode(model, examples.ask("")))
        count = max(1, min(self.most_items, round(left / 1000 * self.values_per_1000 / len(schema.fields))))
        draft = Draft(schema, rng, count, corrected=self.corrected, repeated=self.repeated, without=examples.keys)
        room = room_for(len(_right_answer(model, draft.records).tokens))

        def tokens(fillers: int) -> int:
            return len(self._encode(model, examples.ask(draft.text(fillers)))) + room

        fillers = largest_that_fits(tokens, length, smallest=0, first=length // _TOKENS_OF_A_SENTENCE)
        if fillers is None:
            raise ConfigError(
                f"--lengths: {count} {schema.things} need {tokens(0):,} tokens with {self.examples} examples, "
                f"got {length:,}. Pass fewer --values-per-1000 or --examples, or a longer length."
            )
        document = draft.text(fillers)
        prompt = self._encode(model, examples.ask(document))
        corrected = [[one.key, one.field, one.old, one.new] for one in draft.corrections]
        facts = {"schema": schema.name, "key": schema.key, "corrected": corrected, "references": draft.records}
        group = f"{self.name}/{length}"
        return Item(f"{length}/{number}", group, prompt, facts={**facts, "length": len(prompt), "max_new_tokens": room})

    def _from_files(self, model: TaskModel, folder: Path) -> Iterator[Item]:
        names = FieldNames(self.text_field, self.question_field, self.answer_field)
        for record in read_folder(folder, names, self.documents):
            item = self._file_item(model, record)
            needed = len(item.prompt) + item.facts["max_new_tokens"]
            if self.most_tokens and needed > self.most_tokens:
                continue
            check_length(needed, model.max_positions, f"{record.where} (--most-tokens leaves out longer ones)")
            yield item

    def _file_item(self, model: TaskModel, record: FileRecord) -> Item:
        prompt = self._encode(model, ask_about(record.question, record.text))
        facts = {"key": record.key, "references": record.references, "length": len(prompt)}
        facts["max_new_tokens"] = room_for(len(_right_answer(model, record.references).tokens))
        return Item(record.name, f"{self.name}/files", prompt, facts=facts)

    def _encode(self, model: TaskModel, text: str) -> list[int]:
        return encode_prompt(model.template, text, chat=self.chat, answer_prefix=ANSWER_PREFIX)


def _right_answer(model: TaskModel, records: list[dict[str, Any]]) -> ForcedAnswer:
    answer = write_answer(records)
    return ForcedAnswer.encode(model.tokenizer, answer.text, answer.values)


def _is_complete(text: str) -> bool:
    """Return whether the list that `ANSWER_PREFIX` begins has ended."""
    try:
        json.JSONDecoder().raw_decode(ANSWER_PREFIX + text)
    except (ValueError, RecursionError):
        return False
    return True
