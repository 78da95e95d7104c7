"""`multi-needle`: all needles are in the text, asked for at once, and scored one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from specache.errors import ConfigError, TaskDataError
from specache.eval.tasks.base import Item, TaskModel
from specache.eval.tasks.multi_needle import MultiNeedle
from tests.eval.answering import beginning, prompt_text, right_answer, tiny_model, written

TASK = MultiNeedle(lengths=(6000,), needles=(8, 32), documents=2)


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return tiny_model()


@pytest.fixture(scope="module")
def items(tiny: TaskModel) -> list[Item]:
    return list(TASK.items(tiny))


def test_each_number_of_needles_is_a_row_of_its_own(items: list[Item]) -> None:
    assert [item.group for item in items] == ["multi-needle/8/6000"] * 2 + ["multi-needle/32/6000"] * 2


def test_the_answer_follows_from_the_text(items: list[Item]) -> None:
    for item in items:
        text = prompt_text(item)
        planted = dict(re.findall(r"^The secret access code of the (\S+) is (\d+)\. Remember it\.$", text, re.MULTILINE))
        (asked,) = re.findall(r"codes of these places: (.+?)\? Write", text)
        lines = [f"{place}: {planted[place]}" for place in asked.split(", ")]
        assert right_answer(item) == "\n".join(["The secret access codes:", *lines])
        assert len(lines) == len(planted) == int(item.group.split("/")[1])
        assert list(planted) != asked.split(", "), "in another order than the text's"


def test_values_are_the_codes_alone(items: list[Item]) -> None:
    for item in items:
        values = [text for text, is_value in item.facts["answer"] if is_value]
        assert all(re.fullmatch(r"\d{5}", value) for value in values)
        assert values == list(item.facts["codes"].values())
        assert not re.search(r"\d", "".join(text for text, is_value in item.facts["answer"] if not is_value))


def test_needles_are_spread_over_the_whole_text(tiny: TaskModel) -> None:
    (item,) = MultiNeedle(lengths=(15_000,), needles=(8,), documents=1).items(tiny)
    text = prompt_text(item)
    start, end = text.index("hidden in it."), text.index("End of the document.")
    for number, place in enumerate(re.findall(r"^The secret access code of the (\S+) is", text, re.MULTILINE)):
        depth = (text.index(f"code of the {place} is") - start) / (end - start)
        assert number / 8 - 0.05 < depth < (number + 1) / 8 + 0.05
        assert depth == pytest.approx(item.facts["depths"][place], abs=0.05)


@pytest.mark.parametrize(
    ("change", "found", "exact"),
    [
        (lambda lines: lines, 1.0, True),
        (lambda lines: [*lines, "", "I hope this helps."], 1.0, True),  # not read any more
        (lambda lines: [f"  {line} " for line in lines], 1.0, True),
        (lambda lines: lines[:4], 0.5, False),
        (lambda lines: [lines[0], *reversed(lines[1:])], 1.0, False),
        (lambda lines: [line.rpartition(" ")[2] for line in lines], 1.0, False),  # codes without their places
        (lambda lines: [re.sub(r"(\d{5})", r"1\1", line) for line in lines], 0.0, False),  # a longer number is another one
    ],
)
def test_the_score_is_the_share_of_codes_in_the_answer(tiny: TaskModel, change: Any, found: float, exact: bool) -> None:
    (item,) = MultiNeedle(lengths=(4000,), needles=(8,), documents=1).items(tiny)
    lines = right_answer(item).removeprefix(beginning(item)).splitlines()
    measured = written(tiny, TASK, item, beginning(item) + "\n".join(change(lines)))
    assert len(measured.values) == 8
    assert sum(measured.values) / 8 == found
    assert measured.details["exact"] == exact


def test_an_answer_is_read_up_to_its_last_line(tiny: TaskModel, items: list[Item]) -> None:
    measured = written(tiny, TASK, items[0], right_answer(items[0]) + "\n" + "more: 12345\n" * 20)
    assert measured.details["prediction"].count("\n") == 8
    assert measured.details["exact"]


@pytest.mark.parametrize("options", [{"needles": ()}, {"needles": (0,)}, {"needles": (8, 8)}, {"needles": (99,)}])
def test_impossible_numbers_of_needles_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--needles"):
        MultiNeedle(**options)


def test_a_short_haystack_is_explained(tiny: TaskModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One sentence. Another one.", encoding="utf-8")
    with pytest.raises(TaskDataError, match="pass more or longer files"):
        list(MultiNeedle(lengths=(6000,), haystack=(short,)).items(tiny))
