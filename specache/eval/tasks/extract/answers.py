"""Write the right answer as JSON, and tell its values from JSON's own characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_PREFIX = "[\n"  # the beginning of every answer, which is part of the prompt


@dataclass(frozen=True)
class JsonAnswer:
    """The answer after `ANSWER_PREFIX`, one object per line.

    Attributes:
        text: the JSON.
        values: (begin, end) of each field's value in the text, without quotation marks.
    """

    text: str
    values: list[tuple[int, int]]


def write_answer(records: Sequence[dict[str, Any]]) -> JsonAnswer:
    """Write records as the rest of a JSON list that `ANSWER_PREFIX` begins."""
    parts: list[str] = []
    values: list[tuple[int, int]] = []
    length = 0

    def write(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(text)

    for number, record in enumerate(records):
        write(",\n{" if number else "{")
        for place, (name, value) in enumerate(record.items()):
            write(f"{', ' if place else ''}{_json(name)}: ")
            text = _json(value)
            quote = isinstance(value, str)
            values.append((length + quote, length + len(text) - quote))
            write(text)
        write("}")
    write("\n]")
    return JsonAnswer("".join(parts), values)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
