"""`specache bench`: one command per benchmark, JSON with the machine, usage errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from specache.bench import benchmarks
from specache.cli import console
from tests.cli.running import one_line, run


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_benchmark_is_a_dataclass_whose_options_explain_themselves(name):
    cls = benchmarks.benchmark_class(name)
    assert cls.name == name and cls.summary in one_line(run("bench", "--help").stdout)
    assert all(field.metadata.get("help") for field in dataclasses.fields(cls))
    text = one_line(run("bench", name, "--help").stdout)
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(cls))
    assert ("--weights" in text) is cls.uses_model


def test_json_has_settings_results_and_machine(monkeypatch):
    words = ["bench", "attention", "--shape", "tiny", "--context", "64,128", "--bits", "1", "--repeat", "1", "--json", "-"]
    monkeypatch.setattr("sys.argv", ["specache", *words])
    result = run(*words)
    document = json.loads(result.stdout)
    assert document["benchmark"] == "attention" and document["settings"]["context"] == [64, 128] and document["model"] is None
    assert {entry["context"] for entry in document["results"]} == {64, 128}
    assert document["machine"].keys() >= {"cpu", "cores", "threads"} and document["machine"]["cpu"]
    assert document["versions"].keys() == {"specache", "torch", "transformers", "python"}
    assert document["kernels"]["active"].keys() >= {"score", "attend"} and "torch" in document["kernels"]["available"]
    assert document["command"] == " ".join(["specache", *words])
    assert "vs sdpa bf16" in one_line(result.stderr) and "bandwidth" in result.stderr


def test_a_whole_model_by_shape_and_by_name(tiny_folder: Path, tmp_path: Path):
    small = ("--context", "70", "--steps", "1", "--weights", "fp32")
    file = tmp_path / "decode.json"
    result = run("bench", "decode", "--shape", "tiny", *small, "--against", "quantized", "--json", file)
    assert json.loads(file.read_text())["model"] == {"name": "tiny", "weights": "fp32"}
    assert "specache" in result.stderr
    document = json.loads(run("bench", "decode", "-m", tiny_folder, *small, "--json", "-").stdout)
    assert document["model"]["name"] == str(tiny_folder)
    assert [entry["impl"] for entry in document["results"]] == ["specache", "dynamic"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("decode",), "--model"),
        (("decode", "-m", "demo", "--shape", "tiny"), "one of the two"),
        (("decode", "--shape", "gpt-5"), "--shape must be one of"),
        (("decode", "--shape", "tiny", "--weights", "int3"), "--weights must be one of fp32"),
        (("decode", "--shape", "tiny", "--against", "vllm"), "got vllm"),
        (("attention", "--bits", "two"), "--bits must be a whole number"),
        (("attention", "--rows", "1,3"), "--rows takes 1 and 2, got 1, 3"),
        (("attention", "--shape", "tiny", "--json", "nowhere/a.json"), "there is no folder nowhere"),
        (("attention", "--shape", "tiny", "--json", "."), "--json .: this is a folder"),
        (("attention", "--shape", "tiny", "--json", ""), "--json .: this is a folder"),
    ],
)
def test_usage_errors_are_found_before_anything_is_measured(arguments, expected):
    assert expected in one_line(run("bench", *arguments, code=console.EXIT_USAGE).stderr)


def test_an_unknown_benchmark_is_a_usage_error():
    assert "No such command 'sleep'" in run("bench", "sleep", code=console.EXIT_USAGE).stderr
