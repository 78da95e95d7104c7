"""`specache plan`: its output and its refusals. Nothing here loads weights."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from specache.cli.byte_sizes import parse_size
from specache.errors import ConfigError
from specache.platform import machine
from specache.tiers.row_memory import BLOCK_TOKENS
from tests.cli.running import one_line, run
from tests.cli.tiny_chat import POSITIONS

LARGE = ("plan", "--shape", "llama-3.2-3b", "--context", "131072")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan loaded a model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture(autouse=True)
def steady_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the available memory constant, since the plan reports it."""
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)


def plan_json(*arguments: str | Path) -> dict:
    return json.loads(run(*arguments, "--json", "-").stdout)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("512MiB", 2**29),
        ("1.5e9", 1_500_000_000),
        (" 7 kb ", 7000),
        ("4096", 4096),
        ("1TiB", 2**40),
        (".5GB", 5 * 10**8),
    ],
)
def test_a_size_is_parsed_to_bytes(text, size):
    assert parse_size(text, "--fast-memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "lots", "1 parsec", "nan", "0.1", "1e", "1e400", "1e308TB", "GB"])
def test_an_invalid_size_is_refused(text):
    with pytest.raises(ConfigError, match="--fast-memory"):
        parse_size(text, "--fast-memory")


def test_a_plan_prints_every_tier():
    text = one_line(run(*LARGE, "--slow-tier", "ram").stdout)
    for part in (
        "low-bit copy 2.11 GB",
        "hot set",
        "read buffers",
        "working set",
        "model weights 6.43 GB",
        "16-bit cache 15.03 GB",
    ):
        assert part in text
    assert "Fits" not in text and "fit with" not in text


def test_the_json_has_the_numbers_and_stable_keys():
    document = plan_json(*LARGE, "--fast-memory", "3GB", "--batch", "2")
    assert set(document) == {
        *("model", "dtype", "device", "context", "batch", "config", "plan", "traffic", "fits", "suggestions"),
        *("static_bytes", "auto_tier"),
        *("least_bytes", "longest_context", "largest_batch"),
    }
    assert document["plan"]["full_cache_bytes"] == 2 * 15_032_385_536
    assert document["fits"] is False and document["largest_batch"] == 1
    assert 65_536 < document["longest_context"] < 131_072
    assert document["config"]["fast_memory"] == 3 * 10**9
    assert {"bits": 1} in [one["changes"] for one in document["suggestions"]]


def test_a_gpus_static_buffers_are_beside_the_plan():
    """They are not part of what must fit: without room for them the ordinary step runs."""
    arguments = (*LARGE, "--slow-tier", "ram", "--device", "cuda")
    document = plan_json(*arguments)
    static, needed = document["static_bytes"], document["plan"]["fast_bytes"]
    assert 0 < static < needed / 10
    assert plan_json(*LARGE, "--slow-tier", "ram")["static_bytes"] == 0
    decode = document["plan"]["decode"]["total"]
    assert decode == needed  # else the buffers could have the room that prefilling leaves
    between = run(*arguments, "--fast-memory", str(needed + static // 2)).stdout
    assert "Fits" in between and "static buffers do not" in between
    roomy = run(*arguments, "--fast-memory", str(needed + static)).stdout
    assert "Fits" in roomy and "static buffers do not" not in roomy and "static buffers of a GPU's" in roomy


def test_a_suggestion_that_is_followed_fits():
    refused = run(*LARGE, "--fast-memory", "2GB", "--slow-tier", "ram").stdout
    assert "Does not fit" in refused
    suggestion = next(line for line in refused.splitlines() if "it fits with" in line)
    flags = suggestion.split("it fits with ")[1].split(":")[0].split()
    arguments = [argument for argument in LARGE if "--context" not in flags or argument not in ("--context", "131072")]
    assert "Fits" in run(*arguments, *flags, "--fast-memory", "2GB", "--slow-tier", "ram").stdout


def test_a_file_gets_the_same_as_standard_output(tmp_path):
    target = tmp_path / "plan.json"
    printed = run(*LARGE, "--json", target).stdout
    assert "fast memory" in printed
    assert json.loads(target.read_text()) == plan_json(*LARGE)


def test_a_folder_is_planned_by_its_config_alone(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    document = plan_json("plan", "-m", tmp_path, "--context", str(POSITIONS), "--dtype", "float32")
    tokens = -(-POSITIONS // BLOCK_TOKENS) * BLOCK_TOKENS
    assert document["plan"]["slow_bytes"] == 2 * 4 * 3 * 2 * 16 * tokens


def test_the_demo_is_planned_from_its_gguf(demo_model):
    document = plan_json("plan", "-m", "demo", "--context", "8000", "--dtype", "bfloat16")
    assert document["plan"]["full_cache_bytes"] == 2 * 2 * 30 * 3 * 64 * 8000
    assert document["plan"]["weight_bytes"] == pytest.approx(2 * 134.5e6, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--shape", "llama-3-8b", "--context", "0"], "--context must be 1 token or more, got 0", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--batch", "0"], "--batch must be from 1", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--fast-memory", "lots"], "--fast-memory 'lots' is not a size", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--bits", "3"], "bits must be one of", 2),
        (["--shape", "llama-9", "--context", "10"], "--shape must be one of", 2),
        (["--context", "10"], "--model, or a shape with --shape", 2),
        (["--shape", "llama-3-8b", "-m", "demo", "--context", "10"], "one of the two", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--gpu", "voodoo2"], "--gpu must be cpu or one of a6000", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--gpu-spec", "nowhere.toml"], "--gpu-spec nowhere.toml cannot be read", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--gpu", "a6000", "--gpu-spec", "x.toml"], "name two devices", 2),
        (["--shape", "llama-3-8b", "--context", "10", "--gpu", "a6000", "--device", "cpu"], "--device cpu contradicts", 2),
        (
            ["--shape", "llama-3-8b", "--context", "10", "--gpu", "a6000", "--slow-tier", "ram-inplace"],
            "needs a model on the CPU",
            2,
        ),
        (["--shape", "llama-3-8b", "--context", "10", "--gpu", "a6000", "--weights", "int8"], "for the CPU", 2),
        (["-m", "./nowhere", "--context", "10"], "no file or folder ./nowhere", 1),
        (["-m", "nobody/nothing", "--context", "10"], "cannot find the model 'nobody/nothing'", 1),
        (["-m", "nobody/nothing", "--context", "10", "--offline"], "Leave out --offline", 1),
    ],
)
def test_bad_input_is_one_line(arguments, message, code):
    result = run("plan", *arguments, code=code)
    assert message in one_line(result.stderr)
    assert result.stdout == ""


def test_a_context_beyond_the_models_positions_is_refused(tiny_folder):
    result = run("plan", "-m", tiny_folder, "--context", str(POSITIONS + 1), code=2)
    assert f"has positions for ({POSITIONS})" in one_line(result.stderr)


def test_a_limit_that_nothing_fits_reports_the_least_bytes():
    text = one_line(run(*LARGE, "--fast-memory", "1MB").stdout)
    least = plan_json(*LARGE)["least_bytes"]
    assert f"needs {least / 1e9:.2f} GB even under the smallest settings" in text
    assert "Longest context that fits: none" in text


ON_A6000 = ("plan", "--shape", "mistral-7b", "--dtype", "float16", "--context", "32768", "--gpu", "a6000")
SPEC = """
name = "a box"
kind = "cpu"
memory_gib = 64
memory_gb_per_s = 50
matrix_tflops = 1
vector_tflops = 0.5
link_gb_per_s = 50
source = "guessed"
"""


def test_a_roofline_prints_batches_times_and_sources(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = one_line(run(*ON_A6000).stdout)
    for part in (
        "On NVIDIA RTX A6000",
        "768 GB/s NVIDIA RTX A6000 datasheet",
        "host link (PCIe 4.0 x16) 31.5 GB/s PCI Express base specification 4.0",
        "memory 85%, matrix 70%, vector 70%, link 80%, usable memory 90%",
        "SpeCache (paper), 1-bit",
        "SpeCache verified, 2-bit",
        "weights compute scan attend fetch overhead in total hidden: compute fetch scan waits for",
        "wins from, by 1% or more",
    ):
        assert part in text


def test_the_rooflines_json_has_stable_keys():
    document = plan_json(*ON_A6000)
    roofline = document["roofline"]
    assert set(roofline) == {"device", "usable_bytes", "methods", "measured"}
    assert roofline["measured"] is None and document["device"] == "cuda"
    assert roofline["device"]["key"] == "a6000" and roofline["device"]["sources"]["memory_gb_per_s"] == "NVIDIA RTX A6000 datasheet"
    methods = {one["method"]: one for one in roofline["methods"]}
    assert list(methods) == ["full", "kivi-2", "kivi-1", "paper-2", "paper-1", "specache-2", "specache-1"]
    assert methods["paper-1"]["largest"]["batch"] > 8 * methods["full"]["largest"]["batch"]
    assert methods["specache-2"]["policy"] == "verified"
    assert set(methods["specache-2"]["wins_from"]) == {"context", "batch", "throughput_context"}


def test_without_a_device_there_is_no_roofline():
    assert "roofline" not in plan_json(*LARGE)


def test_a_file_describes_a_processor(tmp_path):
    spec = tmp_path / "box.toml"
    spec.write_text(SPEC)
    document = plan_json(*LARGE, "--gpu", "cpu", "--gpu-spec", spec)
    assert document["device"] == "cpu" and document["config"]["slow_tier"] == "ram-inplace"
    own = document["roofline"]["methods"][-1]
    assert own["policy"] == "on-demand" and own["asked"]["step"]["fetch_hidden_ms"] == 0
    spec.write_text(SPEC.replace('kind = "cpu"', ""))
    assert "describes a GPU" in one_line(run(*LARGE, "--gpu", "cpu", "--gpu-spec", spec, code=2).stderr)


def test_a_model_too_large_for_a_device_says_so(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = one_line(run("plan", "--shape", "llama-3.1-70b", "--context", "8192", "--gpu", "l4").stdout)
    assert "16-bit cache (does not fit)" in text


def test_this_machine_is_measured(tiny_folder, monkeypatch):
    from specache.bench import calibration, plain_read

    monkeypatch.setattr(calibration, "CONTEXTS", (192, 256))
    monkeypatch.setattr(calibration, "ROWS", (1, 2))
    monkeypatch.setattr(calibration, "PRODUCT", 64)
    monkeypatch.setattr(calibration, "STEPS", 1)
    monkeypatch.setattr(plain_read.LargeArray.__init__, "__defaults__", (1 << 20,))  # as if the caches were small
    document = plan_json("plan", "-m", tiny_folder, "--context", "200", "--gpu", "cpu")
    assert document["roofline"]["device"]["kind"] == "cpu"
    assert set(document["roofline"]["measured"]["costs"]) == {one["method"] for one in document["roofline"]["methods"]}


def test_without_a_terminal_nothing_is_cut_short():
    text = run(*ON_A6000).stdout
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and "1,280 tokens" in text and "tokens/s, largest batches" in text


def test_a_full_disk_leaves_the_json_of_an_earlier_run(monkeypatch, tmp_path):
    file = tmp_path / "plan.json"
    run(*LARGE, "--json", file)
    earlier = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = one_line(run(*LARGE, "--bits", "1", "--json", file, code=1).stderr)
    assert "cannot write" in text and "No space left on device. Choose another --json" in text
    assert file.read_bytes() == earlier and os.listdir(tmp_path) == ["plan.json"]
