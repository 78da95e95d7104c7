"""Key-value retrieval and LongEval lines: the benchmarks' formats, generated and from files."""

from __future__ import annotations

import gzip
import json
import random
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Prepared, TaskModel
from specache.eval.tasks.retrieval import ADJECTIVES, NOUNS, KeyValues, Lines, Retrieval, make_key_values, make_lines
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

TOKENIZER = byte_tokenizer()
SMALL: dict[str, Any] = {"keys": (4,), "lines": (6,), "documents": 2, "questions": 3}

KV_EXAMPLE = """Extract the value corresponding to the specified key in the JSON object below.

JSON data:
{"a1": "b1",
 "a2": "b2",
 "a3": "b3"}

Key: "a2"
Corresponding value:"""

LINES_EXAMPLE = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain "
    "line index. Now the record start:\n\n"
    "line torpid-kid: REGISTER_CONTENT is <2416>\n"
    "line ad hoc-wind-chime: REGISTER_CONTENT is <29541>\n"
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number. "
)


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return TaskModel(llama(vocab_size=len(TOKENIZER), max_position_embeddings=4000), TOKENIZER, "tiny")


def test_key_values_are_worded_as_in_lost_in_the_middle() -> None:
    assert KeyValues([("a1", "b1"), ("a2", "b2"), ("a3", "b3")]).prompt("a2") == KV_EXAMPLE


def test_lines_are_worded_as_in_longeval() -> None:
    assert Lines([("torpid-kid", "2416"), ("ad hoc-wind-chime", "29541")]).prompt("torpid-kid") == LINES_EXAMPLE


def test_generated_pairs_are_a_json_object_of_uuids() -> None:
    document = make_key_values(random.Random(0), 30)
    data = re.search(r"JSON data:\n(\{.*\})\n\nKey", document.prompt(document.records[7][0]), re.DOTALL)
    assert data is not None
    pairs = json.loads(data[1])
    assert list(pairs.items()) == document.records
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)
        for text in [*pairs, *pairs.values()]
    )


def test_generated_lines_have_names_and_numbers_like_the_benchmarks() -> None:
    document = make_lines(random.Random(0), 500)
    assert len(dict(document.records)) == 500
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", key) and 1 <= int(value) <= 50_000 for key, value in document.records)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)


def test_items_depend_on_options_and_seed_alone(tiny: TaskModel) -> None:
    items = list(Retrieval(**SMALL).items(tiny))
    assert items == list(Retrieval(**SMALL).items(tiny))
    other = list(Retrieval(**SMALL, seed=1).items(tiny))
    assert [item.id for item in items] == [item.id for item in other]
    assert all(mine.prompt != theirs.prompt for mine, theirs in zip(items, other, strict=True))
    assert len({item.id for item in items}) == len(items) == 2 * 2 * 3
    assert {item.group for item in items} == {"kv/4", "lines/6"}


@pytest.mark.parametrize("answer_prefix", [False, True])
def test_questions_about_one_document_share_its_tokens(tiny: TaskModel, answer_prefix: bool) -> None:
    items = list(Retrieval(**SMALL, answer_prefix=answer_prefix).items(tiny))
    for start in range(0, len(items), 3):
        document = items[start : start + 3]
        (shared,) = {item.shared for item in document}
        assert len({tuple(item.prompt[:shared]) for item in document}) == 1
        whole = TOKENIZER.decode(document[0].prompt[:shared])
        assert all(item.facts["references"][0] in whole for item in document), "the whole document"
        assert len({item.facts["key"] for item in document}) == 3


def test_answer_prefix_starts_the_answer(tiny: TaskModel) -> None:
    for item in Retrieval(**SMALL, answer_prefix=True).items(tiny):
        text = TOKENIZER.decode(item.prompt)
        beginning = text.rpartition("<assistant>")[2]
        record = beginning + item.facts["references"][0]
        assert record + ('"' if item.facts["kind"] == "kv" else ">") in text, "it continues like the document's record"


@pytest.mark.parametrize(
    ("document", "prediction", "right"),
    [
        (KeyValues, 'The value is "AB-12".', True),
        (KeyValues, "ab-1", False),
        (Lines, "The <REGISTER_CONTENT> in line torpid-kid is <12>.", True),
        (Lines, "Line 12 has <7>.", False),
        (Lines, "It is 012", True),
        (Lines, "none", False),
    ],
)
def test_answers_are_judged_as_in_the_benchmarks(document: type[KeyValues] | type[Lines], prediction: str, right: bool) -> None:
    assert document.right(prediction, "ab-12" if document is KeyValues else "12") is right


def test_it_runs_over_the_full_cache_and_starts_from_the_shared_document(tiny: TaskModel) -> None:
    task = Retrieval(kinds=("lines",), lines=(4,), documents=1, questions=2, max_new_tokens=4)
    first, second = task.items(tiny)
    document = Prefilled(tiny.model, first.prompt[: first.shared])
    for item in (first, second):
        prompt = Prefilled(tiny.model, item.prompt, like=document)
        with torch.no_grad(), attached(tiny.model):
            session = FullMethod().start(prompt)
            measured = task.measure(tiny, task.prepare(tiny, item, prompt), session)
            session.close()
        assert measured.values in ([0.0], [1.0])
        assert measured.details["references"] == item.facts["references"]


@pytest.mark.parametrize(
    ("kind", "answer", "prefix", "value"),
    [
        ("kv", '{}"\n x', True, 1.0),
        ("kv", "x{}", False, 1.0),
        ("lines", "{}>. Line 7", True, 1.0),
        ("lines", "{}>. Line 7", False, 0.0),
    ],
)
def test_text_after_a_prefixed_value_does_not_count(tiny: TaskModel, kind: str, answer: str, prefix: bool, value: float) -> None:
    task = Retrieval(**SMALL, kinds=(kind,), answer_prefix=prefix)
    item = next(iter(task.items(tiny)))
    tokens = TOKENIZER(answer.format(*item.facts["references"]))["input_ids"] + [TOKENIZER.eos_token_id]
    logits = iter(torch.nn.functional.one_hot(torch.tensor(tokens), len(TOKENIZER)).float())
    prompt: Any = SimpleNamespace(logits=next(logits))
    session: Any = SimpleNamespace(feed=lambda token: next(logits))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=TOKENIZER.eos_token_id))
    assert task.measure(TaskModel(model, TOKENIZER, "recites"), Prepared(item, prompt), session).values == [value]


def kv_line(**changes: Any) -> dict[str, Any]:
    return {"ordered_kv_records": [["a", "1"], ["b", "2"], ["c", "3"]], "key": "b", "value": "2"} | changes


def lines_line(**changes: Any) -> dict[str, Any]:
    return {"random_idx": ["torpid-kid", 0], "expected_number": 2416, "prompt": LINES_EXAMPLE} | changes


def write(path: Path, records: list[Any]) -> Path:
    content = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["kv.jsonl", "kv.jsonl.gz"])
def test_key_value_files_ask_their_own_question_first(tiny: TaskModel, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [kv_line(), kv_line(key="c", value="3"), kv_line()])
    task = Retrieval(kinds=("kv",), kv_files=(path,), documents=2, questions=2)
    items = list(task.items(tiny))
    assert [(item.group, item.facts["key"]) for item in items[::2]] == [("kv/3", "b"), ("kv/3", "c")]
    assert items[1].facts["key"] != "b"
    assert items[3].facts["key"] != "c"
    assert len(list(Retrieval(kinds=("kv",), kv_files=(path,), documents=0, questions=1).items(tiny))) == 3


def test_longeval_files_keep_names_with_spaces(tiny: TaskModel, tmp_path: Path) -> None:
    path = write(tmp_path / "lines.jsonl", [lines_line()])
    first, second = Retrieval(kinds=("lines",), lines_files=(path,), questions=5, chat=False).items(tiny)
    assert TOKENIZER.decode(first.prompt) == LINES_EXAMPLE
    assert first.facts["references"] == ["2416"]
    assert (second.facts["key"], second.facts["references"]) == ("ad hoc-wind-chime", ["29541"])


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ('{"key": ', "not JSON"),
        ({"key": "a", "value": "1"}, "'ordered_kv_records' is missing"),
        (kv_line(ordered_kv_records=[["a"]]), "pairs of strings"),
        (kv_line(ordered_kv_records=[["b", "2"], ["b", "2"]]), "different keys"),
        (kv_line(value="3"), "no record has the key 'b' and the value '3'"),
        (kv_line(key=7), "'key' is int, expected str"),
    ],
)
def test_a_malformed_key_value_line_is_named(tiny: TaskModel, tmp_path: Path, record: Any, complaint: str) -> None:
    path = write(tmp_path / "kv.jsonl", [kv_line(), record])
    with pytest.raises(TaskDataError, match=rf"kv\.jsonl, line 2: .*{complaint}"):
        list(Retrieval(kinds=("kv",), kv_files=(path,)).items(tiny))


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (lines_line(expected_number=7), "no record has the key 'torpid-kid'"),
        (lines_line(random_idx=[]), "name of a line"),
        (lines_line(prompt=LINES_EXAMPLE.replace("Tell me", "Say")), "not worded"),
        (lines_line(prompt=""), "at least two records"),
    ],
)
def test_a_malformed_longeval_line_is_named(tiny: TaskModel, tmp_path: Path, record: Any, complaint: str) -> None:
    path = write(tmp_path / "lines.jsonl", [lines_line(), record])
    with pytest.raises(TaskDataError, match=rf"lines\.jsonl, line 2: .*{complaint}"):
        list(Retrieval(kinds=("lines",), lines_files=(path,)).items(tiny))


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("json",)},
        {"kinds": ()},
        {"keys": (1,)},
        {"questions": 0},
        {"documents": 0},
        {"lines": (99_999,)},
        {"kinds": ("kv", "kv")},
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Retrieval(**options)


def test_a_document_longer_than_the_model_is_refused(tiny: TaskModel) -> None:
    with pytest.raises(ConfigError, match="positions"):
        list(Retrieval(keys=(200,)).items(tiny))


def test_every_option_has_a_help_and_settings_are_plain() -> None:
    assert all(option.metadata["help"] for option in fields(Retrieval))
    assert json.loads(json.dumps(Retrieval(kv_files=(Path("a"),)).settings()))["kv_files"] == ["a"]
