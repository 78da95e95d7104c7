"""What a schema of documents has: its fields, its records and its sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from string import Formatter

Value = str | int
Record = dict[str, Value]


@dataclass(frozen=True)
class Schema:
    """One kind of document, and of the objects that are extracted from it.

    Sentences are `str.format` templates. Those about a record have its fields as slots, and every
    one names the record by its key field.

    Attributes:
        name: on the command line.
        things: what the list holds, in the plural: "articles for sale".
        fields: field -> what it means, for the instruction. The first one is the key: no two
            records of a document have the same.
        title: heads the document; slots are those of `WORDS`.
        record: draws a record.
        introductions: sentences that name a record first, with one or two of its other fields.
        statements: sentences that state one other field of a record.
        repetitions: the same in other words, for a field that was stated before.
        corrections: field -> sentences with the slots `key`, `old` and `new`.
        fillers: sentences that state no field of a record; slots are those of `WORDS`.
    """

    name: str
    things: str
    fields: Mapping[str, str]
    title: str
    record: Callable[[Random], Record]
    introductions: tuple[str, ...]
    statements: tuple[str, ...]
    repetitions: tuple[str, ...]
    corrections: Mapping[str, tuple[str, ...]]
    fillers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the field that names a record."""
        return next(iter(self.fields))


def stated_fields(template: str) -> set[str]:
    """Return the slots of a sentence: the fields that it states."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}
