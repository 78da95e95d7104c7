"""Exact retrieval: key-value pairs ("Lost in the Middle") and lines (LongEval).

Sources: Liu et al. 2023; Li et al. 2023, LongChat. Documents are generated here, or read from the
benchmarks' files. Several questions can be asked about each document.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.texts import (
    check_at_least,
    check_distinct,
    check_length,
    encode_prompt,
    json_settings,
    read_jsonl,
    record_field,
    shared_prefix,
)
from specache.templates.template import ChatTemplate

# The prompts of both benchmarks, word for word: scores depend on them.
KV_PROMPT = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    'JSON data:\n{data}\n\nKey: "{key}"\nCorresponding value:'
)
LINES_BEGINNING = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain "
    "line index. Now the record start:\n\n"
)
LINES_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. "
LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
LINE_PATTERN = re.compile(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)

_ADJECTIVES = (
    "able amber brave brief bright broad calm clever cold cosy crisp curly daring deep dull early eager faint fancy fast fierce "
    "gentle glad grand grave green happy harsh heavy humble icy idle jolly keen kind large late lazy light little lively lone "
    "loud lucky mellow mild modest narrow neat noble odd old pale plain polite proud quick quiet rapid rare rough round sharp "
    "short silent slim slow small smooth soft solid steep stern strong sunny swift tall tame tidy tiny vast warm weary wide wild "
    "wise"
)
ADJECTIVES = _ADJECTIVES.split()
_NOUNS = (
    "acorn anchor apple arrow badge basket beacon bell bird boat bottle bridge brush bucket button candle canoe carpet cart "
    "castle cedar chair circle clock cloud coat comet compass copper cotton cup desk door drum eagle engine falcon feather fern "
    "field flute forest fork garden gate glove grape hammer harbor hat hill horse island jacket jar kettle key kite ladder lake "
    "lamp leaf lemon letter lion maple marble meadow mirror moon mountain needle nest oak ocean olive orchid owl paddle panda "
    "paper pear pebble pencil piano pillow planet pond pony rabbit ribbon river rocket rope saddle sail shell shore spoon star "
    "stone table temple thread tiger tower train tulip valley violin wagon wall whale wheel willow window wolf"
)
NOUNS = _NOUNS.split()


@dataclass(frozen=True)
class KeyValues:
    """A JSON object of UUID pairs, one per line.

    Attributes:
        records: keys and values.
        first: index of the record that the benchmark's file asks for.
    """

    kind: ClassVar[str] = "kv"
    closing: ClassVar[str] = '"'
    records: list[tuple[str, str]]
    first: int | None = None

    def prompt(self, key: str) -> str:
        """Return the document, followed by the question about one key."""
        data = ",\n ".join(f'"{key}": "{value}"' for key, value in self.records)
        return KV_PROMPT.format(data=f"{{{data}}}", key=key)

    @staticmethod
    def answer_prefix(key: str) -> str:
        """Return a record up to its value. `closing` ends the value."""
        return f'"{key}": "'

    @staticmethod
    def right(prediction: str, value: str) -> bool:
        """Return whether the answer contains the value, as the benchmark decides it."""
        return value.lower() in prediction.lower()


@dataclass(frozen=True)
class Lines:
    """Named lines, each with a number.

    Attributes:
        records: names and numbers.
        first: index of the record that the benchmark's file asks for.
    """

    kind: ClassVar[str] = "lines"
    closing: ClassVar[str] = ">"
    records: list[tuple[str, str]]
    first: int | None = None

    def prompt(self, key: str) -> str:
        """Return the document, followed by the question about one line."""
        lines = "".join(LINE.format(key=key, value=value) for key, value in self.records)
        return LINES_BEGINNING + lines + LINES_QUESTION.format(key=key)

    @staticmethod
    def answer_prefix(key: str) -> str:
        """Return a record up to its value. `closing` ends the value."""
        return f"line {key}: REGISTER_CONTENT is <"

    @staticmethod
    def right(prediction: str, value: str) -> bool:
        """Return whether the answer's last number is the line's, as the benchmark decides it."""
        numbers = re.findall(r"\d+", prediction)
        return bool(numbers) and int(numbers[-1]) == int(value)


Document = KeyValues | Lines
DOCUMENT_KINDS: dict[str, type[Document]] = {kind.kind: kind for kind in (KeyValues, Lines)}
KINDS = tuple(DOCUMENT_KINDS)


@dataclass(frozen=True)
class Retrieval:
    """Look up one of many records that differ only in their keys."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "exact retrieval: key-value pairs (lost in the middle) and LongEval lines"
    unit: ClassVar[str] = "score"
    kinds: tuple[str, ...] = field(default=KINDS, metadata={"help": "Which of kv and lines."})
    keys: tuple[int, ...] = field(default=(20,), metadata={"help": "Pairs in a generated key-value document."})
    lines: tuple[int, ...] = field(default=(40,), metadata={"help": "Lines in a generated document of lines."})
    documents: int = field(default=5, metadata={"help": "Documents of each size, or of each file (0: all of the file)."})
    questions: int = field(default=5, metadata={"help": "Questions about each document, each an item of its own."})
    kv_files: tuple[Path, ...] = field(
        default=(), metadata={"help": "Read key-value documents (.jsonl, .jsonl.gz) instead of generating them."}
    )
    lines_files: tuple[Path, ...] = field(default=(), metadata={"help": "Read LongEval lines (.jsonl) instead of generating them."})
    chat: bool = field(default=True, metadata={"help": "Ask as a user's message, if the model has a chat template."})
    answer_prefix: bool = field(
        default=False,
        metadata={"help": "Write the answer up to the value for the model, which then only has to copy it (small models)."},
    )
    max_new_tokens: int = field(default=100, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Decides the records and which are asked for."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "questions", "max_new_tokens")
        check_at_least(self, 2, "keys", "lines")
        check_at_least(self, 0, "documents")
        check_distinct(self, "kinds", "keys", "lines")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(f"--kinds must be of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}.")
        if self.documents == 0 and not all(self._files(kind) for kind in self.kinds):
            raise ConfigError("--documents 0 means all of a file: pass --kv-files or --lines-files for each of --kinds.")
        if max(self.lines) > len(ADJECTIVES) * len(NOUNS):
            raise ConfigError(f"--lines can be at most {len(ADJECTIVES) * len(NOUNS):,}, got {max(self.lines):,}.")

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        for kind in self.kinds:
            for source, document in self._documents(kind):
                yield from self._ask(model, source, document)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        references = prepared.item.facts["references"]
        kind = DOCUMENT_KINDS[prepared.item.facts["kind"]]
        limit = self.max_new_tokens
        if self.answer_prefix:  # text after the value does not count
            limit = min(limit, 2 + max(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references))
        tokens = greedy(prepared.prompt.logits, session, limit, model.end_ids(chat=self.chat))
        prediction = model.answer_text(tokens, prepared.item.prompt, chat=self.chat)
        answer = prediction.partition(kind.closing)[0] if self.answer_prefix else prediction
        right = any(kind.right(answer, reference) for reference in references)
        return Measurement([float(right)], details={"prediction": prediction, "references": references})

    def _files(self, kind: str) -> tuple[Path, ...]:
        return self.kv_files if kind == "kv" else self.lines_files

    def _documents(self, kind: str) -> Iterator[tuple[str, Document]]:
        """Yield a unique name and the document, for every document of a kind."""
        files = self._files(kind)
        for index, path in enumerate(files):
            read: Iterator[Document] = read_key_values(path) if kind == "kv" else read_lines(path)
            for number, document in islice(enumerate(read), self.documents or None):
                yield f"{kind}/file{index}/{number}", document
        if files:
            return
        for size in self.keys if kind == "kv" else self.lines:
            for number in range(self.documents):
                rng = random.Random(f"{kind} {self.seed} {size} {number}")
                yield f"{kind}/{size}/{number}", make_key_values(rng, size) if kind == "kv" else make_lines(rng, size)

    def _ask(self, model: TaskModel, source: str, document: Document) -> Iterator[Item]:
        places = list(range(len(document.records)))
        random.Random(f"questions {self.seed} {source}").shuffle(places)
        if document.first is not None:
            places.remove(document.first)
            places.insert(0, document.first)
        places = places[: self.questions]
        prompts = [self._prompt(model.template, document, document.records[place][0]) for place in places]
        longest = max(map(len, prompts))
        check_length(longest + self.max_new_tokens, model.max_positions, f"a retrieval document of {len(document.records)} records")
        shared = shared_prefix(prompts)
        for number, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            key, value = document.records[place]
            facts = {
                "kind": document.kind,
                "records": len(document.records),
                "depth": place / (len(document.records) - 1),
                "length": len(prompt),
                "key": key,
                "references": [value],
            }
            yield Item(f"{source}/{number}", f"{document.kind}/{len(document.records)}", prompt, shared, facts)

    def _prompt(self, template: ChatTemplate, document: Document, key: str) -> list[int]:
        prefix = document.answer_prefix(key) if self.answer_prefix else ""
        return encode_prompt(template, document.prompt(key), chat=self.chat, answer_prefix=prefix)


def make_key_values(rng: random.Random, count: int) -> KeyValues:
    """Make random UUID pairs."""
    keys: dict[str, str] = {}
    while len(keys) < count:
        keys[_uuid(rng)] = _uuid(rng)
    return KeyValues(list(keys.items()))


def make_lines(rng: random.Random, count: int) -> Lines:
    """Make lines named by adjective and noun, with random numbers up to 50,000 as in LongEval."""
    names = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    pairs = [divmod(name, len(NOUNS)) for name in names]
    return Lines([(f"{ADJECTIVES[a]}-{NOUNS[n]}", str(rng.randint(1, 50_000))) for a, n in pairs])


def read_key_values(path: Path) -> Iterator[KeyValues]:
    """Yield the documents of a file in the format of "Lost in the Middle".

    Its fields are `ordered_kv_records`, `key` and `value`.

    Raises:
        TaskDataError: a line is malformed. The message names file and line.
    """
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        pairs = record_field(record, "ordered_kv_records", list, where)
        asked = (record_field(record, "key", str, where), record_field(record, "value", str, where))
        if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
            raise TaskDataError(f"{where}: 'ordered_kv_records' must hold pairs of strings.")
        yield _checked(KeyValues, [(key, value) for key, value in pairs], asked, where)


def read_lines(path: Path) -> Iterator[Lines]:
    """Yield the documents of a LongEval file.

    Its fields are `prompt` with the lines, `random_idx` (name, place) and `expected_number`.

    Raises:
        TaskDataError: a line is malformed. The message names file and line.
    """
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        prompt = record_field(record, "prompt", str, where)
        asked = record_field(record, "random_idx", list, where)
        value = str(record_field(record, "expected_number", (int, str), where))
        if not asked or not isinstance(asked[0], str):
            raise TaskDataError(f"{where}: 'random_idx' must begin with the name of a line.")
        document = _checked(Lines, LINE_PATTERN.findall(prompt), (asked[0], value), where)
        if document.prompt(asked[0]).strip() != prompt.strip():
            raise TaskDataError(f"{where}: 'prompt' is not worded as LongEval's line retrieval.")
        yield document


def _checked(kind: type[Document], records: list[tuple[str, str]], asked: tuple[str, str], where: str) -> Any:
    """Make a document. Its keys must be unique, and it must hold the record asked for."""
    if len(records) < 2 or len(dict(records)) < len(records):
        raise TaskDataError(f"{where}: expected at least two records with different keys, got {len(records)}.")
    if asked not in records:
        raise TaskDataError(f"{where}: no record has the key {asked[0]!r} and the value {asked[1]!r}, which it asks for.")
    return kind(records, records.index(asked))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
