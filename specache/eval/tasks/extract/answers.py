"""Write the right answer as JSON, and tell the tokens that hold values from JSON's own."""

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


@dataclass(frozen=True)
class AnswerTokens:
    """The answer's tokens.

    Attributes:
        ids: token ids.
        value: for each token, the number of the value that it holds a part of, or `None` for
            punctuation and field names.
    """

    ids: list[int]
    value: list[int | None]


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


def tokenise_answer(tokenizer: Any, answer: JsonAnswer) -> AnswerTokens:
    """Tokenise an answer as the continuation of `ANSWER_PREFIX`. Needs a fast tokenizer."""
    ids, offsets = _encode(tokenizer, ANSWER_PREFIX + answer.text)
    start = len(ANSWER_PREFIX)
    begin = next((index for index, (first, last) in enumerate(offsets) if last > start), len(ids))
    if begin < len(ids) and offsets[begin][0] < start:  # a token that reaches over the prefix's end
        (ids, offsets), begin, start = _encode(tokenizer, answer.text), 0, 0
    spans = [(first - start, last - start) for first, last in offsets[begin:]]
    return AnswerTokens(ids[begin:], _value_numbers(spans, answer.values))


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [(first, last) for first, last in encoding["offset_mapping"]]


def _value_numbers(spans: list[tuple[int, int]], values: list[tuple[int, int]]) -> list[int | None]:
    """Return for each token's span the first value that it overlaps. Both lists are in order."""
    numbers: list[int | None] = []
    number = 0
    for begin, end in spans:
        while number < len(values) and values[number][1] <= begin:
            number += 1
        overlaps = number < len(values) and end > values[number][0]
        numbers.append(number if overlaps else None)
    return numbers


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
