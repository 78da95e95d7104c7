"""lm-evaluation-harness over our model: with the ordinary cache it gives the numbers of `hf`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import specache

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'specache[lm-eval]')")

WORDS = ["the cat ", "sat on a mat ", "and looked ", "at the moon ", "while a dog ", "slept "]
LONG = "".join(WORDS[i * i % 7 % 6] + str(i) for i in range(26))  # about 300 tokens: a byte is one

TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["the moon at night", "a tree", " "]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "b"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of task files over three documents, one of them without context."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": text, "answer": "moon"} for text in (LONG, LONG[:90], "What?")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{body}")
    return folder


@pytest.fixture(scope="module")
def evaluate(tiny_folder: Path, tasks: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs lm_eval and returns the answers per task."""
    from lm_eval.tasks import TaskManager

    import specache.eval.lm_eval  # noqa: F401 - registers the model

    def run(model: str, settings: str = "", **options: Any) -> dict[str, Any]:
        arguments = f"pretrained={tiny_folder},dtype=float32{settings}"
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=1,
            device="cpu",
            bootstrap_iters=0,
            **options,
        )
        return {
            task: [sample["resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
            for task, samples in results["samples"].items()
        }

    return run


@pytest.fixture(scope="module")
def expected(evaluate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return evaluate("hf")


def numbers(answers: Any) -> list[float]:
    """Return every log-likelihood and greedy flag, in order."""
    if isinstance(answers, list | tuple):
        return [number for each in answers for number in numbers(each)]
    return [float(answers)]


@pytest.mark.parametrize("settings", ["policy=full", "policy=verified,top_k=1000000,bits=1", "policy=on-demand,top_k=1000000"])
def test_exact_attention_gives_the_numbers_of_lm_evals_own_model(evaluate, expected, settings):
    answers = evaluate("specache", f",group_size=16,residual=16,{settings}")
    assert answers["tiny_answer"] == expected["tiny_answer"]
    for task in ("tiny_choice", "tiny_text"):
        assert numbers(answers[task]) == pytest.approx(numbers(expected[task]), abs=1e-4, rel=1e-6), task


def test_the_low_bit_copy_alone_gives_other_numbers(evaluate, expected):
    answers = evaluate("specache", ",group_size=16,residual=16,policy=none,bits=1")
    assert numbers(answers["tiny_text"])[0] != pytest.approx(numbers(expected["tiny_text"])[0], abs=0.1)


def test_texts_longer_than_max_length_are_windowed_and_truncated_alike(evaluate):
    expected = evaluate("hf", ",max_length=100")
    answers = evaluate("specache", ",policy=full,max_length=100")
    assert answers["tiny_answer"] == expected["tiny_answer"]
    assert numbers(answers["tiny_text"]) == pytest.approx(numbers(expected["tiny_text"]), abs=1e-4, rel=1e-6)
    assert numbers(answers["tiny_choice"]) == pytest.approx(numbers(expected["tiny_choice"]), abs=1e-4, rel=1e-6)


def test_chat_templates_are_applied_alike(evaluate):
    chat = {"apply_chat_template": True, "limit": 2}
    answers, expected = evaluate("specache", ",policy=full", **chat), evaluate("hf", **chat)
    assert answers["tiny_answer"] == expected["tiny_answer"]
    assert numbers(answers["tiny_choice"]) == pytest.approx(numbers(expected["tiny_choice"]), abs=1e-4, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"), [("bits=3", "bits"), ("sharpness=2", "no setting sharpness"), ("top_k=0", "top_k")]
)
def test_settings_that_do_not_exist_are_refused(evaluate, settings, message):
    with pytest.raises(specache.ConfigError, match=message):
        evaluate("specache", f",{settings}")


def run_command(folder: Path, tasks: Path, settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specache.eval.lm_eval", "--model", "specache"]
    settings = f"pretrained={folder},dtype=float32,{settings}"
    options = ["--model_args", settings, "--tasks", "tiny_choice", "--include_path", str(tasks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)


def test_the_command_finds_the_model_and_the_cpu(tiny_folder, tasks):
    done = run_command(tiny_folder, tasks, "bits=2,group_size=16")
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout


def test_the_command_reports_an_error_in_one_line(tiny_folder, tasks):
    done = run_command(tiny_folder, tasks, "bitz=2")
    assert done.returncode == 1 and "error: model_args: specache has no setting bitz" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_offers_the_model_as_an_entry_point():
    (entry,) = entry_points(group="lm_eval.models", name="specache")
    assert entry.value == "specache.eval.lm_eval:SpeCacheLM"
