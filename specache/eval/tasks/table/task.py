"""The task `table`: the rows of a page's tables as tab-separated values.

The form is that of LongProc's "HTML to TSV" (Ye et al., 2025), on generated pages: an instruction,
a page, the columns that are wanted, and the F1 score of whole rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

from specache.errors import ConfigError
from specache.eval.tasks.answer_task import AnswerTask, Generated, Question
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.table.page import write_page
from specache.eval.tasks.table.topics import MOST_ROWS, TOPICS
from specache.eval.tasks.texts import check_at_least, check_distinct

PROMPT = (
    "Your task is to extract information from an HTML page, as tab-separated values (TSV).\n\n{example}"
    "The page to extract from:\n\n{page}\n\n"
    "Write the columns {columns} of all {things} on this page as TSV. Begin with a line of the columns' names. Then write one line "
    "per row, in the order of the page, and nothing else."
)
EXAMPLE = (
    "An example. The page:\n\n"
    '<table class="moons">\n<tr><th>Moon</th><th>Planet</th><th>Radius</th></tr>\n'
    '<tr data-id="7"><td><a href="/moons/7">Titan</a></td><td>Saturn</td><td>2,575 km</td></tr>\n'
    '<tr data-id="9"><td><a href="/moons/9">Io</a></td><td>Jupiter</td><td><span>1,822 km</span></td></tr>\n</table>\n\n'
    "The columns Moon, Radius of all moons as TSV:\n\nMoon\tRadius\nTitan\t2,575 km\nIo\t1,822 km\n\n"
)
_ROW_SHARE = 0.6  # rows among the lines of a page, the rest are other content
_END = re.compile(r"\n\s*\n|\n```")  # of a written table: a blank line, or the end of a code block

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table(AnswerTask):
    """Extract the rows of an HTML page's tables."""

    name: ClassVar[str] = "table"
    summary: ClassVar[str] = "the tables of an HTML page as tab-separated values (the form of LongProc)"
    topics: tuple[str, ...] = field(default=tuple(TOPICS), metadata={"help": "What pages are about, taken in turn."})
    tables: int = field(default=2, metadata={"help": "Tables that the rows of a page are in."})
    columns: int = field(default=3, metadata={"help": "Columns that are asked for; the first one always is."})
    example: bool = field(default=True, metadata={"help": "Show a short page and its TSV first."})
    most_rows: int = field(default=60, metadata={"help": "Most rows of a page; longer pages have more other content."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "tables", "columns")
        check_distinct(self, "topics")
        unknown = [name for name in self.topics if name not in TOPICS]
        if unknown or not self.topics:
            raise ConfigError(f"--topics must be of {', '.join(TOPICS)}, got {', '.join(unknown) or 'none'}.")
        most_columns = min(len(TOPICS[name].columns) for name in self.topics)
        if self.columns > most_columns:
            raise ConfigError(f"--columns can be at most {most_columns}, got {self.columns}.")
        if not self.tables <= self.most_rows <= MOST_ROWS:
            raise ConfigError(f"--most-rows must be from {self.tables} (--tables) to {MOST_ROWS:,}, got {self.most_rows}.")

    def generated(self, length: int) -> Iterator[Generated]:
        for number in range(self.documents):
            key, topic = f"{length}/{number}", self.topics[number % len(self.topics)]

            def make(size: int, key: str = key, topic: str = topic) -> list[Question]:
                return [self._question(Random(f"{self.name} {self.seed} {topic} {key}"), topic, size)]

            yield Generated(key, f"{self.name}/{length}", make, smallest=self.tables)

    def is_complete(self, prediction: str, facts: dict[str, Any]) -> bool:
        return _END.search(prediction) is not None

    def score(self, prediction: str, facts: dict[str, Any]) -> Measurement:
        """Score a table by the F1 of its rows, which count if all of their cells are right."""
        right = read_rows("".join(text for text, _ in facts["answer"][1:]))
        precision, recall, f1 = row_f1(read_rows(_END.split(prediction.lstrip("\n"), maxsplit=1)[0]), right)
        return Measurement([f1], details={"prediction": prediction, "precision": precision, "recall": recall, "rows": len(right)})

    def _question(self, rng: Random, topic_name: str, size: int) -> Question:
        topic = TOPICS[topic_name]
        rows = topic.rows(rng, min(self.most_rows, max(self.tables, round(size * _ROW_SHARE))))
        page = write_page(rng, topic, rows, tables=self.tables, noise=max(0, size - len(rows)))
        asked = [0, *rng.sample(range(1, len(topic.columns)), self.columns - 1)]
        titles = [topic.columns[column] for column in asked]
        answer = [("\t".join(titles) + "\n", False)]
        for number, row in enumerate(rows):
            for place, column in enumerate(asked):
                if place or number:
                    answer.append(("\t" if place else "\n", False))
                answer.append((row[column], True))
        example = EXAMPLE if self.example else ""
        text = PROMPT.format(example=example, page=page, columns=", ".join(titles), things=topic.things)
        return Question(text, answer, {"topic": topic_name, "columns": titles, "rows": len(rows)})


def read_rows(text: str) -> list[Row]:
    """Return the rows of a TSV without a header. Case and repeated spaces do not count."""
    return [tuple(" ".join(cell.split()).casefold() for cell in line.split("\t")) for line in text.splitlines() if line.strip()]


def row_f1(written: Sequence[Row], right: Sequence[Row]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of rows. A row that is written twice is right once."""
    common = (Counter(written) & Counter(right)).total()
    precision = common / len(written) if written else 0.0
    recall = common / len(right)
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0
