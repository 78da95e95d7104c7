"""Read documents with reference lists from a folder, as those of Text2JSON.

Text2JSON is the task of *KV Cache Offloading for Context-Intensive Tasks* (arXiv 2604.08426). This
reader has not been tried on its files, which were not at hand: it accepts the usual forms, and the
names of the fields are options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specache.errors import TaskDataError
from specache.eval.tasks.texts import read_jsonl, record_field
from specache.platform.text_files import read_text

ENDINGS = (".json", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class FieldNames:
    """The fields of a record in a file.

    Attributes:
        text: the document.
        question: the instruction or the schema: text, or JSON that is shown as it is.
        answer: the reference: a list of objects, an object that holds one such list, or either as
            JSON text.
    """

    text: str
    question: str
    answer: str


@dataclass(frozen=True)
class FileRecord:
    """One document of a file.

    Attributes:
        name: unique in the folder.
        where: file and line, for messages.
        key: the field by which objects are told apart.
    """

    name: str
    where: str
    text: str
    question: str
    references: list[dict[str, Any]]
    key: str


def read_folder(folder: Path, names: FieldNames, first: int = 0) -> Iterator[FileRecord]:
    """Yield the documents of all files in a folder, in the order of their names.

    Files are JSON lines (`.jsonl`, `.jsonl.gz`), or JSON (`.json`): a list of records, or one.

    Args:
        first: documents of each file, the first ones (0: all).

    Raises:
        TaskDataError: there are no files, or one is malformed. The message names file and line (for
            `.json`: the record's number).
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise TaskDataError(f"--folder {folder} is not a folder; expected one with files of documents ({', '.join(ENDINGS)}).")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS) and path.is_file())
    if not files:
        raise TaskDataError(f"--folder {folder} has no file that ends in {', '.join(ENDINGS)}.")
    for path in files:
        records = read_jsonl(path) if not path.name.endswith(".json") else _read_json(path)
        unit = "record" if path.name.endswith(".json") else "line"
        for count, (number, record) in enumerate(records):
            if first and count == first:
                break
            yield _parse(record, names, f"{path.name}/{number}", f"{path}, {unit} {number}")


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        document = json.loads(read_text(path, TaskDataError))
    except json.JSONDecodeError as error:
        raise TaskDataError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}).") from None
    records = document if isinstance(document, list) else [document]
    if not records:
        raise TaskDataError(f"{path} has no records.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise TaskDataError(f"{path}, record {number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record


def _parse(record: dict[str, Any], names: FieldNames, name: str, where: str) -> FileRecord:
    for option, field in (("--text-field", names.text), ("--question-field", names.question), ("--answer-field", names.answer)):
        if field not in record:
            there = ", ".join(map(repr, record)) or "none"
            raise TaskDataError(f"{where}: the field {field!r} is missing; there are {there}. Name the right one with {option}.")
    text = record_field(record, names.text, str, where)
    question = record_field(record, names.question, (str, dict, list), where)
    if not text.strip() or not question:
        raise TaskDataError(f"{where}: {names.text!r} and {names.question!r} must not be empty.")
    if not isinstance(question, str):
        question = json.dumps(question, ensure_ascii=False, indent=1)
    references = _references(record_field(record, names.answer, (str, dict, list), where), names.answer, where)
    return FileRecord(name, where, text, question, references, _key(references))


def _references(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise TaskDataError(f"{where}: {name!r} is not JSON ({error.msg} at column {error.colno}).") from None
    if isinstance(value, dict):
        lists = [member for member in value.values() if isinstance(member, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) and one for one in value):
        raise TaskDataError(f"{where}: {name!r} must be a list of JSON objects that are not empty.")
    return value


def _key(references: list[dict[str, Any]]) -> str:
    """Return the first field whose values tell all objects apart, or the first field of all."""
    fields = list(references[0])
    for field in fields:
        values = [json.dumps(one.get(field), sort_keys=True) for one in references]
        if len(set(values)) == len(values):
            return field
    return fields[0]
