"""LongBench: metrics, prompts and truncation equal the benchmark's; exported files can be read."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.catalogue import task_class
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Prepared, TaskModel
from specache.eval.tasks.longbench import LongBench
from specache.eval.tasks.longbench.metrics import (
    classification,
    code_similarity,
    common_subsequence,
    count_share,
    indel_ratio,
    normalize,
    paragraph_share,
    qa_f1,
    rouge_l,
)
from specache.eval.tasks.longbench.prompt_texts import SUBSETS
from specache.eval.tasks.longbench.task import cut_middle, score
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def tiny() -> TaskModel:
    return TaskModel(llama(vocab_size=len(TOKENIZER), max_position_embeddings=4000), TOKENIZER, "tiny")


def record(**changes: Any) -> dict[str, Any]:
    plain = {"input": "Who?", "context": "Ada did.", "answers": ["Ada"], "length": 2, "dataset": "hotpotqa", "all_classes": None}
    return plain | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one example of each task, `trec` with its classes."""
    for name in SUBSETS:
        classes = {"all_classes": ["Person", "Place"], "answers": ["Person"]} if name == "trec" else {}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record(dataset=name, **classes)) + "\n", encoding="utf-8")
    return tmp_path


def test_normalised_words_have_no_case_articles_or_punctuation() -> None:
    assert normalize("The  Cat's (a) an hat—and A.") == ["cats", "hat—and"]


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("the Cat.", "a cat", 1.0),
        ("a black cat sat", "black cat", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("cat cat", "cat", 2 * 0.5 * 1 / 1.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "the", 0.0),
    ],
)
def test_f1_of_words(prediction: str, reference: str, value: float) -> None:
    assert qa_f1(prediction, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)),
        ("a b c", "a b c", 1.0),
        ("a a a a", "a", 1.0),
        ("c b a", "a b c", 1 / 3),
        ("a b. c d", "c d. a b", 1.0),
        ("x", "y", 0.0),
        ("", "a", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l_is_over_distinct_words_of_all_sentences(prediction: str, reference: str, value: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(value, abs=1e-7)


def test_the_longest_common_subsequence_is_the_one_rouge_chooses() -> None:
    assert common_subsequence("abcbdab", "bdcaba") == list("bdab")
    assert common_subsequence(["a", "b"], ["b", "a"]) == ["b"]


@pytest.mark.parametrize(
    ("prediction", "classes", "value"),
    [
        ("It is a Person", ["Person", "Place"], 1.0),
        ("Person or Place", ["Person", "Place"], 0.5),
        ("Place", ["Person", "Place"], 0.0),
        ("person", ["Person", "Place"], 0.0),
        ("Person", ["Per", "Person"], 1.0),
        ("Person", ["Per", "Pers", "Person"], 0.5),  # the benchmark's walk skips the name after a removed one
    ],
)
def test_classification_counts_the_class_names(prediction: str, classes: list[str], value: float) -> None:
    assert classification(prediction, "Person", classes) == value


@pytest.mark.parametrize(("prediction", "value"), [("7", 1.0), ("7 of 12, so 7", 2 / 3), ("17", 0.0), ("seven", 0.0)])
def test_counts_are_the_share_of_right_numbers(prediction: str, value: float) -> None:
    assert count_share(prediction, "7") == pytest.approx(value)
    assert paragraph_share(prediction, "Paragraph 7") == pytest.approx(value)


@pytest.mark.parametrize(
    ("one", "other", "ratio"), [("abcd", "abcd", 1), ("abcd", "abxd", 0.75), ("abc", "cadb", 4 / 7), ("", "", 1), ("", "a", 0)]
)
def test_indel_ratio(one: str, other: str, ratio: float) -> None:
    assert indel_ratio(one, other) == pytest.approx(ratio)
    assert indel_ratio(other, one) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("prediction", "value"),
    [
        ("\n\nreturn x\nmore", 1.0),
        ("```python\n# comment\n// comment\nreturn x", 1.0),
        ("return y", 0.88),  # 14 / 16, to whole per cent
        ("# only a comment", 0.0),
    ],
)
def test_code_similarity_is_of_the_first_line_of_code(prediction: str, value: float) -> None:
    assert code_similarity(prediction, "return x") == value


def test_the_best_reference_and_only_the_first_line_count() -> None:
    assert score(SUBSETS["hotpotqa"], "Ada", ["Grace", "Ada"], []) == 1.0
    assert score(SUBSETS["triviaqa"], "\nAda\nGrace", ["Ada"], []) == 1.0
    assert score(SUBSETS["hotpotqa"], "\nAda\nGrace", ["Ada"], []) < 1.0


def test_tasks_prompts_and_answer_lengths_are_the_benchmarks() -> None:
    assert len(SUBSETS) == 16
    assert {name for name, subset in SUBSETS.items() if not subset.chat} == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, subset in SUBSETS.items() if subset.first_line} == {"trec", "triviaqa", "samsum"}
    assert {name for name, subset in SUBSETS.items() if subset.one_line} == {"samsum"}
    assert all("{context}" in subset.prompt for subset in SUBSETS.values())
    without_input = {name for name, subset in SUBSETS.items() if "{input}" not in subset.prompt}
    assert without_input == {"gov_report", "multi_news", "passage_count", "lcc"}
    lengths = {512: ["gov_report", "qmsum", "multi_news"], 128: ["narrativeqa", "qasper", "samsum"]}
    lengths |= {64: ["multifieldqa_en", "trec", "lcc", "repobench-p"]}
    lengths |= {32: ["hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en"]}
    assert {name: subset.max_new_tokens for name, subset in SUBSETS.items()} == {
        name: length for length, names in lengths.items() for name in names
    }


def test_prompts_are_filled_in_and_chat_is_left_out_where_the_benchmark_does(tiny: TaskModel, folder: Path) -> None:
    texts = {item.facts["subset"]: TOKENIZER.decode(item.prompt) for item in LongBench(data=folder).items(tiny)}
    assert texts["triviaqa"].endswith("The following are some examples.\n\nAda did.\n\nWho?")
    assert texts["repobench-p"] == "Please complete the code given below. \nAda did.Who?Next line of code:\n"
    assert texts["hotpotqa"].startswith("<user>Answer the question based on the given passages.")
    assert texts["hotpotqa"].endswith("\n\nQuestion: Who?\nAnswer:<end><assistant>")
    raw = {item.facts["subset"]: TOKENIZER.decode(item.prompt) for item in LongBench(data=folder, chat=False).items(tiny)}
    assert raw["hotpotqa"].endswith("Question: Who?\nAnswer:")


def test_braces_in_a_context_are_text(tiny: TaskModel, tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_text(json.dumps(record(context="x = {input} {y}\n")), encoding="utf-8")
    (item,) = LongBench(data=tmp_path, subsets=("lcc",)).items(tiny)
    assert "x = {input} {y}\n" in TOKENIZER.decode(item.prompt)


def test_a_long_prompt_loses_its_middle(tiny: TaskModel, tmp_path: Path) -> None:
    assert cut_middle(TOKENIZER, "abcdefghij", 10) == "abcdefghij"
    assert cut_middle(TOKENIZER, "abcdefghij", 6) == "abchij"
    assert cut_middle(TOKENIZER, "abcdefghij", 7) == "abchij"
    long = record(context="begin " + "middle " * 2000 + "end")
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(long), encoding="utf-8")
    (item,) = LongBench(data=tmp_path, subsets=("hotpotqa",)).items(tiny)
    text = TOKENIZER.decode(item.prompt)
    assert len(item.prompt) == 4000 - 600 + 3, "with the template's three tokens"
    assert text.startswith("<user>Answer the question")
    assert "begin middle" in text
    assert "middle end" in text
    (item,) = LongBench(data=tmp_path, subsets=("hotpotqa",), max_length=1000).items(tiny)
    assert len(item.prompt) == 1003


@pytest.mark.parametrize(
    ("changes", "answers", "classes"),
    [
        ({}, ["Ada"], []),
        ({"answers": '["Ada", "Grace"]', "all_classes": '["A", "B"]'}, ["Ada", "Grace"], ["A", "B"]),
        ({"answers": "12.50"}, ["12.50"], []),
        ({"answers": "Ada", "all_classes": "null"}, ["Ada"], []),
    ],
)
def test_exported_files_can_be_read(
    tiny: TaskModel, tmp_path: Path, changes: dict[str, Any], answers: list[str], classes: list[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qasper.jsonl").write_text(json.dumps(record(**changes)) + "\n", encoding="utf-8")
    (item,) = LongBench(data=tmp_path, subsets=("qasper",)).items(tiny)
    assert item.facts["references"] == answers
    assert item.facts["classes"] == classes


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"input": ', "not JSON"),
        (json.dumps({"input": "", "context": ""}), "'answers' is missing"),
        (json.dumps(record(answers=[])), "'answers' is empty"),
        (json.dumps(record(answers=[1])), "list of strings"),
        (json.dumps(record(context=None)), "'context' is NoneType, expected str"),
    ],
)
def test_a_malformed_line_is_named(tiny: TaskModel, tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record()) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(TaskDataError, match=rf"qasper\.jsonl, line 2: .*{complaint}"):
        list(LongBench(data=tmp_path, subsets=("qasper",)).items(tiny))


def test_missing_files_and_classes_are_explained(tiny: TaskModel, tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="not a folder"):
        list(LongBench(data=tmp_path / "missing").items(tiny))
    with pytest.raises(TaskDataError, match=r"no qasper\.jsonl"):
        list(LongBench(data=tmp_path, subsets=("qasper",)).items(tiny))
    (tmp_path / "trec.jsonl").write_text(json.dumps(record()), encoding="utf-8")
    with pytest.raises(TaskDataError, match="'all_classes' is empty"):
        list(LongBench(data=tmp_path, subsets=("trec",)).items(tiny))


def test_without_a_network_the_error_says_what_to_pass(tiny: TaskModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TaskDataError, match="--data FOLDER"):
        list(LongBench(subsets=("qasper",)).items(tiny))


def test_the_hubs_archive_is_read_in_place(tiny: TaskModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("data/qasper_e.jsonl", json.dumps(record(answers=["other"])))
        files.writestr("data/qasper.jsonl", json.dumps(record()) + "\n" + json.dumps(record(answers=["Grace"])))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: str(archive))
    items = list(LongBench(subsets=("qasper",)).items(tiny))
    assert [item.facts["references"] for item in items] == [["Ada"], ["Grace"]]
    with pytest.raises(TaskDataError, match=r"no trec\.jsonl"):
        list(LongBench(subsets=("trec",)).items(tiny))
    archive.write_bytes(b"not a zip file")
    with pytest.raises(TaskDataError, match="is broken"):
        list(LongBench(subsets=("qasper",)).items(tiny))


def answer(tiny: TaskModel, folder: Path, subset: str, text: str) -> dict[str, Any]:
    """Return what is measured when the model's greedy answer is `text`."""
    task = LongBench(data=folder, subsets=(subset,))
    (item,) = task.items(tiny)
    tokens = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    logits = iter(torch.nn.functional.one_hot(torch.tensor(tokens), len(TOKENIZER)).float())
    prompt: Any = SimpleNamespace(logits=next(logits))
    session: Any = SimpleNamespace(feed=lambda token: next(logits))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=TOKENIZER.eos_token_id))
    measured = task.measure(TaskModel(model, TOKENIZER, "recites"), Prepared(item, prompt), session)
    return {"value": measured.values[0], **measured.details}


def test_a_cell_keeps_prediction_and_references(tiny: TaskModel, folder: Path) -> None:
    assert answer(tiny, folder, "hotpotqa", "the Ada.") == {"value": 1.0, "prediction": "the Ada.", "references": ["Ada"]}


# task, what its record holds, an answer, its score, and one that scores 0
EXAMPLES: list[tuple[str, dict[str, Any], str, float, str]] = [
    ("narrativeqa", {"answers": ["Miss Bates", "Bates"]}, "Bates.", 1.0, "Emma"),
    ("qasper", {"answers": ["unanswerable"]}, "Unanswerable", 1.0, "yes"),
    ("multifieldqa_en", {"answers": ["in the year 1815"]}, "1815", 2 * (1 / 1) * (1 / 3) / (1 + 1 / 3), "1816"),
    ("hotpotqa", {}, "the Ada.", 1.0, "Grace"),
    ("2wikimqa", {}, "Ada", 1.0, "no"),
    ("musique", {"answers": ["Ada", "Ada Lovelace"]}, "Ada Lovelace", 1.0, "Grace Hopper"),
    ("gov_report", {"input": "", "answers": ["the budget grew"]}, "the budget fell", 2 / 3, "nothing"),
    ("qmsum", {"answers": ["they agreed"]}, "they agreed", 1.0, "none"),
    ("multi_news", {"input": "", "answers": ["rain is expected"]}, "rain is expected", 1.0, "sun"),
    ("trec", {"answers": ["Person"], "all_classes": ["Person", "Place"]}, "Type: Person\nQuestion: Place", 1.0, "Place"),
    ("triviaqa", {"answers": ["Ada", "Lovelace"]}, "Lovelace\nPassage: more", 1.0, "Passage:"),
    ("samsum", {"answers": ["Ada will come"]}, "Ada will come", 1.0, "Bob"),
    ("passage_count", {"input": "", "answers": ["7"]}, "7 or 8", 0.5, "seven"),
    ("passage_retrieval_en", {"answers": ["Paragraph 12"]}, "Paragraph 12", 1.0, "Paragraph 1"),
    ("lcc", {"input": "", "answers": ["return x"]}, "# next\nreturn x\n", 1.0, "```"),
    ("repobench-p", {"answers": ["return x"]}, "\nreturn x", 1.0, "// return x"),
]


@pytest.mark.parametrize(("subset", "changes", "right", "value", "wrong"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_every_task_from_its_file_to_its_score(
    tiny: TaskModel, tmp_path: Path, subset: str, changes: dict[str, Any], right: str, value: float, wrong: str
) -> None:
    hub_only = {"language": "en", "_id": "0"}
    (tmp_path / f"{subset}.jsonl").write_text(json.dumps(record(dataset=subset, **changes) | hub_only) + "\n", encoding="utf-8")
    assert answer(tiny, tmp_path, subset, right)["value"] == pytest.approx(value, abs=1e-7)
    assert answer(tiny, tmp_path, subset, wrong)["value"] == 0.0


def test_every_task_has_an_example() -> None:
    assert [example[0] for example in EXAMPLES] == list(SUBSETS)


@pytest.mark.parametrize("subset", SUBSETS)
def test_an_answer_ends_at_the_tasks_length(tiny: TaskModel, folder: Path, subset: str) -> None:
    longest = "x" * (SUBSETS[subset].max_new_tokens + 1)
    assert answer(tiny, folder, subset, longest)["prediction"] == longest[:-1]


def test_samsum_ends_at_a_line_break_but_not_before_a_token(tiny: TaskModel, folder: Path) -> None:
    assert answer(tiny, folder, "samsum", "Ada\nDialogue: more")["prediction"] == "Ada"
    assert answer(tiny, folder, "qasper", "Ada\nmore")["prediction"] == "Ada\nmore"
    assert answer(tiny, folder, "samsum", "\nAda")["prediction"] != "", "a line break is not taken as the first token"


def test_longbench_runs_over_the_full_cache(tiny: TaskModel, folder: Path) -> None:
    task = LongBench(data=folder, subsets=("triviaqa",))
    (item,) = task.items(tiny)
    prompt = Prefilled(tiny.model, item.prompt)
    with torch.no_grad(), attached(tiny.model):
        session = FullMethod().start(prompt)
        measured = task.measure(tiny, task.prepare(tiny, item, prompt), session)
        session.close()
    assert measured.values == [0.0]


def test_the_limit_takes_the_first_examples(tiny: TaskModel, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_text("\n".join(json.dumps(record(input=str(i))) for i in range(5)), encoding="utf-8")
    items = list(LongBench(data=tmp_path, subsets=("qasper",), limit=2).items(tiny))
    assert [item.id for item in items] == ["qasper/0", "qasper/1"]
    assert items == list(LongBench(data=tmp_path, subsets=("qasper",)).items(tiny))[:2]


@pytest.mark.parametrize(
    "options", [{"subsets": ("dureader",)}, {"subsets": ()}, {"limit": -1}, {"max_length": -1}, {"subsets": ("lcc", "lcc")}]
)
def test_contradicting_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LongBench(**options)


def test_a_prompt_must_fit_the_model() -> None:
    assert LongBench().longest_prompt(None) == 31_500
    assert LongBench().longest_prompt(131_072) == 31_500
    assert LongBench(max_length=100_000).longest_prompt(131_072) == 100_000
    assert LongBench().longest_prompt(8192) == 7592
    with pytest.raises(ConfigError, match="at most 7,592"):
        LongBench(max_length=8000).longest_prompt(8192)
    with pytest.raises(ConfigError, match="positions"):
        LongBench().longest_prompt(512)


def test_longbench_is_registered_with_a_help_for_every_option() -> None:
    assert task_class("longbench") is LongBench
    assert all(option.metadata["help"] for option in fields(LongBench))
    assert json.loads(json.dumps(LongBench(data=Path("d")).settings()))["data"] == "d"
