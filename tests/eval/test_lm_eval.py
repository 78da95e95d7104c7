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


def pair(folder: Path, **options: Any) -> tuple[Any, Any]:
    """Return lm_eval's own model and ours with the ordinary cache, over the same files."""
    from lm_eval.models.huggingface import HFLM

    from specache.eval.lm_eval import SpeCacheLM

    shared = {"pretrained": str(folder), "dtype": "float32", "device": "cpu", **options}
    return HFLM(batch_size=1, **shared), SpeCacheLM(policy="full", **shared)


def answer(model: Any, context: str, **arguments: Any) -> str:
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", {}, (context, {"do_sample": False, "max_gen_toks": 8, **arguments}), 0)
    return str(model.generate_until([request], disable_tqdm=True)[0])


def rolling(model: Any, text: str) -> float:
    from lm_eval.api.instance import Instance

    return float(model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0])


def changed(tiny_folder: Path, folder: Path, **settings: Any) -> Path:
    """Copy the tiny model with other settings of its tokenizer (or `rope`) into a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    if rope := settings.pop("rope", None):
        model.config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_stop_text_that_begins_in_the_context_ends_no_answer(tiny_folder):
    """For example `\\ndef`, after a context that ends in a line break."""
    lm_evals_own, ours = pair(tiny_folder)
    contexts = [f"What is {number}?\n" for number in range(12)]
    answers = {context: answer(ours, context) for context in contexts}
    context, whole = next((context, text) for context, text in answers.items() if text[:1].isascii() and text[:1].isprintable())
    for stop in ("\n" + whole[0], "?\n" + whole[0], whole[0]):
        expected = answer(lm_evals_own, context, until=[stop])
        assert answer(ours, context, until=[stop]) == expected == ("" if stop == whole[0] else whole), stop


def test_a_first_token_that_is_asked_for_is_added_whatever_the_tokenizer_does(tiny_folder, tmp_path):
    folder = changed(tiny_folder, tmp_path, bos_token="<user>")
    texts = {add: pair(folder, add_bos_token=add) for add in (None, True, False)}
    for add, (lm_evals_own, ours) in texts.items():
        assert ours.tok_encode("ab") == lm_evals_own.tok_encode("ab"), add
        assert rolling(ours, "the cat sat") == pytest.approx(rolling(lm_evals_own, "the cat sat"), abs=1e-4), add
    assert len(texts[True][1].tok_encode("ab")) == 1 + len(texts[None][1].tok_encode("ab"))


def test_a_template_without_system_messages_leaves_them_out(tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = refusal + AutoTokenizer.from_pretrained(tiny_folder).chat_template
    lm_evals_own, ours = pair(changed(tiny_folder, tmp_path, chat_template=template))
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with pytest.warns(UserWarning, match="no system role"):
        text = ours.apply_chat_template(conversation)
    assert text == lm_evals_own.apply_chat_template(conversation) == "<user>Hello<end><assistant>"


def test_without_a_limit_of_positions_the_length_is_what_the_configuration_states(tiny_folder, tmp_path):
    lm_evals_own, ours = pair(changed(tiny_folder, tmp_path, rope={"rope_type": "dynamic", "factor": 2.0}))
    assert ours.max_length == lm_evals_own.max_length == 512


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
