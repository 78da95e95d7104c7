"""`table`: the answer is what a parser reads from the page, and rows are scored as a whole."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from specache.errors import ConfigError
from specache.eval.tasks.base import Item, TaskModel
from specache.eval.tasks.table import Table
from specache.eval.tasks.table.task import read_rows, row_f1
from specache.eval.tasks.table.topics import TOPICS
from tests.eval.answering import beginning, prompt_text, right_answer, tiny_model, written

TASK = Table(lengths=(6000,), documents=4)


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return tiny_model()


@pytest.fixture(scope="module")
def items(tiny: TaskModel) -> list[Item]:
    return list(TASK.items(tiny))


class Tables(HTMLParser):
    """Reads all tables of a page.

    Attributes:
        tables: rows of cells, the header first.
        open: tags that are not closed yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "every element is closed where it should be"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def page_and_columns(item: Item) -> tuple[str, list[str]]:
    text = prompt_text(item)
    page = re.search(r"<!DOCTYPE html>.*</html>", text, re.DOTALL)
    columns = re.search(r"Write the columns (.+) of all \w+ on this page", text)
    assert page is not None and columns is not None
    return page[0], columns[1].split(", ")


def read(page: str) -> list[list[list[str]]]:
    parser = Tables()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.tables


def test_the_answer_follows_from_the_page(items: list[Item]) -> None:
    assert {item.facts["topic"] for item in items} == set(TOPICS)
    for item in items:
        page, columns = page_and_columns(item)
        wanted = [table for table in read(page) if set(columns) <= set(table[0])]
        assert len(wanted) == 2
        lines = ["\t".join(columns)]
        lines += ["\t".join(row[table[0].index(name)] for name in columns) for table in wanted for row in table[1:]]
        assert right_answer(item) == "\n".join(lines)
        assert len({line.split("\t")[0] for line in lines}) == len(lines) == item.facts["rows"] + 1


def test_values_are_cells_without_the_header(items: list[Item]) -> None:
    for item in items:
        values = [text for text, is_value in item.facts["answer"] if is_value]
        assert len(values) == 3 * item.facts["rows"]
        assert values == [cell for line in right_answer(item).splitlines()[1:] for cell in line.split("\t")]


def test_pages_have_other_content_than_the_rows(tiny: TaskModel) -> None:
    (item,) = Table(lengths=(15_000,), documents=1).items(tiny)
    page, columns = page_and_columns(item)
    others = [table for table in read(page) if not set(columns) <= set(table[0])]
    assert others and re.search(r'class="(comment|teaser)"', page)


def test_escaped_text_is_asked_for_as_it_is_read(tiny: TaskModel) -> None:
    (item,) = Table(lengths=(6000,), documents=1, topics=("jobs",), columns=6).items(tiny)
    assert "&amp;" in page_and_columns(item)[0]
    assert " & " in right_answer(item) and "&amp;" not in right_answer(item)


def test_a_long_page_has_no_more_rows_than_asked(tiny: TaskModel) -> None:
    few, many = (next(Table(lengths=(length,), most_rows=5, documents=1).items(tiny)) for length in (4500, 15_000))
    assert few.facts["rows"] <= many.facts["rows"] == 5
    assert len(many.prompt) > 14_000


@pytest.mark.parametrize(
    ("lines", "scores"),
    [
        (["a\t1", "b\t2"], (1.0, 1.0, 1.0)),
        (["b\t2", " A\t 1 "], (1.0, 1.0, 1.0)),  # order, case and spaces do not count
        (["a\t1"], (1.0, 0.5, 2 / 3)),
        (["a\t1", "a\t1"], (0.5, 0.5, 0.5)),
        (["a\t1", "b\t3"], (0.5, 0.5, 0.5)),
        (["a\t1\tx", "b"], (0.0, 0.0, 0.0)),
        (["a 1", "b 2"], (0.0, 0.0, 0.0)),
        ([], (0.0, 0.0, 0.0)),
    ],
)
def test_rows_are_scored_by_f1(lines: list[str], scores: tuple[float, float, float]) -> None:
    assert row_f1(read_rows("\n".join(lines)), [("a", "1"), ("b", "2")]) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("change", "precision", "recall"),
    [
        (lambda rows: rows, 1.0, 1.0),
        (lambda rows: [*rows, "", "That is all: I hope it helps."], 1.0, 1.0),  # a blank line ends the table
        (lambda rows: [*rows, "```", "That is all."], 1.0, 1.0),
        (lambda rows: [*rows, "made\tup\trow"], None, 1.0),
        (lambda rows: rows[:1], 1.0, None),
    ],
)
def test_a_written_table_is_read_to_its_end(tiny: TaskModel, items: list[Item], change: Any, precision: Any, recall: Any) -> None:
    item = items[0]
    rows, count = right_answer(item).splitlines()[1:], item.facts["rows"]
    measured = written(tiny, TASK, item, beginning(item) + "\n".join(change(rows)))
    assert measured.details["precision"] == pytest.approx(precision or count / (count + 1))
    assert measured.details["recall"] == pytest.approx(recall or 1 / count)


@pytest.mark.parametrize(
    "options",
    [
        *({"topics": ("cars",)}, {"topics": ()}, {"topics": ("jobs", "jobs")}, {"columns": 7}, {"columns": 0}),
        *({"tables": 0}, {"tables": 9, "most_rows": 8}, {"most_rows": 10**6}),
    ],
)
def test_impossible_pages_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Table(**options)
