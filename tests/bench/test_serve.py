"""`bench serve`: our server and others under the same load, compared only if they answer alike."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from specache.bench import serve, serve_servers
from specache.bench.base import BenchContext
from specache.bench.gguf_model import write_gguf
from specache.bench.serve import Serve
from specache.bench.serve_servers import Served, llama_server, specache_server, transformers_server
from specache.bench.shapes import RandomModel, Weights
from specache.cli import console
from specache.cli.bench_table import result_table
from specache.errors import BenchmarkError, ConfigError
from tests.bench import fake_server
from tests.bench.tiny_shape import TINY, tiny_model
from tests.cli.running import one_line, run
from tests.cli.tiny_chat import save_tiny_chat_model
from tests.processes import servers

SERVED = Served("folder", Weights.BF16, threads=3, clients=4, positions=700, options=("--bits", "1"))


@dataclass(frozen=True)
class FolderSource(RandomModel):
    """A model in a folder, with a file for llama.cpp beside it."""

    folder: Path = Path()

    @property
    def gguf(self) -> str:
        return str(self.folder / "model.gguf")

    def pretrained(self) -> str:
        return str(self.folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_chat_model(folder)
    write_gguf(TINY, "fp32", folder / "model.gguf")
    return FolderSource(TINY, Weights.FP32, folder=folder)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A program in llama-server's place."""
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake_server.__file__}" "$@"\n')
    program.chmod(0o755)
    return program


def test_our_server_and_another_one_are_measured_under_the_same_load(source, llama, tmp_path):
    before = servers()
    file = tmp_path / "trace.jsonl"
    entries = [
        {"at_s": 0.1 * index, "prefix": "a", "prefix_tokens": 300, "prompt_tokens": 20, "answer_tokens": 8} for index in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, entries)))
    benchmark = Serve(trace=file, requests=4, clients=2, against=("llama.cpp",), llama_server=llama, timeout=500)
    outcome = benchmark.run(BenchContext(source))
    ours, other = outcome.results
    assert (ours["impl"], other["impl"]) == ("specache", "llama.cpp")
    for result in (ours, other):
        assert result["requests"] == result["completed"] == 4 and result["errors"] == {} and result["requests_per_min"] > 0
        assert result["ttft_ms_p99"] >= result["ttft_ms_p50"] > 0 and result["peak_bytes"] > 10**7
    assert ours["prompt_tokens"] > 4 * 300 and 4 <= ours["answer_tokens"] <= 32 and ours["peak_bytes"] > 10**8
    assert ours["cached_tokens"] > 2 * 250
    assert (
        other["alike"] == 0 and "vs_llama_cpp" not in ours and "not the same model" in outcome.details["not_compared"]["llama.cpp"]
    )
    if len(os.sched_getaffinity(0)) > 1:
        assert outcome.details["client_core"] not in outcome.details["server_cores"]
    assert servers() <= before
    console.err.print(result_table(outcome.results, benchmark.columns, outcome.details))


def test_a_server_that_cannot_run_is_skipped_with_the_reason(source, monkeypatch):
    monkeypatch.setattr(serve, "_results", lambda loads: [])
    monkeypatch.setattr(Serve, "_load", lambda *arguments: None)
    monkeypatch.setattr(serve_servers, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    outcome = Serve(prefix_tokens=100, against=("transformers", "llama.cpp"), requests=3).run(BenchContext(source))
    assert [result["impl"] for result in outcome.results] == ["transformers", "llama.cpp"]
    console.err.print(result_table(outcome.results, Serve.columns, {}))
    assert "transformers[serving]" in outcome.results[0]["skipped"] and "--llama-server FILE" in outcome.results[1]["skipped"]


def test_every_server_is_started_with_the_same_weights_and_threads(tmp_path, llama, monkeypatch):
    ours = specache_server(SERVED).command(8123)
    assert ours[ours.index("--dtype") + 1] == "bfloat16" and ours[ours.index("--threads") + 1] == "3" and "--bits" in ours
    assert "--no-prefix-sharing" not in ours and "--no-prefix-sharing" in specache_server(SERVED, sharing=False).command(1)
    assert "8123" in ours and "127.0.0.1" in ours
    stock = transformers_server(SERVED)
    assert stock.model == "folder" and stock.command(1)[-2:] == ["--port", "1"] and "bfloat16" in stock.command(1)
    theirs = llama_server(SERVED, tmp_path / "model.gguf", llama).command(1)
    assert theirs[theirs.index("--ctx-size") + 1] == "2800" and theirs[theirs.index("--parallel") + 1] == "4"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(serve_servers, "find_spec", lambda name: object())
    python_server = llama_server(SERVED, tmp_path / "model.gguf", None)
    assert python_server.name == "llama-cpp-python" and python_server.command(1)[-2:] == ["--interrupt_requests", "false"]


def test_int8_is_no_format_of_transformers_serve():
    with pytest.raises(ConfigError, match="no int8 weights"):
        transformers_server(Served("folder", Weights.INT8, 1, 1, 100))


def test_settings_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--against takes transformers, llama\.cpp, got vllm"):
        Serve(against=("vllm",))
    for changes in ({"requests": 0}, {"rate": -1.0}, {"clients": 0}):
        with pytest.raises(ConfigError, match="or more, got"):
            Serve(**changes)
    with pytest.raises(ConfigError, match="a shape without a tokenizer"):
        Serve().run(BenchContext(tiny_model()))
    with pytest.raises(ConfigError, match=r"--llama-server .* is not a program"):
        llama_server(SERVED, tmp_path / "model.gguf", tmp_path)
    with pytest.raises(ConfigError, match="Run it with --device cpu"):
        Serve().run(BenchContext(tiny_model(), device="cuda"))


def test_a_server_that_fails_is_an_error_and_leaves_nothing(source):
    before = servers()
    with pytest.raises(BenchmarkError, match=r"specache ended with exit code 2\. It said: .*--bits"):
        Serve(prefix_tokens=100, serve_options="--bits 7", requests=1, timeout=500).run(BenchContext(source))
    assert servers() <= before


def test_a_prompt_longer_than_the_model_is_a_usage_error(source):
    result = run("bench", "serve", "-m", source.folder, "--device", "cpu", code=console.EXIT_USAGE)
    assert "but the model has 512 positions" in one_line(result.stderr)


def test_an_agent_is_one_client_and_has_no_other_trace():
    assert Serve(agent_turns=3)._clients == 1 and Serve()._clients == 16
    with pytest.raises(ConfigError, match="--agent-turns"):
        Serve(agent_turns=3, trace=Path("trace.jsonl"))
