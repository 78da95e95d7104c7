"""`bench decode`: a row for everything that was asked for, phases that add up, reasons for gaps."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest

from specache.bench import busy, contenders, decode_step, plain_read
from specache.bench.base import BenchContext, Result
from specache.bench.breakdown import PHASES
from specache.bench.compare import compare
from specache.bench.decode_step import Decode
from specache.bench.gguf_model import FORMATS
from specache.bench.shapes import Weights
from specache.errors import BenchmarkError, ConfigError
from tests.bench.tiny_shape import TINY, tiny_model

KEYS = {"impl", "weights", "cache", "batch", "context", "ms_per_step", "tokens_per_s", "vs_dynamic", "breakdown"}


def run(**settings: Any) -> list[Result]:
    settings = {"context": 260, "batch": 2, "steps": 2, "top_k": 8, **settings}
    return Decode(**settings).run(BenchContext(tiny_model())).results


@pytest.fixture
def without_libraries(monkeypatch):
    for module in (contenders, decode_step):
        monkeypatch.setattr(module, "find_spec", lambda name: None)


def test_every_cache_asked_for_has_a_time_or_a_reason(without_libraries):
    results = run(against=("dynamic", "quantized", "llama.cpp"))
    assert all(result.keys() >= KEYS and result["weights"] == "fp32" for result in results)
    assert [result["impl"] for result in results] == ["specache", "dynamic", "quantized", *["llama.cpp"] * 3]
    assert [result["skipped"] is None for result in results] == [True, True, False, False, False, False]
    assert "pip install hqq" in results[2]["skipped"] and "pip install 'specache[bench]'" in results[3]["skipped"]


@pytest.mark.parametrize("policy", ["on-demand", "verified"])
def test_a_breakdown_adds_up_to_the_step(policy):
    ours, stock = run(policy=policy)
    assert set(ours["breakdown"]) == {"weights", *PHASES, "rest"}
    assert set(stock["breakdown"]) == {"weights", "rest"}
    for result in (ours, stock):
        assert sum(result["breakdown"].values()) == pytest.approx(result["ms_per_step"])
        assert result["tokens_per_s"] == pytest.approx(2e3 / result["ms_per_step"])
        assert result["vs_dynamic"] == pytest.approx(stock["ms_per_step"] / result["ms_per_step"])
    assert policy in ours["cache"]


def test_a_step_is_compared_with_a_read_of_the_weights_and_the_cache():
    ours, stock = run(batch=3)
    model = tiny_model().load()
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))  # the head is the embedding
    rows = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, dim, float32
    assert stock["bytes"] == weights + 3 * 260 * rows
    assert weights < ours["bytes"] < stock["bytes"]
    for result in (ours, stock):
        assert result["vs_floor"] == pytest.approx(result["ms_per_step"] / result["floor_ms"])
    assert stock["floor_ms"] / ours["floor_ms"] == pytest.approx(stock["bytes"] / ours["bytes"])


def test_the_floor_of_quantised_weights_is_that_of_their_codes():
    results = Decode(context=260, batch=1, steps=1, top_k=8).run(BenchContext(tiny_model(Weights.INT8))).results
    model = tiny_model(Weights.INT8).load()
    held = [*model.parameters(), *model.buffers()]
    read = sum(x.nbytes for x in held if x is not model.get_input_embeddings().weight)
    assert results[1]["bytes"] == read + 260 * 2 * 2 * 2 * 16 * 2


def test_the_ordinary_cache_is_measured_with_pytorchs_products_and_with_ours(monkeypatch):
    installed, active = [], []

    def install(model: Any) -> list[Any]:
        active.append(model)
        return [model]

    monkeypatch.setattr(contenders.cpu_linear, "install", install)
    monkeypatch.setattr(contenders.cpu_linear, "remove", lambda changed: active.remove(changed[0]))
    step = contenders.StockContender.step

    def watched(self: Any) -> None:
        installed.append((self.impl, len(active)))
        step(self)

    monkeypatch.setattr(contenders.StockContender, "step", watched)
    results = run(against=("dynamic", "dynamic-ours"))
    assert set(installed) == {("dynamic", 0), ("dynamic-ours", 1)} and not active
    assert [result["impl"] for result in results] == ["specache", "dynamic", "dynamic-ours"]
    for result in results:
        assert result["vs_dynamic"] == pytest.approx(results[1]["ms_per_step"] / result["ms_per_step"])
        assert result["vs_dynamic_ours"] == pytest.approx(results[2]["ms_per_step"] / result["ms_per_step"])


@pytest.mark.parametrize("warm", [False, True])
def test_the_caches_are_emptied_before_every_step_unless_they_are_to_stay_warm(monkeypatch, warm):
    events: list[str] = []
    read, step = plain_read.LargeArray.read, contenders.StockContender.step
    monkeypatch.setattr(plain_read.LargeArray, "read", lambda self: (events.append("read"), read(self))[1])
    monkeypatch.setattr(contenders.StockContender, "step", lambda self: (events.append("step"), step(self))[1])
    run(warm=warm)
    before = [previous for previous, event in zip(["step", *events], events, strict=False) if event == "step"]
    assert len(before) == 4 and set(before) <= ({"step"} if warm else {"read"})


def test_busy_processes_run_beside_the_steps_and_end_with_them(monkeypatch):
    started: list[subprocess.Popen[bytes]] = []
    running = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

    def noted(*args: Any) -> Any:
        running.append(sum(process.poll() is None for process in started))
        return compare(*args)

    monkeypatch.setattr(busy.subprocess, "Popen", Noted)
    monkeypatch.setattr(decode_step, "compare", noted)
    assert all(result["ms_per_step"] > 0 for result in run(busy=2))
    assert running == [2]
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_without_the_ordinary_cache_there_is_no_ratio_to_it():
    (ours,) = run(against=())
    assert ours["ms_per_step"] > 0 and ours["vs_dynamic"] is None


def test_llama_cpp_gets_the_same_model_context_and_batch(monkeypatch):
    asked: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> list[float]:
        asked.append(arguments)
        if "q4_0" in arguments:
            raise BenchmarkError("no flash attention for q4_0")
        return [4.0, 5.0, 6.0]

    module = types.ModuleType("specache.bench.llama_cpp")
    module.measure = measure
    monkeypatch.setattr(decode_step, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "specache.bench.llama_cpp", module)
    results = [result for result in run(against=("dynamic", "llama.cpp")) if result["impl"] == "llama.cpp"]
    assert [arguments[:6] for arguments in asked] == [(TINY, 260, 2, "fp32", cache, 2) for cache in ("f16", "q8_0", "q4_0")]
    assert all(arguments[7] == 1 << 20 for arguments in asked)  # its caches are emptied as ours are
    assert [result["ms_per_step"] for result in results] == [5.0, 5.0, None]
    assert results[0]["tokens_per_s"] == 400 and results[0]["vs_dynamic"] > 0
    assert results[2]["skipped"] == "no flash attention for q4_0"


@pytest.mark.parametrize(("weights", "theirs"), [(Weights.INT8, ["q8_0"]), (Weights.INT4, ["q4_0", "q4_1"])])
def test_llama_cpp_has_weights_of_as_many_bits_as_ours(monkeypatch, weights, theirs):
    asked: list[str] = []

    def steps(model: Any, context: int, batch: int, format: str, *rest: Any) -> list[float]:
        asked.append(format)
        return [1.0]

    monkeypatch.setattr(decode_step, "llama_cpp_steps", steps)
    bench = BenchContext(tiny_model(weights))
    results = Decode(context=128, batch=1, steps=1, top_k=8, against=("llama.cpp",)).run(bench).results
    assert asked == [format for format in theirs for _ in range(3)]
    assert [result["weights"] for result in results[1:]] == asked and all(format in FORMATS for format in theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"against": ("vllm",)}, "got vllm"), ({"bits": 3}, "bits"), ({"batch": 0}, "--batch"), ({"steps": 0}, "--steps")],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decode(**settings)


def test_a_run_without_a_model_is_refused():
    with pytest.raises(ConfigError, match="--model"):
        Decode().run(BenchContext())
