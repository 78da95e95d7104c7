"""`bench paper`: the batch is the largest, runs resume, and ratios are to the full cache."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.bench.base import BenchContext, Outcome
from specache.bench.contenders import SpeCacheContender
from specache.bench.paper import Paper, compared
from specache.bench.paper_decoding import Decoding, Schedule
from specache.bench.paper_fit import ASKED, FAST, MAIN, TRIED, FreeMemory, Needs, largest_near, planned_fit, tried_fit, untried_fit
from specache.bench.paper_methods import FULL, Entry, KiviContender, entries
from specache.bench.workload import Workload
from specache.cli import console
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import BenchmarkError, ConfigError, FastMemoryError
from specache.model.dimensions import dimensions_of
from tests.bench.tiny_shape import TINY, tiny_model
from tests.cli.running import one_line, run
from tests.device.static_running import static_steps
from tests.tiny import llama

CONTEXT = 512
BUDGET = 2_500_000
SMALL: dict[str, Any] = {"contexts": (CONTEXT,), "fast_memory": BUDGET, "steps": 1, "rounds": 1, "top_k": 8, "chunk": 128}
KEYS = {
    *("method", "bits", "policy", "context", "batch", "fits", "found_by", "ms_per_step", "tokens_per_s", "spread"),
    *("vs_full_batch", "vs_full_throughput", "fast_bytes"),
}


def measure(**settings: Any) -> Outcome:
    return Paper(**{**SMALL, **settings}).run(BenchContext(tiny_model()))


def lines_of(**settings: Any) -> list[Entry]:
    config = SpeCacheConfig(policy=Policy.VERIFIED, slow_tier=SlowTierKind.RAM, residual=64, top_k=8, prefill_chunk=128, **settings)
    return entries(("full", "kivi", "speculative", "verified"), (2, 1), config)


def needs_of(model: Any, entry: Entry, new: int = 8) -> Needs:
    return Needs(dimensions_of(model), entry, CONTEXT, new)


def prompts(batch: int) -> torch.Tensor:
    """Return different prompts: equal ones would share their pages."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, TINY.vocabulary, (batch, CONTEXT), generator=generator)


def test_the_table_has_the_papers_methods_at_both_bits():
    found = [(entry.method, entry.bits, entry.policy) for entry in lines_of()]
    assert found == [
        ("full", None, None),
        *(("kivi", bits, "none") for bits in (2, 1)),
        *(("specache", bits, "speculative") for bits in (2, 1)),
        *(("specache", bits, "verified") for bits in (2, 1)),
    ]
    residuals = {entry.name: entry.planned.config.residual for entry in lines_of()}
    assert residuals["kivi"] == 128 and residuals["speculative"] == residuals["verified"] == 64
    codes = {entry.name: str(entry.planned.config.code) for entry in lines_of()}
    assert codes["kivi"] == codes["speculative"] == "kivi" and codes["verified"] == "rotated"


@pytest.mark.parametrize("index", range(1, 7))
def test_generate_takes_the_largest_batch_and_refuses_one_more(index):
    """`generate` itself refuses, for a prompt that is prefilled and an answer that is decoded."""
    model, entry, new = tiny_model().load(), lines_of()[index], 3
    needs = needs_of(model, entry, new)
    fit = planned_fit(needs, FreeMemory(BUDGET, None, 1000))
    assert fit.batch > 1 and fit.limited_by == FAST
    config = replace(entry.planned.config, fast_memory=BUDGET)
    arguments = {"max_new_tokens": new + 1, "do_sample": False}  # the last token is not stored
    assert specache.generate(model, prompts(fit.batch), config=config, **arguments).shape == (fit.batch, CONTEXT + new + 1)
    with pytest.raises(FastMemoryError):
        specache.generate(model, prompts(fit.batch + 1), config=config, **arguments)


def test_the_full_cache_is_counted_as_transformers_holds_it():
    model, entry = tiny_model().load(), lines_of()[0]
    needs = needs_of(model, entry, new=3)
    fit = planned_fit(needs, FreeMemory(BUDGET, None, 1000))
    held = []
    for batch in (fit.batch, fit.batch + 1):
        work = Workload(model, batch, CONTEXT)
        contender = entry.contender(work, BUDGET)
        contender.prepare()
        for _ in range(3):
            contender.step()
        held.append(contender.held_bytes)
        contender.close()
    rows = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4 * (CONTEXT + 3)
    assert held == [fit.batch * rows, (fit.batch + 1) * rows]
    assert held[0] < needs.fast(fit.batch) <= BUDGET < needs.fast(fit.batch + 1)


def test_fast_memory_while_decoding_stays_within_the_budget():
    results = measure().results
    assert len(results) == 7 and all(result.keys() >= KEYS for result in results)
    for result in results:
        assert result["fits"] and 0 < result["fast_bytes"] <= BUDGET
        assert result["tokens_per_s"] == pytest.approx(result["batch"] * 1e3 / result["ms_per_step"])
        assert result["found_by"] == ("bytes" if result["method"] == "full" else "plan") and result["limited_by"] == FAST


def test_main_memory_and_the_largest_batch_asked_for_are_limits_too():
    model = tiny_model().load()
    own, kivi = needs_of(model, lines_of()[5]), needs_of(model, lines_of()[1])
    assert planned_fit(own, FreeMemory(BUDGET, None, 3)).limited_by == ASKED
    by_fast = planned_fit(own, FreeMemory(BUDGET, None, 1000)).batch
    short = FreeMemory(BUDGET, own.main(by_fast) - 1, 1000)
    assert planned_fit(own, short).batch == by_fast - 1 and planned_fit(own, short).limited_by == MAIN
    assert kivi.main(2) == kivi.fast(2) and own.main(2) > own.fast(2)


def test_kivi_keeps_no_16_bit_rows():
    model = tiny_model().load()
    contender = lines_of()[1].contender(Workload(model, 2, CONTEXT), BUDGET)
    assert isinstance(contender, KiviContender)
    contender.prepare()
    with contender.ready():
        for _ in range(70):  # a group of the residual is quantised meanwhile
            contender.step()
    assert [sequence.length for sequence in contender.held.sequences] == [CONTEXT + 70] * 2
    assert contender.held.memory().slow == 0
    contender.close()


def test_kivi_without_rows_decodes_what_it_decodes_with_them():
    work = Workload(llama(), 1, CONTEXT)
    config = lines_of()[1].planned.config
    decoded = []
    for contender in (KiviContender(work, config), SpeCacheContender(work, config)):
        contender.prepare()
        with contender.ready():
            for _ in range(70):
                contender.step()
        decoded.append(contender.held.sequences[0].token_ids[CONTEXT:])
        contender.close()
    assert decoded[0] == decoded[1] and len(set(decoded[0])) > 1


@pytest.mark.parametrize("most", [1, 2, 7, 40])
@pytest.mark.parametrize("start", [0, 1, 3, 20, 40, 100])
def test_the_search_finds_the_largest_batch_from_any_start(start, most):
    for edge in range(most + 3):
        asked: list[int] = []

        def fits(batch: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(batch)
            return batch <= edge

        assert largest_near(start, fits, most) == min(edge, most)
        assert len(asked) == len(set(asked)) and all(1 <= batch <= most for batch in asked)


def test_trials_decide_the_batch_on_a_gpu():
    needs = needs_of(tiny_model().load(), lines_of()[5])
    free = FreeMemory(BUDGET, None, 1000)
    planned = planned_fit(needs, free).batch
    for edge in (0, planned - 2, planned, planned + 5):
        fit = tried_fit(needs, free, lambda batch, edge=edge: batch <= edge)
        assert (fit.batch, fit.found_by, fit.limited_by) == (edge, TRIED, FAST)
    assert tried_fit(needs, replace(free, most=2), lambda batch: True).limited_by == ASKED
    hosted = replace(free, main=needs.main(planned - 1))
    assert tried_fit(needs, hosted, lambda batch: True).batch == planned - 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), FastMemoryError("refused")])
def test_a_batch_that_runs_out_of_memory_is_made_smaller(monkeypatch, error):
    entry, batches = lines_of()[1], []
    contender = KiviContender.prepare

    def prepare(self: KiviContender) -> None:
        batches.append(self.work.batch)
        if self.work.batch > 3:
            raise error
        contender(self)

    monkeypatch.setattr(KiviContender, "prepare", prepare)
    with Decoding(tiny_model().load(), BUDGET, 6, Schedule(1, 1), 0) as decoding:
        line = decoding.measure(entry, CONTEXT, lambda said: None)
    assert batches == [6, 5, 4, 3] and line.fit.batch == 3 and line.fit.found_by == TRIED and line.timing is not None


def test_a_batch_that_frees_hot_sets_while_decoding_does_not_fit(monkeypatch):
    """Such a batch decodes, but with smaller hot sets than the method has."""
    entry = lines_of()[5]
    step = SpeCacheContender.step

    def frees(self: SpeCacheContender) -> None:
        step(self)
        if self.work.batch > 2:
            for sequence in self.held.sequences:
                sequence.free_hot_sets()

    monkeypatch.setattr(SpeCacheContender, "step", frees)
    with Decoding(tiny_model().load(), BUDGET, 3, Schedule(1, 1), 0) as decoding:
        assert decoding.measure(entry, CONTEXT, lambda said: None).fit.batch == 2


def test_a_method_that_fits_no_sequence_has_a_row_without_ratios():
    model = tiny_model().load()
    full, kivi = needs_of(model, lines_of()[0], new=3), needs_of(model, lines_of()[1], new=3)
    between = (kivi.fast(1) + full.fast(1)) // 2
    results = measure(fast_memory=between, methods=("full", "kivi"), contexts=(CONTEXT,)).results
    assert [result["fits"] for result in results] == [False, True, True]
    stock, ours, _ = results
    assert stock["batch"] == 0 and stock["ms_per_step"] is None and "MB of fast memory" in stock["skipped"]
    assert ours["vs_full_batch"] is None and ours["vs_full_throughput"] is None and ours["tokens_per_s"] > 0


def test_ratios_are_to_the_full_cache_at_the_same_context():
    def row(method: str, context: int, batch: int, speed: float) -> dict[str, Any]:
        return {"method": method, "context": context, "batch": batch, "tokens_per_s": speed, "fits": batch > 0}

    rows = compared([row("kivi", 1, 6, 9.0), row("full", 1, 2, 3.0), row("full", 2, 0, 0.0), row("kivi", 2, 4, 5.0)])
    assert [(r["vs_full_batch"], r["vs_full_throughput"]) for r in rows] == [(3, 3), (1, 1), (None, None), (None, None)]


def few(out: Path, **settings: Any) -> Outcome:
    return measure(methods=("full", "kivi"), bits=(2,), contexts=(CONTEXT, 256), out=out, **settings)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, int]]:
    """Return the list of (method, context) measured from now on."""
    seen: list[tuple[str, int]] = []
    real = Decoding.measure

    def watched(self: Decoding, entry: Entry, context: int, log: Any) -> Any:
        seen.append((entry.name, context))
        return real(self, entry, context, log)

    monkeypatch.setattr(Decoding, "measure", watched)
    return seen


def test_an_interrupted_run_keeps_its_results_and_is_resumed(measured, monkeypatch, tmp_path):
    out = tmp_path / "paper.json"
    prepare = KiviContender.prepare

    def interrupted(self: KiviContender) -> None:
        if self.work.context == CONTEXT:
            raise KeyboardInterrupt
        prepare(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KiviContender, "prepare", interrupted)
        few(out)
    before = json.loads(out.read_text())["results"]
    assert [(row["method"], row["context"]) for row in before] == [("full", 256), ("kivi", 256), ("full", CONTEXT)]
    measured.clear()
    results = few(out).results
    assert measured == [("kivi", CONTEXT)]
    assert [(row["method"], row["context"]) for row in results] == [("full", 256), ("kivi", 256), ("full", 512), ("kivi", 512)]
    assert results[:3] == before and json.loads(out.read_text())["results"] == results
    assert results[3]["vs_full_batch"] == results[3]["batch"] / results[2]["batch"]
    measured.clear()
    assert few(out).results == results and not measured
    assert [path.name for path in tmp_path.iterdir()] == ["paper.json"]


def test_a_file_of_other_arguments_is_refused_and_left_alone(measured, tmp_path):
    out = tmp_path / "paper.json"
    few(out)
    content = out.read_bytes()
    measured.clear()
    with pytest.raises(BenchmarkError, match="fast_memory is 2500000 there and 3000000 here; steps is 1 there and 2 here"):
        few(out, fast_memory=3_000_000, steps=2)
    with pytest.raises(BenchmarkError, match="seed is 0 there and 1 here"):
        Paper(**{**SMALL, "methods": ("full", "kivi"), "bits": (2,), "contexts": (CONTEXT, 256)}, out=out).run(
            BenchContext(tiny_model(), seed=1)
        )
    assert out.read_bytes() == content and not measured
    few(out, plot=tmp_path / "paper.png")
    assert not measured and (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}', '{"run": {}, "results": [{}]}', '{"run": 3, "results": []}'])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    out = tmp_path / "paper.json"
    out.write_text(content)
    with pytest.raises(BenchmarkError, match="Nothing was changed"):
        few(out)
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": (0,)}, "--contexts must be 1 or more"),
        ({"contexts": ()}, "--contexts"),
        ({"bits": (4,)}, "--bits takes 2, 1, got 4"),
        ({"methods": ("vllm",)}, "got vllm"),
        ({"methods": ()}, "names none"),
        ({"max_batch": 0}, "--max-batch"),
        ({"group_size": 48}, "group_size must divide"),
        ({"out": Path("nowhere/paper.json")}, "--out nowhere/paper.json: there is no folder"),
        ({"plot": Path("nowhere/paper.png")}, "--plot nowhere/paper.png: there is no folder"),
        ({"out": Path(".")}, "--out .: this is a folder"),
        ({"plot": Path(".")}, "--plot .: this is a folder"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Paper(**settings)


def test_fast_memory_is_required_on_a_cpu():
    with pytest.raises(ConfigError, match="--fast-memory 2GB"):
        measure(fast_memory=None)


def test_the_command_measures_prints_and_resumes(tmp_path):
    out, file = tmp_path / "paper.json", tmp_path / "all.json"
    words = ("bench", "paper", "--shape", "tiny", "--weights", "fp32", "--contexts", "512,1000000", "--bits", "2", "--steps", "1")
    words += ("--rounds", "1", "--fast-memory", "2.5MB", "--methods", "full,kivi", "--chunk", "128", "--out", str(out))
    said = one_line(run(*words, "--json", file).stderr)
    assert "vs full batch" in said and "kivi none 2-bit, 1 x 1,000,000 tokens, was skipped: one sequence needs" in said
    assert "fast memory: 2.5 MB" in said
    document = json.loads(file.read_text())
    assert document["results"] == json.loads(out.read_text())["results"] and document["fast_memory_bytes"] == 2_500_000
    assert document["settings"]["contexts"] == [512, 1000000] and document["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--fast-memory", "lots"), "--fast-memory 'lots' is not a size above 0"),
        (("--fast-memory", "0"), "is not a size above 0"),
        (("--contexts", "long"), "--contexts must be a whole number, got 'long'"),
        (("--fast-memory", "1GB", "-m", "demo"), "one of the two"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, expected):
    assert expected in one_line(run("bench", "paper", "--shape", "tiny", *arguments, code=console.EXIT_USAGE).stderr)


def test_the_planned_batch_decodes_with_its_hot_sets():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(methods=(FULL, "verified"), bits=(2,)).results[1]["fits"]


def test_a_batch_without_room_for_static_buffers_does_not_fit(monkeypatch):
    """On a GPU, a batch without room for its static buffers decodes slower, and does not fit."""
    largest = {(row["method"], row["policy"], row["bits"]): row["batch"] for row in measure().results}
    fitted = []
    for budget in (BUDGET * 3 // 2, BUDGET):
        with static_steps(monkeypatch) as steps:
            for entry in lines_of()[1:]:
                steps.clear()
                batch = largest[entry.method, str(entry.policy), entry.bits]  # of the ordinary steps
                with warnings.catch_warnings(), Decoding(tiny_model().load(), budget, batch, Schedule(1, 1), 0) as decoding:
                    warnings.filterwarnings("error" if budget > BUDGET else "ignore", category=RuntimeWarning)
                    fit = decoding.measure(entry, CONTEXT, lambda said: None).fit
                assert (steps == [batch] * 3) is (fit.batch == batch)
                fitted.append(fit.batch == batch)
    assert all(fitted[:6]) and not all(fitted[6:])


def test_kivi_over_static_buffers_decodes_what_it_decodes_without(monkeypatch):
    """The tokens are the same although no 16-bit rows are kept."""
    decoded = []
    for static in (False, True):
        with static_steps(monkeypatch, devices=("cpu",) if static else ()) as steps:
            contender = KiviContender(Workload(llama(), 2, CONTEXT), lines_of()[1].planned.config)
            contender.prepare()
            with contender.ready():
                for _ in range(70):
                    contender.step()
            contender.held.release_device_batch()
            decoded.append([sequence.token_ids[CONTEXT:] for sequence in contender.held.sequences])
            contender.close()
            assert steps == ([2] * 70 if static else [])
    assert decoded[0] == decoded[1]


def test_shared_rows_are_in_main_memory_once():
    model, entry = tiny_model().load(), lines_of()[-1]
    one, shared = (Needs(dimensions_of(model), entry, CONTEXT, 8, shares_rows=shares) for shares in (False, True))
    rows = one._slow(1)
    assert rows > 0 and shared._slow(100) == shared._slow(1) == rows and one._slow(100) == 100 * rows


def test_without_a_search_the_planned_batch_is_taken():
    model, entry = tiny_model().load(), lines_of()[1]
    needs = needs_of(model, entry)
    free = FreeMemory(BUDGET, None, 1000)
    assert untried_fit(needs, free) == planned_fit(needs, free)
    assert untried_fit(needs, FreeMemory(1, None, 1000)).batch == 1  # the plan may be wrong: one sequence is tried
    assert untried_fit(needs_of(model, lines_of()[-1]), FreeMemory(1, 1, 1000)).batch == 0


def test_shared_rows_give_the_same_table():
    own, shared = (measure(methods=("verified",), bits=(2,), max_batch=3, share_rows=shares) for shares in (False, True))
    for key in ("batch", "fast_bytes", "hit_rate"):
        assert own.results[0][key] == shared.results[0][key], key
