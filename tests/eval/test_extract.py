"""Structured extraction: the generated documents, and how written and forced answers are scored."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.specache import FullMethod
from specache.eval.methods.streaming_llm import StreamingLLMMethod
from specache.eval.prefilled import Prefilled
from specache.eval.setting_fields import from_json
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel
from specache.eval.tasks.extract import Extract
from specache.eval.tasks.extract.answers import ANSWER_PREFIX, write_answer
from specache.eval.tasks.extract.draft import Draft
from specache.eval.tasks.extract.list_scores import field_scores, intersection_over_union, parse_items
from specache.eval.tasks.extract.schemas import SCHEMAS, Schema, stated_fields
from specache.eval.tasks.extract.schemas.vocabulary import WORDS
from specache.eval.tasks.forced_answer import ForcedAnswer
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

TOKENIZER = byte_tokenizer()  # a byte is a token
SHORT: dict[str, Any] = {"examples": 0, "values_per_1000": 2.0, "lengths": (3000,)}
EVERY_SCHEMA = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return TaskModel(llama(vocab_size=len(TOKENIZER), max_position_embeddings=40_000), TOKENIZER, "tiny")


def prompt_text(item: Item) -> str:
    return str(TOKENIZER.decode(item.prompt))


def draft_of(schema: Schema, seed: int = 0, **shares: float) -> Draft:
    return Draft(schema, Random(seed), 20, corrected=shares.get("corrected", 0.3), repeated=shares.get("repeated", 0.5))


def sentences_of(draft: Draft) -> list[str]:
    return [sentence for sentence in draft.text(0).replace(". ", ".\n").split("\n")[2:] if sentence]


@EVERY_SCHEMA
def test_every_record_is_stated_and_corrections_come_after_what_they_correct(schema: Schema) -> None:
    draft = draft_of(schema)
    text = draft.text(30)
    old_values = {(one.key, one.field): one for one in draft.corrections}
    assert len(draft.records) == len({record[schema.key] for record in draft.records}) == 20
    assert len(old_values) == 6
    for record in draft.records:
        about = [sentence for sentence in sentences_of(draft) if str(record[schema.key]) in sentence]
        for field, value in record.items():
            stated = [place for place, sentence in enumerate(about) if says(sentence, value)]
            assert stated, f"{field} of {record} is not in {about}"
            if correction := old_values.get((record[schema.key], field)):
                assert correction.new == value != correction.old
                first = next(place for place, sentence in enumerate(about) if says(sentence, correction.old))
                assert first < stated[-1] and says(text, correction.old)
                assert correction.old not in record.values(), "the old value is not in the answer"


def says(sentence: str, value: Any) -> bool:
    """Return whether a value is in a sentence, as a word and not as a part of a number."""
    return f" {value} " in f" {sentence} ".translate(str.maketrans(dict.fromkeys(".,;:'", " ")))


@EVERY_SCHEMA
def test_records_stand_in_the_order_of_the_text(schema: Schema) -> None:
    draft = draft_of(schema)
    places = [draft.text(40).index(str(record[schema.key])) for record in draft.records]
    assert places == sorted(places)


@EVERY_SCHEMA
def test_repeated_facts_are_stated_twice(schema: Schema) -> None:
    draft = draft_of(schema, corrected=0.0)
    assert len(draft.repetitions) == 10 and not draft_of(schema, repeated=0.0).repetitions
    records = {record[schema.key]: record for record in draft.records}
    for key, field in draft.repetitions:
        about = [sentence for sentence in sentences_of(draft) if str(key) in sentence]
        assert sum(says(sentence, records[key][field]) for sentence in about) == 2


@EVERY_SCHEMA
def test_a_longer_document_states_the_same_facts(schema: Schema) -> None:
    draft = draft_of(schema)
    short, long = draft.text(5), draft.text(400)
    assert len(long) > 5 * len(short)
    assert long == draft_of(schema).text(400), "however many were written before"
    for sentence in sentences_of(draft):
        assert sentence in short.replace("\n\n", " ") and sentence in long.replace("\n\n", " ")
    for record in draft.records:
        assert long.count(str(record[schema.key])) == short.count(str(record[schema.key]))


@EVERY_SCHEMA
def test_a_schema_has_sentences_for_every_field(schema: Schema) -> None:
    others = set(schema.fields) - {schema.key}
    for templates in (schema.introductions, schema.statements, schema.repetitions):
        assert all(schema.key in stated_fields(template) for template in templates)
        assert set().union(*map(stated_fields, templates)) == set(schema.fields)
    assert set(schema.corrections) == others
    assert all(
        {"key", "new"} <= stated_fields(one) <= {"key", "old", "new"} for form in schema.corrections.values() for one in form
    )
    assert all(stated_fields(template) <= set(WORDS) for template in (*schema.fillers, schema.title))
    assert len({schema.record(Random(seed))[schema.key] for seed in range(1000)}) > 400


def test_items_depend_on_options_and_seed_alone(tiny: TaskModel) -> None:
    task = Extract(**SHORT)
    items = list(task.items(tiny))
    assert items == list(Extract(**SHORT, forced=True).items(tiny)), "both answers are about the same documents"
    assert [(item.id, item.group, item.facts["schema"]) for item in items] == [
        (f"3000/{number}", "extract/3000", schema) for number, schema in enumerate(SCHEMAS)
    ]
    other = list(Extract(**SHORT, seed=1).items(tiny))
    assert all(mine.prompt != theirs.prompt for mine, theirs in zip(items, other, strict=True))


@pytest.mark.parametrize("chat", [True, False])
def test_prompt_and_answer_fill_the_length(tiny: TaskModel, chat: bool) -> None:
    for item in Extract(lengths=(8000, 16_000), documents=4, values_per_1000=4.0, chat=chat).items(tiny):
        length = int(item.id.split("/")[0])
        needed = len(item.prompt) + item.facts["max_new_tokens"]
        assert length - max(150, 0.01 * length) <= needed <= length, "at most one sentence is missing"
        assert item.facts["max_new_tokens"] > len(write_answer(item.facts["references"]).text)
        text = prompt_text(item)
        assert text.endswith(ANSWER_PREFIX) and text.startswith("<user>") is chat


def test_records_grow_with_the_length_up_to_a_limit(tiny: TaskModel) -> None:
    task = Extract(lengths=(8000, 16_000, 32_000), documents=1, values_per_1000=4.0, most_items=20, examples=0)
    assert [len(item.facts["references"]) for item in task.items(tiny)] == [8, 16, 20], "beside the instruction of 300 tokens"


def test_examples_show_right_answers_and_share_no_record_with_the_document(tiny: TaskModel) -> None:
    item, *_ = Extract(lengths=(8000,), documents=1, values_per_1000=4.0, examples=2).items(tiny)
    first, second, asked = prompt_text(item).split("JSON:\n")[:3]
    shown = [parse_items(part) for part in (second, asked)]
    assert [len(records) for records in shown] == [3, 2]
    for text, records in zip((first, second), shown, strict=True):
        document = text.rpartition("Text:")[2]
        assert all(str(value) in document for record in records for value in record.values())
        assert "JSON" not in document
    keys = {record["article"] for records in shown for record in records}
    assert len(keys) == 5 and not keys & {record["article"] for record in item.facts["references"]}


def test_corrected_values_are_in_the_prompt_and_not_in_the_answer(tiny: TaskModel) -> None:
    (item,) = Extract(lengths=(16_000,), documents=1, values_per_1000=6.0, corrected=1.0).items(tiny)
    references = {record["article"]: record for record in item.facts["references"]}
    assert len(item.facts["corrected"]) == len(references) > 15
    for key, field, old, new in item.facts["corrected"]:
        assert references[key][field] == new != old
        assert str(old) in prompt_text(item)


RECORDS = [{"ship": "Grey Heron", "berth": 7}, {"ship": "Proud Gull", "berth": 12}, {"ship": "Royal Star", "berth": 7}]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (json.dumps(RECORDS), 3),
        ("Sure! Here it is:\n```json\n" + json.dumps(RECORDS, indent=2) + "\n```", 3),
        (json.dumps({"ships": RECORDS}), 3),
        (json.dumps(RECORDS)[:-9], 2),  # cut off within the third
        (json.dumps(RECORDS).replace("12}", "12, oops}"), 2),
        (json.dumps(RECORDS) + "\n\nText:\nMore.\n\nJSON:\n" + json.dumps(RECORDS), 3),
        (json.dumps(RECORDS)[1:], 3),
        ("[]", 0),
        ("", 0),
        ("{" * 5000, 0),
        ('[{"a": ' + "[" * 100_000, 0),
    ],
)
def test_complete_objects_of_a_list_count(text: str, count: int) -> None:
    items = parse_items(text)
    assert len(items) == count and all(item in RECORDS for item in items)


@pytest.mark.parametrize(
    ("items", "score"),
    [
        (RECORDS, 1.0),
        ([{"berth": "7", "Ship": " grey  HERON"}, {"ship": "Proud Gull", "berth": 12.0}, {"ship": "Royal Star", "berth": 7}], 1.0),
        (RECORDS[:2], 2 / 3),
        ([*RECORDS, RECORDS[0]], 3 / 4),  # the same object twice is one too many
        ([{**RECORDS[0], "berth": 8}, *RECORDS[1:]], 2 / 4),
        ([{**RECORDS[0], "tons": 1}, *RECORDS[1:]], 2 / 4),
        ([{"ship": "Grey Heron"}], 0.0),
        ([], 0.0),
    ],
)
def test_intersection_over_union_of_exact_objects(items: list[dict[str, Any]], score: float) -> None:
    assert intersection_over_union(items, RECORDS) == pytest.approx(score)


def test_an_empty_list_is_right_where_nothing_is_to_be_found() -> None:
    assert intersection_over_union([], []) == 1.0
    assert intersection_over_union(RECORDS, []) == 0.0


def test_a_code_is_not_a_number() -> None:
    assert intersection_over_union([{"code": "007"}], [{"code": "7"}]) == 0.0
    assert intersection_over_union([{"price": "1,200"}], [{"price": 1200}]) == 1.0
    assert intersection_over_union([{"flag": "true"}], [{"flag": True}]) == 0.0


VALUES = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=8))
OBJECTS = st.dictionaries(st.text(max_size=5), st.one_of(VALUES, st.lists(VALUES, max_size=2)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_right_answer_scores_one_in_any_order(records: list[dict[str, Any]], rng: Any) -> None:
    shuffled = rng.sample(records, len(records))
    assert intersection_over_union(shuffled, records) == 1.0
    assert 0 <= intersection_over_union(records[1:], records) < 1


@settings(max_examples=50, deadline=None)
@given(st.lists(OBJECTS, min_size=2, max_size=6), st.data())
def test_a_written_answer_is_read_back_also_if_it_is_cut_off(records: list[dict[str, Any]], data: Any) -> None:
    answer = write_answer(records)
    text = ANSWER_PREFIX + answer.text
    assert json.dumps(json.loads(text)) == json.dumps(records)
    assert intersection_over_union(json.loads(text), records) == 1.0
    values = [json.dumps(value, ensure_ascii=False) for record in records for value in record.values()]
    assert [answer.text[begin:end] for begin, end in answer.values] == [
        value[1:-1] if value.startswith('"') else value for value in values
    ]
    kept = data.draw(st.integers(1, len(records) - 1))
    end = len(ANSWER_PREFIX + write_answer(records[:kept]).text) - len("\n]")
    assert [json.dumps(item) for item in parse_items(text[: end + 3])] == [json.dumps(record) for record in records[:kept]]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='[]{}",:\\ an1.-eE+\n', max_size=60))
def test_any_text_can_be_scored(text: str) -> None:
    items = parse_items(text)
    assert 0 <= intersection_over_union(items, RECORDS) <= 1
    field_scores(items, RECORDS, "ship")


def test_fields_are_compared_in_objects_of_the_same_key() -> None:
    references = [{"name": "a", "x": 1, "y": 2}, {"name": "b", "x": 3, "y": 4}, {"name": "c", "x": 5, "y": 6}]
    items = [{"name": "A", "x": 1, "y": 0}, {"name": "c", "x": 5}, {"name": "d", "x": 3, "y": 4}, {"name": "a", "x": 9, "y": 2}]
    assert field_scores(items, references, "name") == {"matched": 2, "fields": {"x": 1.0, "y": 0.0}, "mean": 0.5}
    assert field_scores([], references, "name") == {"matched": 0, "fields": {}, "mean": None}


def answered(tiny: TaskModel, item: Item, answer: str, **options: Any) -> tuple[Measurement, int]:
    """Let a model write `answer` -> what is measured, and the tokens that it was asked for."""
    tokens = [*TOKENIZER(answer)["input_ids"], TOKENIZER.eos_token_id]
    logits = iter(torch.nn.functional.one_hot(torch.tensor(tokens), len(TOKENIZER)).float())
    prompt: Any = SimpleNamespace(logits=next(logits))
    session: Any = SimpleNamespace(feed=lambda token: next(logits))
    measured = Extract(**SHORT, **options).measure(tiny, Prepared(item, prompt), session)
    return measured, len(tokens) - len(list(logits))


def test_a_written_answer_is_scored(tiny: TaskModel) -> None:
    item = next(iter(Extract(**SHORT).items(tiny)))
    references = item.facts["references"]
    right = write_answer(references).text
    measured, asked = answered(tiny, item, right + "\n\nText: more of it")
    assert measured.values == [1.0] and asked == len(right), "nothing is written after the list"
    assert measured.details["prediction"] == ANSWER_PREFIX + right
    assert measured.details["by_field"]["matched"] == len(references)
    wrong, _ = answered(tiny, item, write_answer([{**references[0], "price": 0}]).text)
    assert wrong.values == [0.0] and wrong.details["by_field"]["fields"] == {"price": 0.0, "stock": 1.0, "shelf": 1.0}


def test_a_list_within_an_object_does_not_end_the_answer(tiny: TaskModel, tmp_path: Path) -> None:
    nested = [{"ship": "Grey Heron", "crew": [{"name": "Ida"}]}, {"ship": "Proud Gull", "crew": [{"name": "Otto"}]}]
    (item,) = Extract(folder=write_file(tmp_path, "x.jsonl", [record_line(answer=nested)])).items(tiny)
    assert answered(tiny, item, write_answer(nested).text)[0].values == [1.0]


def test_an_answer_that_never_ends_is_cut_off(tiny: TaskModel) -> None:
    item = next(iter(Extract(**SHORT).items(tiny)))
    measured, asked = answered(tiny, item, write_answer(item.facts["references"] * 3).text)
    assert asked == item.facts["max_new_tokens"] and 0 < measured.values[0] < 1.01


def test_tokens_of_values_are_told_from_punctuation() -> None:
    records = [{"name": "Åse, the 2nd", "n": 12, "tags": ["a", "b"]}, {"name": "", "n": -3, "tags": None}]
    answer = write_answer(records)
    assert json.loads(ANSWER_PREFIX + answer.text) == records
    values = [answer.text[begin:end] for begin, end in answer.values]
    assert values == ["Åse, the 2nd", "12", '["a", "b"]', "", "-3", "null"]


def forced(tiny: TaskModel, item: Item, *methods: Any) -> list[Measurement]:
    task = Extract(**SHORT, forced=True)
    prompt = Prefilled(tiny.model, item.prompt)
    measured = []
    with torch.no_grad(), attached(tiny.model):
        prepared = task.prepare(tiny, item, prompt)
        for method in methods:
            session = method.start(prompt)
            measured.append(task.measure(tiny, prepared, session))
            session.close()
    prompt.close()
    return measured


@pytest.fixture(scope="module")
def short_item(tiny: TaskModel) -> Item:
    item = next(iter(Extract(examples=0, values_per_1000=2.0, lengths=(1200,), documents=1).items(tiny)))
    assert len(item.facts["references"]) == 1
    return item


def test_the_full_cache_keeps_every_token_and_a_method_that_drops_the_document_does_not(tiny: TaskModel, short_item: Item) -> None:
    full, dropped = forced(tiny, short_item, FullMethod(), StreamingLLMMethod(budget=0.01))
    values = sum(len(str(value)) for value in short_item.facts["references"][0].values())
    for result in (full, dropped):
        assert len(result.values) == values == len(result.tokens["right"]) == len(result.tokens["nll"])
        assert result.details["first_tokens"]["tokens"] == 4
    assert max(full.values) < 1e-6 and set(full.tokens["top1"]) == {1.0}
    assert full.tokens["right"] == full.tokens["full_right"] == dropped.tokens["full_right"]
    assert max(map(abs, full.tokens["nll_delta"])) < 1e-5
    assert sum(dropped.values) > 1000 * sum(full.values)
    assert min(dropped.tokens["top1"]) == 0.0
    assert [mine - theirs for mine, theirs in zip(dropped.tokens["nll"], full.tokens["nll"], strict=True)] == pytest.approx(
        dropped.tokens["nll_delta"], abs=1e-5
    )


def test_the_forced_answer_has_the_likelihood_of_a_plain_forward_pass(tiny: TaskModel, short_item: Item) -> None:
    (full,) = forced(tiny, short_item, FullMethod())
    right = write_answer(short_item.facts["references"])
    answer = ForcedAnswer.encode(TOKENIZER, right.text, right.values)
    with torch.no_grad():
        logits = tiny.model(torch.tensor([short_item.prompt + answer.tokens])).logits[0, -len(answer.tokens) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer.tokens), reduction="none")
    torch.testing.assert_close(torch.tensor(full.tokens["nll"]), nll[torch.tensor(answer.counted)], atol=1e-4, rtol=1e-4)


def record_line(**changes: Any) -> dict[str, Any]:
    record = {"text": "The Grey Heron lies at 7.", "question": "List all ships.", "answer": RECORDS}
    return {name: value for name, value in {**record, **changes}.items() if value is not None}


def write_file(folder: Path, name: str, records: list[Any]) -> Path:
    lines = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records)
    content = (json.dumps(records) if name.endswith(".json") else lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def test_documents_are_read_from_a_folder(tiny: TaskModel, tmp_path: Path) -> None:
    write_file(tmp_path, "b.jsonl", [record_line(), record_line(text="Second."), record_line(text="Third.")])
    write_file(tmp_path, "a.json", [record_line(answer=json.dumps({"ships": RECORDS}), question={"ship": "string"})])
    write_file(tmp_path, "c.jsonl.gz", [record_line(answer=RECORDS[0])])
    (tmp_path / "notes.txt").write_text("not read")
    items = list(Extract(folder=tmp_path, documents=2).items(tiny))
    assert [item.id for item in items] == ["a.json/1", "b.jsonl/1", "b.jsonl/2", "c.jsonl.gz/1"]
    assert {item.group for item in items} == {"extract/files"}
    assert [item.facts["references"] for item in items] == [RECORDS, RECORDS, RECORDS, RECORDS[:1]]
    assert {item.facts["key"] for item in items} == {"ship"}
    assert '"ship": "string"' in prompt_text(items[0]) and "Second." in prompt_text(items[2])
    assert len(list(Extract(folder=tmp_path, documents=0).items(tiny))) == 5


def test_field_names_are_options_and_long_documents_can_be_left_out(tiny: TaskModel, tmp_path: Path) -> None:
    folder = write_file(tmp_path, "x.jsonl", [{"context": "Short.", "schema": "List.", "target": RECORDS}])
    write_file(tmp_path, "y.jsonl", [{"context": "Long. " * 8000, "schema": "List.", "target": RECORDS}])
    names = {"text_field": "context", "question_field": "schema", "answer_field": "target"}
    with pytest.raises(ConfigError, match=r"y\.jsonl, line 1 \(--most-tokens leaves out longer ones\) needs .* positions"):
        list(Extract(folder=folder, **names).items(tiny))
    assert [item.id for item in Extract(folder=folder, most_tokens=2000, **names).items(tiny)] == ["x.jsonl/1"]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ('{"text": ', "not JSON"),
        (record_line(text=None), "'text' is missing; .* --text-field"),
        (record_line(question=None), "'question' is missing; .* --question-field"),
        (record_line(answer=None), "'answer' is missing; .* --answer-field"),
        (record_line(text=7), "'text' is int, expected str"),
        (record_line(text=" "), "must not be empty"),
        (record_line(answer="[{"), "'answer' is not JSON"),
        (record_line(answer=[]), "list of JSON objects"),
        (record_line(answer=["Grey Heron"]), "list of JSON objects"),
    ],
)
def test_a_malformed_line_is_named(tiny: TaskModel, tmp_path: Path, record: Any, complaint: str) -> None:
    folder = write_file(tmp_path, "ships.jsonl", [record_line(), record])
    with pytest.raises(TaskDataError, match=rf"ships\.jsonl, line 2: .*{complaint}"):
        list(Extract(folder=folder).items(tiny))


def test_a_folder_without_documents_is_refused(tiny: TaskModel, tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"has no file that ends in \.json"):
        list(Extract(folder=tmp_path).items(tiny))
    with pytest.raises(TaskDataError, match="is not a folder"):
        list(Extract(folder=tmp_path / "nowhere").items(tiny))
    (tmp_path / "x.json").write_text('[{"text": 1},\n oops]')
    with pytest.raises(TaskDataError, match=r"x\.json, line 2: not JSON"):
        list(Extract(folder=tmp_path).items(tiny))
    (tmp_path / "x.json").write_text('["no object"]')
    with pytest.raises(TaskDataError, match=r"x\.json, record 1: expected a JSON object"):
        list(Extract(folder=tmp_path).items(tiny))


def test_wrong_options_are_refused(tiny: TaskModel) -> None:
    for options, complaint in (
        ({"schemas": ("poem",)}, "schemas must be of catalogue"),
        ({"schemas": ()}, "schemas must be of"),
        ({"corrected": 1.5}, "corrected must be a share"),
        ({"values_per_1000": 0.0}, "values-per-1000 must be more than 0"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"documents": 0}, "--documents 0 means all of each file"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Extract(**options)
    with pytest.raises(ConfigError, match="positions"):
        list(Extract(lengths=(10**6,)).items(tiny))
    with pytest.raises(ConfigError, match=r"need [\d,]+ tokens with 2 examples, got 300"):
        list(Extract(lengths=(300,)).items(tiny))


def test_a_task_is_restored_from_its_settings(tmp_path: Path) -> None:
    for task in (Extract(), Extract(forced=True, folder=tmp_path, schemas=("log",), corrected=0.5)):
        assert from_json(Extract, json.loads(json.dumps(task.settings()))) == task


def test_the_unit_follows_from_the_answer() -> None:
    assert Extract().unit == "score" and Extract(forced=True).unit == "KL, nats"
