"""lm_eval's `local-completions` against a real server: a local task file, scored and generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.server.real_server import SERVED_NAME, RealServer

if any(find_spec(name) is None for name in ("lm_eval", "tenacity", "aiohttp")):
    pytest.skip("lm_eval is not installed (pip install 'lm_eval[api]')", allow_module_level=True)

QUESTIONS = [
    {"question": f"{number} plus one is", "choices": [f" {number + 1}", " a tree", " not known at all"], "answer": 0}
    for number in range(6)
]
SCORED = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
GENERATED = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def server(long_folder: Path) -> Iterator[RealServer]:
    with RealServer(long_folder) as started:
        yield started


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two task files and their data; `datasets` keeps its own copy in the same folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in (("choice", SCORED), ("words", GENERATED)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    return tmp_path


def evaluated(model: str, arguments: dict[str, Any], tasks: Path, task: str) -> list[Any]:
    """Return what the model said to every question."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(model, model_args=arguments, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_scores_and_answers_are_those_of_the_model(server: RealServer, long_folder: Path, tasks: Path, tokenizer: str):
    remote: dict[str, Any] = {"base_url": f"{server.url}/v1/completions", "model": SERVED_NAME, "tokenizer_backend": tokenizer}
    if tokenizer == "huggingface":
        remote["tokenizer"] = str(long_folder)
    local = {"pretrained": str(long_folder), "dtype": "float32", "device": "cpu"}
    scored, expected = (evaluated(*model, tasks, "tiny_choice") for model in (("local-completions", remote), ("hf", local)))
    assert len(scored) == len(QUESTIONS)
    for mine, theirs in zip(scored, expected, strict=True):
        for (score, greedy), (stock_score, stock_greedy) in zip((one[0] for one in mine), (one[0] for one in theirs), strict=True):
            assert score == pytest.approx(stock_score, abs=2e-3) and greedy == stock_greedy
    said, stock = (evaluated(*model, tasks, "tiny_words") for model in (("local-completions", remote), ("hf", local)))
    assert said == stock and any(one[0][0] for one in said)
