"""`specache demo`: one prefill, three answers side by side."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from specache.cli.demo_document import DemoError, make_task
from tests.cli.running import one_line, run, run_json
from tests.cli.tiny_chat import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_the_same_seed_plants_the_same_number_in_the_same_document():
    first = make_task(TOKENIZER, tokens=3000, seed=1, depth=0.3)
    assert first == make_task(TOKENIZER, tokens=3000, seed=1, depth=0.3)
    assert first.code != make_task(TOKENIZER, tokens=3000, seed=2, depth=0.3).code
    assert first.prompt.count(first.code) == 1 and first.prompt.endswith(first.question)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_fact_is_planted_at_its_depth(depth):
    task = make_task(TOKENIZER, tokens=20_000, seed=1, depth=depth)
    assert task.prompt.index(task.fact) / len(task.prompt) == pytest.approx(depth, abs=0.06)


def test_the_document_has_about_the_length_asked_for():
    task = make_task(TOKENIZER, tokens=20_000, seed=1, depth=0.5)
    assert 18_000 < len(TOKENIZER(task.prompt)["input_ids"]) <= 20_150


@pytest.mark.parametrize("tokens", [0, 150, 10**9])
def test_impossible_lengths_are_refused(tokens):
    with pytest.raises(DemoError, match="--tokens"):
        make_task(TOKENIZER, tokens=tokens, seed=1, depth=0.5)


def test_an_answer_is_right_if_it_has_the_number():
    task = make_task(TOKENIZER, tokens=1000, seed=1, depth=0.5)
    assert task.is_right(f"It is {task.code}.") and not task.is_right(f"It is {task.code[:-1]}")


def test_a_real_model_answers_three_times_over_one_prefill(demo_model):
    document = run_json("demo", "--tokens", "900", "--seed", "3", "--depth", "0.5")
    ours, full, alone = document["runs"]
    assert [run["config"]["policy"] for run in (ours, full, alone)] == ["verified", "full", "none"]
    assert ours["right"] and full["right"]
    assert ours["config"]["slow_tier"] == "ram"
    assert ours["stats"]["guess_rate"] is not None and ours["stats"]["hit_rate"] is not None
    assert ours["stats"]["fast_bytes"] < full["stats"]["fast_bytes"] and full["stats"]["slow_bytes"] == 0
    assert document["seed"] == 3 and document["expected"] in document["fact"]


def test_another_policy_can_be_shown(demo_model):
    document = run_json("demo", "--tokens", "400", "--seed", "3", "--policy", "on-demand")
    assert [run["config"]["policy"] for run in document["runs"]] == ["on-demand", "full", "none"]


def test_the_three_answers_share_one_prefill(demo_model):
    read = []

    def counting(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            read.append(inputs[0].shape[1])

    hook = register_module_forward_pre_hook(counting)
    try:
        document = run_json("demo", "--tokens", "400", "--seed", "3")
    finally:
        hook.remove()
    prompt = document["runs"][0]["prompt_tokens"]
    answers = sum(2 * run["new_tokens"] + 2 for run in document["runs"])
    assert prompt < sum(read) < prompt + answers


def test_the_table_shows_what_came_out(demo_model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    result = run("demo", "--tokens", "500", "--seed", "3", "--depth", "0.5", "--bits", "4")
    text = one_line(result.stdout)
    rows = ("answer", "fast memory", "slow memory", "guesses right", "prefetch hits", "time to first", "tokens per second")
    assert all(row in text for row in rows)
    assert "(seed 3)" in text and "SpeCache, 4 bits" in text


def test_too_long_a_document_is_refused_before_anything_is_read(demo_model):
    assert "positions" in one_line(run("demo", "--tokens", "9000", code=2).stderr)
