"""The prompt: what to extract, short worked examples, and the document."""

from __future__ import annotations

from random import Random

from specache.eval.tasks.extract.answers import ANSWER_PREFIX, write_answer
from specache.eval.tasks.extract.draft import Draft
from specache.eval.tasks.extract.schemas import Record, Schema

EXAMPLE_RECORDS = (3, 2, 3)  # records of the first, second and third example, then again
EXAMPLE_FILLERS = 2

_TASK = (
    "Read each text and write a JSON list of all {things}. Each object has the fields {fields}. "
    "The objects stand in the order in which the text first names them. "
    "Where a text corrects itself, only the corrected value counts."
)
_TEXT = "Text:\n{text}\n\nJSON:\n"


class Examples:
    """The instruction and worked examples of one schema, the same for all of its documents.

    Attributes:
        text: the beginning of a prompt.
        keys: of the examples' records, which no document may have.
    """

    def __init__(self, schema: Schema, count: int, seed: int) -> None:
        fields = ", ".join(f'"{name}" ({meaning})' for name, meaning in schema.fields.items())
        parts = [_TASK.format(things=schema.things, fields=fields)]
        records: list[Record] = []
        for number in range(count):
            rng = Random(f"extract example {seed} {schema.name} {number}")
            size = EXAMPLE_RECORDS[number % len(EXAMPLE_RECORDS)]
            draft = Draft(schema, rng, size, corrected=1 / size, without=[record[schema.key] for record in records])
            records += draft.records
            parts.append(_TEXT.format(text=draft.text(EXAMPLE_FILLERS)) + ANSWER_PREFIX + write_answer(draft.records).text)
        self.text = "\n\n".join(parts)
        self.keys = [record[schema.key] for record in records]

    def ask(self, document: str) -> str:
        """Return a prompt up to where the JSON list begins (`ANSWER_PREFIX`)."""
        return f"{self.text}\n\n{_TEXT.format(text=document)}"


def ask_about(question: str, document: str) -> str:
    """Return the prompt of a document with a question of its own."""
    return f"{question.strip()}\n\n{_TEXT.format(text=document.strip())}"
