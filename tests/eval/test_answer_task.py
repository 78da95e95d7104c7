"""What the tasks with many values in an answer share: lengths, forced and written answers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from specache.errors import ConfigError
from specache.eval.methods.specache import FullMethod
from specache.eval.methods_option import parse_methods
from specache.eval.prefilled import Prefilled
from specache.eval.report import task_of
from specache.eval.runner import describe_run, evaluate
from specache.eval.tasks.answer_task import AnswerTask
from specache.eval.tasks.base import Item, Prepared, TaskModel, greedy
from specache.eval.tasks.compare import Compare
from specache.eval.tasks.forced_answer import ForcedAnswer, prepare_forced
from specache.eval.tasks.multi_needle import MultiNeedle
from specache.eval.tasks.table import Table
from tests.eval.answering import beginning, prompt_text, right_answer, tiny_model, written

TASKS: dict[str, AnswerTask] = {
    "multi-needle": MultiNeedle(lengths=(3000,), needles=(4, 8), documents=2),
    "table": Table(lengths=(4500,), documents=2),
    "compare": Compare(lengths=(5500,), documents=2, companies=3, questions=4),
    "compare, in steps": Compare(lengths=(5500,), documents=1, companies=3, questions=4, steps=True),
}
UNIT = {"multi-needle": 420, "table": 700, "compare": 330, "compare, in steps": 330}  # tokens of a document's unit, at most


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return tiny_model()


@pytest.fixture(params=TASKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_items_depend_on_options_and_seed_alone(tiny: TaskModel, name: str) -> None:
    items = list(TASKS[name].items(tiny))
    assert items == list(TASKS[name].items(tiny))
    assert len({item.id for item in items}) == len(items) > 1
    other = list(replace(TASKS[name], seed=1).items(tiny))
    assert [item.id for item in other] == [item.id for item in items]
    assert not {tuple(item.prompt) for item in other} & {tuple(item.prompt) for item in items}


@pytest.mark.parametrize("length", [4500, 12_000])
def test_prompt_and_answer_fill_the_length(tiny: TaskModel, name: str, length: int) -> None:
    task = replace(TASKS[name], lengths=(length,))
    by_document: dict[str, list[int]] = {}
    for item in task.items(tiny):
        document = item.id.rpartition("/")[0] if item.shared else item.id
        by_document.setdefault(document, []).append(len(item.prompt) + item.facts["max_new_tokens"])
        assert item.facts["max_new_tokens"] > len(right_answer(item))
    for tokens in by_document.values():
        assert length - max(0.01 * length, UNIT[name]) <= max(tokens) <= length


def test_written_and_forced_answers_have_the_same_prompts(tiny: TaskModel, name: str) -> None:
    forced = replace(TASKS[name], forced=True)
    assert (TASKS[name].unit, forced.unit) == ("score", "KL, nats")
    assert list(forced.items(tiny)) == list(TASKS[name].items(tiny))


def test_the_right_answer_has_the_full_score_and_no_answer_has_none(tiny: TaskModel, name: str) -> None:
    for item in TASKS[name].items(tiny):
        right = written(tiny, TASKS[name], item, right_answer(item))
        assert set(right.values) == {1.0}
        assert set(written(tiny, TASKS[name], item, beginning(item)).values) == {0.0}


def test_the_answer_is_not_in_the_prompt_as_a_whole(tiny: TaskModel, name: str) -> None:
    for item in TASKS[name].items(tiny):
        assert right_answer(item).removeprefix(beginning(item)).strip() not in prompt_text(item) or name == "compare"
        assert not item.facts["answer"][0][1], "the beginning is given, and no value"


def test_without_a_chat_template_the_text_ends_where_the_answer_begins(name: str) -> None:
    model = tiny_model(chat_template=False)
    item = next(TASKS[name].items(model))
    assert str(model.tokenizer.decode(item.prompt)).endswith((".\n\n", "?\n\n"))


@pytest.mark.parametrize("name", ["multi-needle", "table", "compare, in steps"])
def test_the_full_cache_does_not_diverge_and_one_that_drops_the_context_does(tiny: TaskModel, name: str, tmp_path: Path) -> None:
    task = replace(TASKS[name], forced=True, documents=1, **({"needles": (4,)} if name == "multi-needle" else {"lengths": (4500,)}))
    if isinstance(task, Compare):
        task = replace(task, questions=1)
    outcome = evaluate(tiny, task, parse_methods("full,streaming-llm:budget=0.05"), tmp_path)
    full, dropping = outcome.rows
    assert full["mean"] < 1e-6 < dropping["mean"] / 1000
    values = [text for cell in outcome.cells[:1] for text, is_value in cell["facts"]["answer"] if is_value]
    assert full["tokens"] == dropping["tokens"] == len("".join(values).encode()), "one token per byte of a value"
    assert task_of(outcome.run) == task


@dataclass(frozen=True)
class OwnAnswer(MultiNeedle):
    """Along the full cache's own greedy answer: a model with random weights finds no needle."""

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        session = FullMethod().start(prompt)
        tokens = greedy(prompt.logits, session, 30, [])
        session.close()
        return Prepared(item, prompt, prepare_forced(ForcedAnswer(tokens, [False, *[True] * 29]), prompt))


def test_the_full_cache_keeps_all_and_one_that_drops_the_context_keeps_fewer(tiny: TaskModel, tmp_path: Path) -> None:
    task = OwnAnswer(lengths=(2500,), needles=(4,), documents=2, forced=True)
    outcome = evaluate(tiny, task, parse_methods("full,specache:top_k=3000,streaming-llm:budget=0.05"), tmp_path)
    full, fetching, dropping = outcome.rows
    assert (full["kept"], full["kept_n"]) == (fetching["kept"], fetching["kept_n"]) == (1.0, 58)
    assert dropping["kept_n"] == 58
    assert dropping["kept_ci95"][0] < dropping["kept"] < 1.0


@pytest.mark.parametrize(
    "options", [{"lengths": ()}, {"lengths": (100, 100)}, {"documents": 0}, {"lengths": (50_000,)}, {"lengths": (600,)}]
)
def test_impossible_options_are_explained(tiny: TaskModel, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lengths|documents|positions"):
        list(replace(TASKS[name], **options).items(tiny))


def test_every_option_has_a_help_and_settings_are_plain(tiny: TaskModel, name: str) -> None:
    task = TASKS[name]
    assert all(option.metadata["help"] for option in fields(task))
    assert task_of(describe_run(tiny, task, [], 0)) == task
