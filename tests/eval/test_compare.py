"""`compare`: the answer follows from what all reports say, and is scored exactly."""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from typing import Any

import pytest

from specache.errors import ConfigError
from specache.eval.tasks.base import Item, TaskModel
from specache.eval.tasks.compare import Compare
from specache.eval.tasks.compare.questions import KINDS, is_right, read_answer
from specache.eval.tasks.compare.reports import FIRST_WORDS, SECOND_WORDS, make_reports
from tests.eval.answering import beginning, prompt_text, right_answer, tiny_model, written

TASK = Compare(lengths=(9000,), documents=2, companies=4, questions=8)
KEYWORDS = {
    "number of employees": "employees",
    "revenue": "revenue",
    "number of patents": "patents",
    "number of customers": "customers",
    "water consumption": "water",
    "number of complaints": "complaints",
    "number of delivery vans": "vans",
    "training budget": "training",
    "number of apprentices": "apprentices",
    "share price": "share",
}  # what a question calls a figure -> a word of the sentences that state it


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return tiny_model()


@pytest.fixture(scope="module")
def items(tiny: TaskModel) -> list[Item]:
    return list(TASK.items(tiny))


def stated(item: Item, keyword: str, period: str) -> dict[str, int]:
    """Return what the prompt says about one figure of every company."""
    found = {}
    for title, body in re.findall(r"^Document \d+: the report of (.+)\n\n(.+)$", prompt_text(item), re.MULTILINE):
        (sentence,) = [one for one in body.split(". ") if keyword in one and period in one]
        assert title in sentence
        (found[title],) = map(int, re.findall(r"\d+", sentence.replace(period, "")))
    return found


def parsed(item: Item) -> tuple[str, dict[str, int]]:
    """Return the question, and what the reports say about the figure it asks for."""
    question = prompt_text(item).rpartition("Question: ")[2]
    (noun,) = [noun for noun in KEYWORDS if noun in question]
    (period,) = re.findall(r"the \w+ quarter of \d{4}", question)
    return question, stated(item, KEYWORDS[noun], period)


def derived_answer(item: Item) -> str:
    question, figures = parsed(item)
    ordered = sorted(figures, key=lambda company: -figures[company])
    if "had the largest" in question:
        return ordered[0]
    if "order of all companies" in question:
        return ", ".join(ordered)
    if more := re.search(r"of more than (\d+)\?", question):
        return str(sum(figure > int(more[1]) for figure in figures.values()))
    (twice,) = [figure for figure, count in Counter(figures.values()).items() if count > 1]
    return ", ".join(company for company, figure in figures.items() if figure == twice)


def test_the_answer_follows_from_the_reports(items: list[Item]) -> None:
    assert Counter(item.facts["comparison"]["kind"] for item in items) == dict.fromkeys(KINDS, 4)
    for item in items:
        assert right_answer(item) == f"Answer: {derived_answer(item)}"
        assert parsed(item)[1] == item.facts["comparison"]["figures"]
        assert len(parsed(item)[1]) == 4


def test_in_steps_the_answer_lists_every_figure_first(tiny: TaskModel) -> None:
    for item in Compare(lengths=(6000,), documents=1, companies=3, questions=4, steps=True).items(tiny):
        listed = "; ".join(f"{company} {figure}" for company, figure in parsed(item)[1].items())
        assert right_answer(item) == f"Figures: {listed}. Answer: {derived_answer(item)}"
        values = [text for text, is_value in item.facts["answer"] if is_value]
        assert values == [*map(str, parsed(item)[1].values()), *derived_answer(item).split(", ")]


def test_a_single_wrong_figure_would_change_some_answer(items: list[Item]) -> None:
    """A count is neither none nor all, so that the threshold has to be compared."""
    counts = [int(derived_answer(item)) for item in items if item.facts["comparison"]["kind"] == "count"]
    assert all(0 < count < 4 for count in counts)


def test_questions_share_the_documents(items: list[Item]) -> None:
    for document in (items[:8], items[8:]):
        (shared,) = {item.shared for item in document}
        assert shared > 0.85 * len(document[0].prompt)
        assert len({tuple(item.prompt[:shared]) for item in document}) == 1
        assert len({prompt_text(item).rpartition("Question: ")[2] for item in document}) == 8


def test_only_the_figures_asked_for_have_equals() -> None:
    reports = make_reports(Random(0), 10, 300, equal=3)
    assert len(set(reports.figures)) == 300
    for number, figure in enumerate(reports.figures):
        assert len(set(reports.of(figure).values())) == (9 if number < 3 else 10)


def test_companies_cannot_be_confused() -> None:
    assert len(set(FIRST_WORDS)) == len(FIRST_WORDS)
    assert not set(FIRST_WORDS) & set(SECOND_WORDS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Alder Foods\n\nBecause of its size.", ["Alder Foods"]),
        ("ALDER foods, birch labs.", ["Alder Foods", "Birch Labs"]),
        ("Birch Labs > Alder Foods", ["Birch Labs", "Alder Foods"]),
        ("It is Alder Foods.", ["Alder Foods"]),
        ("3 companies", ["3"]),
        ("Three of them, not 2.", ["3"]),
        ("13", ["13"]),
        ("none", []),
        ("\n\nBirch Labs", ["Birch Labs"]),
        ("", []),
    ],
)
def test_answers_are_read_from_their_first_line(text: str, answer: list[str]) -> None:
    assert read_answer(text, ["Alder Foods", "Birch Labs"]) == answer


@pytest.mark.parametrize(
    ("text", "ordered", "right"),
    [("A A, B B", True, True), ("B B, A A", True, False), ("B B, A A", False, True), ("A A", False, False), ("2", False, False)],
)
def test_names_must_be_complete_and_in_order_where_it_matters(text: str, ordered: bool, right: bool) -> None:
    figures = {"A A": 1, "B B": 2, "C C": 3}
    assert not is_right(f"{text}, C C", {"figures": figures, "answer": ["A A", "B B"], "ordered": ordered})
    assert is_right(text, {"figures": figures, "answer": ["A A", "B B"], "ordered": ordered}) == right


def test_a_written_answer_ends_with_its_line(tiny: TaskModel, items: list[Item]) -> None:
    measured = written(tiny, TASK, items[0], right_answer(items[0]) + "\nQuestion: Which company is the next?")
    assert measured.values == [1.0]
    assert measured.details["prediction"] == right_answer(items[0]).removeprefix(beginning(items[0])) + "\n"


def test_in_steps_only_the_answer_after_the_figures_counts(tiny: TaskModel) -> None:
    task = Compare(lengths=(6000,), documents=1, companies=3, questions=4, steps=True)
    for item in task.items(tiny):
        figures, _, answer = right_answer(item).rpartition("Answer:")
        assert written(tiny, task, item, f"{figures}Answer: nothing").values == [0.0]
        assert written(tiny, task, item, figures).values == [0.0], "the figures alone are no answer"
        assert written(tiny, task, item, f"{beginning(item)} unknown. Answer:{answer}\n").values == [1.0]


@pytest.mark.parametrize(
    "options",
    [{"companies": 2}, {"companies": 99}, {"questions": 9999}, {"kinds": ()}, {"kinds": ("sum",)}, {"kinds": ("count", "count")}],
)
def test_impossible_comparisons_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Compare(**options)


def test_more_text_than_reports_can_have_is_explained() -> None:
    (first, *_) = Compare(documents=1).generated(2000)
    with pytest.raises(ConfigError, match="pass more --companies"):
        first.make(1241)
