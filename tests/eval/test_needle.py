"""Needle-in-a-Haystack: the needle is complete and at its depth, and heat maps show the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import SessionStats
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import TaskModel
from specache.eval.tasks.needle import Haystack, Needle, contains_any
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return TaskModel(llama(vocab_size=len(TOKENIZER), max_position_embeddings=20_000), TOKENIZER, "tiny")


class Recites:
    """A session that answers with a given text."""

    def __init__(self, text: str) -> None:
        self._tokens = iter(TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * 99)
        self.first = self.feed(-1)

    def feed(self, token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(self._tokens)), len(TOKENIZER)).float()

    def stats(self) -> SessionStats:
        return SessionStats(1.0)

    def close(self) -> None:
        pass


def test_items_depend_on_options_and_seed_alone(tiny: TaskModel) -> None:
    task = Needle(lengths=(1500,), depths=(0.5,), needles=2)
    assert list(task.items(tiny)) == list(task.items(tiny))
    other = Needle(lengths=(1500,), depths=(0.5,), needles=2, seed=1)
    assert [item.id for item in task.items(tiny)] == [item.id for item in other.items(tiny)]
    assert [item.prompt for item in task.items(tiny)] != [item.prompt for item in other.items(tiny)]


@pytest.mark.parametrize("together", [False, True])
def test_each_cell_has_its_items_and_ids_are_unique(tiny: TaskModel, together: bool) -> None:
    task = Needle(lengths=(2500, 3000), depths=(0.0, 0.5, 1.0), needles=2, documents=2, together=together)
    items = list(task.items(tiny))
    assert len({item.id for item in items}) == len(items) == 2 * 3 * 2 * 2
    assert {(item.facts["length"], item.facts["depth"]) for item in items} == {
        (n, d) for n in (2500, 3000) for d in (0.0, 0.5, 1.0)
    }


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("length", [3000, 9000])
def test_the_needle_is_complete_and_at_its_depth(tiny: TaskModel, length: int, together: bool) -> None:
    task = Needle(lengths=(length,), depths=(0.0, 0.3, 0.5, 1.0), together=together)
    for item in task.items(tiny):
        assert length - 450 < len(item.prompt) <= length, "as long as whole pieces of the haystack allow"
        text = TOKENIZER.decode(item.prompt)
        needle = item.facts["needle"]
        assert text.count(needle) == 1
        assert item.facts["references"][0] in needle
        beginning, end = text.index("document.") + 9, text.index("End of the document.")
        depth = (text.index(needle) - beginning) / (end - beginning - len(needle))
        assert depth == pytest.approx(item.facts["depth"], abs=400 / length), "to a piece"


def test_the_needle_is_a_paragraph_of_its_own(tiny: TaskModel, tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("word" * 3000, encoding="utf-8")
    (item,) = Needle(lengths=(2000,), depths=(0.5,), haystack=(story,)).items(tiny)
    assert f"\n\n{item.facts['needle']}\n\n" in TOKENIZER.decode(item.prompt)


@pytest.mark.parametrize("together", [False, True])
def test_questions_about_one_document_share_its_tokens(tiny: TaskModel, together: bool) -> None:
    items = list(Needle(lengths=(2500,), depths=(0.2, 0.8), needles=3, together=together).items(tiny))
    by_document = [items] if together else [items[:3], items[3:]]
    for document in by_document:
        (shared,) = {item.shared for item in document}
        assert shared > 2000
        assert len({tuple(item.prompt[:shared]) for item in document}) == 1
        assert len({item.prompt[shared] for item in document}) > 1, "not a token less than they share"
    assert len({tuple(item.facts["references"]) for item in items}) == 6


def test_a_single_needle_shares_no_prefix(tiny: TaskModel) -> None:
    assert [item.shared for item in Needle(lengths=(1500,), depths=(0.2, 0.8)).items(tiny)] == [0, 0]


def test_a_users_own_needle_is_planted(tiny: TaskModel) -> None:
    task = Needle(lengths=(1500,), depths=(0.5,), needle="Ada wrote the first program.", question="Who wrote it?", answer="ada")
    (item,) = task.items(tiny)
    text = TOKENIZER.decode(item.prompt)
    assert "Ada wrote the first program." in text
    assert text.endswith("Who wrote it?<end><assistant>")


@pytest.mark.parametrize(("answer", "value"), [("It is {}.", 1.0), ("{}", 1.0), ("It is 123.", 0.0), ("", 0.0)])
def test_an_answer_that_contains_the_code_is_right(tiny: TaskModel, answer: str, value: float) -> None:
    task = Needle(lengths=(1500,), depths=(0.5,))
    (item,) = task.items(tiny)
    session = Recites(answer.format(*item.facts["references"]))
    prepared = task.prepare(tiny, item, Answered(session.first))
    measured = task.measure(TaskModel(Ends(), TOKENIZER, "recites"), prepared, session)
    assert measured.values == [value]
    said = answer.format(*item.facts["references"])
    assert said.startswith(measured.details["prediction"])  # a right answer is not read to its end
    assert value == 1.0 or measured.details["prediction"] == said
    assert measured.details["references"] == item.facts["references"]


def test_answers_are_compared_ignoring_case() -> None:
    assert contains_any("it was ADA.", ["Grace", "Ada"])
    assert not contains_any("it was", ["Ada"])


def test_needle_runs_over_the_full_cache(tiny: TaskModel) -> None:
    task = Needle(lengths=(1000,), depths=(0.5,), max_new_tokens=3)
    (item,) = task.items(tiny)
    prompt = Prefilled(tiny.model, item.prompt)
    with torch.no_grad(), attached(tiny.model):
        session = FullMethod().start(prompt)
        measured = task.measure(tiny, task.prepare(tiny, item, prompt), session)
        session.close()
    assert measured.values == [0.0], "random weights know no code"


@pytest.mark.parametrize(
    "options",
    [
        {"depths": (1.5,)},
        {"depths": ()},
        {"lengths": ()},
        {"needles": 0},
        {"needles": 99},
        {"needles": 20, "together": True},
        {"needle": "A fact."},
        {"needle": "A fact.", "question": "Which?", "answer": "none"},
        {"needle": "A fact.", "question": "Which?", "answer": "a fact", "together": True},
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Needle(**options)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (lambda path: Needle(lengths=(50_000,)), ConfigError),
        (lambda path: Needle(lengths=(200,)), ConfigError),
        (lambda path: Needle(lengths=(1000, 1000)), ConfigError),
        (lambda path: Needle(depths=(0.5, 0.5)), ConfigError),
        (lambda path: Needle(lengths=(5000,), haystack=(path,)), TaskDataError),
        (lambda path: Needle(haystack=(path.with_name("missing"),)), TaskDataError),
    ],
)
def test_an_impossible_document_is_explained(tiny: TaskModel, tmp_path: Path, task: Callable[[Path], Needle], kind: type) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One sentence. Another one.", encoding="utf-8")
    with pytest.raises(kind):
        list(task(short).items(tiny))


def test_pieces_of_the_haystack_join_to_its_text() -> None:
    text = "A sentence. Another!\n\n    indented code\n\n" + "x" * 1000 + " " + "many words " * 100 + "end.\n"
    pieces = Haystack(text, TOKENIZER).pieces
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 401


def test_heat_maps_show_the_mean_of_every_cell() -> None:
    cells = [
        {"item": f"{length}/{depth}/{i}", "group": "needle", "method": method, "values": [value], "details": {}}
        | {"facts": {"length": length, "depth": depth}}
        for method, good in (("full", 1.0), ("kivi", 0.0))
        for length in (1000, 4000)
        for depth in (0.0, 0.5, 1.0)
        for i, value in enumerate((1.0, good))
    ]
    figures = Needle().figures([], cells)
    panels = [axes for axes in figures["needle"].axes if axes.get_title()]
    assert [panel.get_title() for panel in panels] == ["full: 100.0 %", "kivi: 50.0 %"]
    assert [text.get_text() for text in panels[1].texts] == ["0.50"] * 6
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["1,000", "4,000"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "50", "100"]
    image = BytesIO()
    figures["needle"].savefig(image, format="png")
    assert image.getvalue().startswith(b"\x89PNG")
    assert Needle().figures([], []) == {}


def test_every_option_has_a_help_and_settings_are_plain() -> None:
    assert all(option.metadata["help"] for option in fields(Needle))
    settings = Needle(haystack=(Path("a.txt"),)).settings()
    assert settings["haystack"] == ["a.txt"]
    assert settings["lengths"] == [1000, 2000, 4000]


class Answered:
    """A prefilled prompt of which only the logits are read."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Ends:
    """A model that ends with the tokenizer's end token."""

    class generation_config:
        eos_token_id = TOKENIZER.eos_token_id
