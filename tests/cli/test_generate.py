"""`specache generate`: what it prints where, and that its answers are the library's."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specache import stats
from specache.cli import console
from specache.config import SpeCacheConfig
from tests.cli.running import one_line, run, run_json
from tests.cli.tiny_chat import POSITIONS, save_tiny_chat_model

PROMPT = "What is it? " * 30  # longer than residual and group, so that there is a low-bit copy
RESULT_KEYS = {"text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason"}
STATS_KEYS = {
    *("fast_bytes", "slow_bytes", "full_bytes", "fast_ratio", "hot_ratio", "model_ratio", "total_bytes", "rows_selected"),
    *("rows_ready", "hit_rate", "guess_rate", "wait_s", "prefill_s", "decode_s", "tokens_per_s"),
}


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[str, ...]:
    return ("generate", "-m", str(tiny_folder), "-n", "12", "--dtype", "float32", "--threads", "1")


def stock_answer(folder: Path, prompt: str, **arguments) -> list[int]:
    """Return the new tokens of transformers' own `generate`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    sequences = model.generate(ids, max_new_tokens=12, **{"repetition_penalty": 1.0, **arguments})
    return sequences[0, ids.shape[1] :].tolist()


def test_the_prompt_has_more_low_bit_pairs_than_are_fetched():
    """Otherwise nothing here would be computed over the low-bit copy."""
    assert SpeCacheConfig().low_bit_length(len(PROMPT)) > SpeCacheConfig().top_k


def test_json_is_one_object_with_stable_keys(tiny):
    document = run_json(*tiny, "--prompt", PROMPT)
    assert set(document) == {"results", "weights", "config", "stats"}
    assert set(document["results"][0]) == RESULT_KEYS
    assert document["stats"].keys() >= STATS_KEYS
    assert document["config"]["bits"] == 2
    assert document["results"][0]["new_tokens"] == len(document["results"][0]["token_ids"]) == 12
    assert document["results"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_in_the_output(tiny, weights):
    assert run_json(*tiny, "--prompt", PROMPT)["weights"] == "fp32"
    document = run_json(*tiny, "--prompt", PROMPT, "--weights", weights)
    assert document["weights"] == weights and document["results"][0]["new_tokens"] == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_compiling_changes_no_answer_and_is_not_counted(tiny, monkeypatch):
    """By a clock on which compiling a function takes a day."""
    from torch._dynamo.callback import callback_handler

    batch, day, days = (*tiny, "--prompt", PROMPT), 86_400, 0

    def compiled_one(*_: object) -> None:
        nonlocal days
        days += 1

    monkeypatch.setattr(stats, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + days * day))
    monkeypatch.setattr(callback_handler, "end_callbacks", [compiled_one])
    eager, compiled = run_json(*batch), run_json(*batch, "--compile")
    assert compiled["results"] == eager["results"]
    assert days and compiled["stats"]["decode_s"] < day


def test_without_a_compiler_compiling_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in one_line(run(*tiny, "--prompt", PROMPT, "--compile", code=2).stderr)


def test_an_unknown_weight_format_names_those_that_there_are(tiny):
    assert "'auto', 'bf16', 'int8', 'int4'" in one_line(run(*tiny, "--prompt", PROMPT, "--weights", "int3", code=2).stderr)


def test_stdout_is_the_answer_and_nothing_else(tiny):
    text = run_json(*tiny, "--prompt", PROMPT)["results"][0]["text"]
    result = run(*tiny, "--prompt", PROMPT)
    assert result.stdout == text + "\n"
    assert "fast memory" in result.stderr


def test_cache_options_reach_the_cache(tiny):
    options = (
        "--bits 4 --group-size 32 --residual 16 --top-k 8 --policy speculative --slow-tier ram --hot-set 64KiB --prefill-chunk 50"
    )
    config = run_json(*tiny, "--prompt", PROMPT, *options.split())["config"]
    expected = {"bits": 4, "group_size": 32, "residual": 16, "top_k": 8, "policy": "speculative", "slow_tier": "ram"}
    assert config.items() >= {**expected, "hot_set": 65536, "prefill_chunk": 50}.items()


@pytest.mark.parametrize("policy", ["full", "verified"])
def test_greedy_is_the_default_whatever_the_model_suggests(tiny, tiny_folder, policy):
    answer = run_json(*tiny, "--raw", "--prompt", PROMPT, "--policy", policy, "--slow-tier", "ram", "--top-k", "512")
    assert answer["results"][0]["token_ids"] == stock_answer(tiny_folder, PROMPT, do_sample=False)


def test_temperature_zero_is_greedy(tiny):
    greedy = run_json(*tiny, "--prompt", PROMPT)
    assert run_json(*tiny, "--prompt", PROMPT, "--temperature", "0", "--top-p", "0.5")["results"] == greedy["results"]


def test_a_seed_repeats_what_stock_samples(tiny, tiny_folder):
    sampling = ("--raw", "--prompt", PROMPT, "--policy", "full", "--temperature", "0.9", "--top-p", "0.95", "--seed")
    first = run_json(*tiny, *sampling, "7")["results"][0]["token_ids"]
    assert run_json(*tiny, *sampling, "8")["results"][0]["token_ids"] != first
    torch.manual_seed(7)
    assert first == stock_answer(tiny_folder, PROMPT, do_sample=True, temperature=0.9, top_p=0.95, top_k=0)


def test_the_prompt_may_come_from_stdin(tiny, tmp_path):
    expected = run_json(*tiny, "--prompt", PROMPT)["results"]
    assert run_json(*tiny, stdin=PROMPT)["results"] == expected
    assert run_json(*tiny, "--prompt-file", "-", stdin=PROMPT)["results"] == expected
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert run_json(*tiny, "--prompt-file", file)["results"] == expected


def test_several_files_are_a_batch_and_each_is_answered_as_if_alone(tiny, tmp_path):
    prompts = ["short", PROMPT, PROMPT[:90] + "?"]
    files = [tmp_path / f"{index}.txt" for index in range(3)]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt)
    arguments = list(itertools.chain.from_iterable(("--prompt-file", file) for file in files))
    batch = run_json(*tiny, *arguments)["results"]
    assert batch == [run_json(*tiny, "--prompt", prompt)["results"][0] for prompt in prompts]
    printed = run(*tiny, *arguments)
    assert printed.stdout == "".join(result["text"] + "\n" for result in batch)
    assert all(f"==> {file} <==" in printed.stderr.splitlines() for file in files)


def test_several_prompts_are_a_batch_and_each_is_answered(tiny):
    prompts = ["short", PROMPT]
    batch = run_json(*tiny, "--prompt", prompts[0], "-p", prompts[1])["results"]
    assert batch == [run_json(*tiny, "--prompt", prompt)["results"][0] for prompt in prompts]
    shown = run(*tiny, "--prompt", prompts[0], "--prompt", prompts[1]).stderr.splitlines()
    assert "==> --prompt 1 <==" in shown and "==> --prompt 2 <==" in shown


def test_a_path_after_an_equals_sign_may_begin_in_the_users_folder(tiny, tmp_path, monkeypatch):
    """Shells leave `--option=~/path` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    expected = run_json(*tiny, "--prompt", PROMPT)["results"]
    asked = ("--prompt-file=~/prompt.txt", "--session", "one", "--session-dir=~/sessions")
    assert run_json(*tiny, *asked)["results"] == expected
    assert (tmp_path / "sessions/one").is_dir()


def test_stop_text_ends_the_answer_and_is_left_out(tiny):
    text = run_json(*tiny, "--prompt", PROMPT)["results"][0]["text"]
    stop = next(c for c in text[3:] if c.isascii() and c.isprintable())
    result = run_json(*tiny, "--prompt", PROMPT, "--stop", stop, "--stop", "never said")["results"][0]
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"
    assert run(*tiny, "--prompt", PROMPT, "--stop", stop).stdout == result["text"] + "\n"


def test_stop_strings_and_answers_of_the_models_files(tiny, tmp_path):
    """The texts end an answer; there is one answer to each prompt."""
    text = run_json(*tiny, "--prompt", PROMPT)["results"][0]["text"]
    stop = next(c for c in text[3:] if c.isascii() and c.isprintable())
    save_tiny_chat_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stop_strings": [stop], "num_return_sequences": 3}))
    command = [str(tmp_path) if argument == tiny[2] else argument for argument in tiny]
    result = run(*command, "--prompt", PROMPT)
    assert result.stdout == text[: text.index(stop)] + "\n" and "warning" not in result.stderr
    assert len(run_json(*command, "--prompt", PROMPT, "--temperature", "1")["results"]) == 1


def test_chat_is_the_default_with_a_template_and_raw_is_not(tiny, tmp_path):
    def prompt_tokens(*arguments: str | Path) -> int:
        return run_json(*arguments, "--prompt", "hello")["results"][0]["prompt_tokens"]

    assert prompt_tokens(*tiny) == len("hello") + 3  # <user>, <end>, <assistant>
    assert prompt_tokens(*tiny, "--raw") == len("hello")
    assert prompt_tokens(*tiny, "--system", "be") == len("hello") + 3 + len("be") + 2
    save_tiny_chat_model(tmp_path, chat_template=False)
    assert prompt_tokens("generate", "-m", tmp_path, "-n", "1") == len("hello")


def test_the_default_length_stops_at_the_models_positions(tiny_folder):
    prompt = "x" * (POSITIONS - 9)
    result = run_json("generate", "-m", tiny_folder, "--raw", "--prompt", prompt)["results"][0]
    assert result["new_tokens"] == 9 and result["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--bits", "3"], "error: --bits must be one of 1, 2, 4", 2),
        (["-k", "0"], "error: --top-k must be a positive number", 2),
        (["--group-size", "48"], "error: --group-size must divide", 2),
        (["--residual", "-1"], "error: --residual must be", 2),
        (["--hot-set", "lots"], "--hot-set 'lots'", 2),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more", 2),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0", 2),
        (["--stop", ""], "--stop needs a text", 2),
        (["--policy", "psychic"], "--policy", 2),
        (["--prompt", "  "], "the prompt from --prompt 2 is empty", 1),
        (["--prompt", "x" * (POSITIONS + 1), "--raw"], f"positions for {POSITIONS}", 1),
        (["--prompt-file", "x"], "exclude each other", 2),
        (["--raw", "--system", "be brief"], "--system needs a conversation", 2),
        (["--model", "./missing"], "no file or folder ./missing", 1),
        (["--model", "no-such/model"], "cannot find the model 'no-such/model'", 1),
    ],
)
def test_a_usage_error_is_one_clear_line(tiny, arguments, message, code):
    result = run(*tiny, "--prompt", "hello", *arguments, code=code)
    assert message in one_line(result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_unusable_prompt_files_are_refused(tiny, tmp_path, content):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    message = "is not UTF-8" if content.startswith(b"\xff") else "is empty"
    assert message in one_line(run(*tiny, "--prompt-file", file, code=1).stderr)
    assert "cannot read" in run(*tiny, "--prompt-file", tmp_path / "missing.txt", code=1).stderr


def test_debug_shows_where_an_error_came_from(tiny, monkeypatch):
    monkeypatch.setenv("SPECACHE_DEBUG", "1")
    result = run(*tiny, "--prompt", "hello", "--bits", "3", code=1)
    assert "bits must be" in str(result.exception)


@pytest.fixture
def interrupt_after_five_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C while the answer streams."""
    from specache.cli.streaming import AnswerRecorder

    original = AnswerRecorder.put

    def put(self: AnswerRecorder, value: torch.Tensor) -> None:
        original(self, value)
        if self.token_ids and len(self.token_ids[0]) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerRecorder, "put", put)


@pytest.mark.usefixtures("interrupt_after_five_tokens")
@pytest.mark.parametrize("tier", ["ram", "ram-inplace"])
def test_ctrl_c_prints_the_partial_answer(tiny, tier):
    arguments = (*tiny, "--prompt", PROMPT, "--slow-tier", tier)
    document = run_json(*arguments, code=console.EXIT_INTERRUPTED)
    assert document["results"][0]["finish_reason"] == "interrupted"
    assert document["results"][0]["new_tokens"] == 5
    assert document["stats"]["fast_bytes"] > 0
    result = run(*arguments, code=console.EXIT_INTERRUPTED)
    assert result.stdout == document["results"][0]["text"] + "\n"
    assert "fast memory" in result.stderr


@pytest.fixture
def without_end(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a model whose answers take minutes: it has many positions, and no end."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.config.max_position_embeddings = 200_000
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # the likeliest token is above 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_ctrl_c_in_a_real_process(without_end):
    command = [sys.executable, "-m", "specache.cli.main", "generate", "-m", str(without_end), "--prompt", PROMPT]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100000", "--raw"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    process.stdout.read(4)  # it streams
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == console.EXIT_INTERRUPTED
    assert b"fast memory" in errors and b"Traceback" not in errors


def test_a_real_model_answers_and_stops_at_the_end_of_its_turn(demo_model):
    document = run_json("generate", "-m", "demo", "--prompt", "What is the capital of France?", "-n", "40")
    result = document["results"][0]
    assert "Paris" in result["text"]
    assert result["finish_reason"] == "stop"
    assert demo_model.tokenizer.decode(result["token_ids"][-1]) == "<|im_end|>"
    assert json.dumps(document)
