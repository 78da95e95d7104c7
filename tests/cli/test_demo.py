"""`specache demo`: one prefill, three answers side by side, and one from the session."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from specache.cli.demo_document import DemoError, make_task
from specache.cli.models import LoadedModel
from tests.cli.running import one_line, run, run_json
from tests.cli.tiny_chat import byte_tokenizer

TOKENIZER = byte_tokenizer()


@dataclass
class Shown:
    """A demo's document, the tokens of each pass, and the folder of temporary files."""

    document: dict[str, Any]
    read: list[int]
    folder: Path


def test_the_same_seed_plants_the_same_number_in_the_same_document():
    first = make_task(TOKENIZER, tokens=3000, seed=1, depth=0.3)
    assert first == make_task(TOKENIZER, tokens=3000, seed=1, depth=0.3)
    assert first.code != make_task(TOKENIZER, tokens=3000, seed=2, depth=0.3).code
    assert first.prompt.count(first.code) == 1 and first.prompt.endswith(first.question)
    second = first.next
    assert second.prompt.count(second.code) == 1 and second.prompt.endswith(second.question) and second.next is None
    assert first.prompt.removesuffix(first.question) == second.prompt.removesuffix(second.question)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_fact_is_planted_at_its_depth(depth):
    task = make_task(TOKENIZER, tokens=20_000, seed=1, depth=depth)
    assert task.prompt.index(task.fact) / len(task.prompt) == pytest.approx(depth, abs=0.06)
    assert task.prompt.index(task.next.fact) / len(task.prompt) == pytest.approx(depth / 2, abs=0.06)


def test_the_document_has_about_the_length_asked_for():
    task = make_task(TOKENIZER, tokens=20_000, seed=1, depth=0.5)
    assert 18_000 < len(TOKENIZER(task.prompt)["input_ids"]) <= 20_150


@pytest.mark.parametrize("tokens", [0, 150, 10**9])
def test_impossible_lengths_are_refused(tokens):
    with pytest.raises(DemoError, match="--tokens"):
        make_task(TOKENIZER, tokens=tokens, seed=1, depth=0.5)


def test_an_answer_is_right_if_it_has_the_number():
    task = make_task(TOKENIZER, tokens=1000, seed=1, depth=0.5)
    assert task.is_right(f"It is {task.code}.") and task.is_right(task.code)
    for wrong in (task.code[:-1], f"{task.code}7", f"{task.code}7. It is {task.code}", "none"):
        assert not task.is_right(f"It is {wrong}.")


@pytest.fixture(scope="module")
def shown(demo_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """One demo of the real model, run by its defaults."""
    read: list[int] = []
    folder = tmp_path_factory.mktemp("temporary")
    embed = torch.nn.functional.embedding

    def counting(ids: torch.Tensor, *more: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return embed(ids, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", counting)  # a hook, or another forward, would leave no draft tokens
        patch.setattr(tempfile, "tempdir", str(folder))
        document = run_json("demo", "--tokens", "600", "--seed", "3", "--depth", "0.5")
    return Shown(document, read, folder)


def test_a_real_model_answers_three_times_over_one_prefill_and_once_from_the_session(shown):
    document = shown.document
    ours, full, alone = document["runs"]
    assert [run["config"]["policy"] for run in (ours, full, alone)] == ["on-demand", "full", "none"]
    assert ours["right"] and full["right"]
    assert ours["config"]["slow_tier"] == "ram-inplace"
    assert ours["stats"]["fast_bytes"] < full["stats"]["fast_bytes"] and full["stats"]["slow_bytes"] == 0
    assert document["seed"] == 3 and document["expected"] in document["fact"]
    again = document["next"]["run"]
    assert again["right"] and document["next"]["expected"] in again["text"]
    assert again["config"]["slow_tier"] == "disk" and again["stats"]["guess_rate"] is not None
    assert again["prompt_tokens"] - again["reused_tokens"] < 40 < again["reused_tokens"]


def test_the_demo_leaves_nothing_behind(shown):
    assert not list(shown.folder.iterdir())


def test_the_answers_share_one_prefill(shown):
    prompt = shown.document["runs"][0]["prompt_tokens"]
    runs = [*shown.document["runs"], shown.document["next"]["run"]]
    answers = sum(2 * run["new_tokens"] + 2 for run in runs) + runs[-1]["prompt_tokens"] - runs[-1]["reused_tokens"]
    assert prompt < sum(shown.read) < prompt + answers


def test_the_table_shows_what_came_out_of_another_policy_and_other_bits(demo_model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    result = run("demo", "--tokens", "400", "--seed", "3", "--bits", "4", "--policy", "verified", "--top-k", "64")
    text = one_line(result.stdout)
    rows = ("answer", "fast memory", "slow memory", "time to first", "tokens per second", "tokens read for it", "on disk")
    assert all(row in text for row in rows)
    assert re.search(r"guesses right \d+% - -", text.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " "))  # the first cache guesses
    assert "(seed 3)" in text and "SpeCache, 4 bits" in text


def test_too_long_a_document_is_refused_before_anything_is_read(demo_model):
    assert "positions" in one_line(run("demo", "--tokens", "9000", code=2).stderr)
