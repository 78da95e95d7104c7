"""A run measures every cell once, can be resumed, and does not mix with another run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from specache.errors import ConfigError, EvaluationError
from specache.eval import results, runner
from specache.eval.methods_option import NamedMethod, parse_methods
from specache.eval.results import CELLS_FILE, RUN_FILE, Run, open_results, read_results
from specache.eval.runner import MethodFailedError, Outcome, Progress, describe_run, evaluate
from specache.eval.table_rows import aggregate
from specache.eval.tasks.base import Item, TaskModel
from specache.eval.tasks.needle import Needle
from tests.cli.tiny_chat import byte_tokenizer
from tests.eval.fake_tasks import AnswerScores, Divergence, MissingMethod, calls, failing, tiny_task_model
from tests.tiny import llama

ROW_KEYS = {
    *("task", "method", "config", "unit", "n", "tokens", "mean", "ci95", "p95", "p95_ci95", "p99", "p99_ci95", "top1", "top1_ci95"),
    *("ppl", "ppl_ci95", "delta", "delta_ci95", "kept", "kept_ci95", "kept_n", "fast_ratio", "hot_ratio", "hit_rate", "guess_rate"),
    *("memory", "seconds", "nll_delta", "nll_delta_ci95"),
}


@pytest.fixture(scope="module")
def model() -> TaskModel:
    return tiny_task_model()


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def measured() -> int:
    return sum(count for (what, _), count in calls.items() if what == "measure")


def run(model: TaskModel, out: Path, methods: str = "full,specache,kivi", task: Any = None, **options: Any) -> Outcome:
    return evaluate(model, task or Divergence(), parse_methods(methods), out, **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / CELLS_FILE).read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_item_is_measured_once_under_every_method(model, tmp_path):
    outcome = run(model, tmp_path)
    items = [f"{group}/{number}" for group in ("text", "answer") for number in (0, 1)]
    expected = [(item, method) for item in items for method in ("full", "specache", "kivi")]
    assert [(cell["item"], cell["method"]) for cell in lines(tmp_path)] == expected
    cell = lines(tmp_path)[1]
    assert len(cell["values"]) == len(cell["tokens"]["top1"]) == 4
    assert cell["stats"]["fast_ratio"] > 0 and cell["facts"] == {"number": 0} and cell["details"] == {"said": "nothing"}
    assert outcome.cells == lines(tmp_path)


def test_rows_have_stable_keys_and_the_full_cache_diverges_from_nothing(model, tmp_path):
    rows = run(model, tmp_path).rows
    assert [(row["task"], row["method"]) for row in rows[:3]] == [("text", "full"), ("text", "specache"), ("text", "kivi")]
    assert all(set(row) == ROW_KEYS for row in rows)
    full, specache, _ = rows[:3]
    assert full["mean"] < 1e-6 < specache["mean"] < 1
    assert specache["ci95"][0] <= specache["mean"] <= specache["ci95"][1] and specache["p95"] <= specache["p99"]
    assert (specache["n"], specache["tokens"], specache["ppl"]) == (2, 8, pytest.approx(7.389, abs=1e-3))
    assert specache["config"]["bits"] == 2 and specache["kept"] is None
    assert full["fast_ratio"] == 1.0 < specache["fast_ratio"] + specache["hot_ratio"]  # residual and hot set of a short prompt
    assert (full["memory"], specache["memory"]) == ("less memory", "same memory")
    json.dumps(rows, allow_nan=False)


def test_rows_of_scores_count_the_items_that_stay_right(model, tmp_path):
    rows = run(model, tmp_path, "full,specache", AnswerScores(count=8)).rows
    full, ours = rows
    assert set(ours) == ROW_KEYS
    assert (full["mean"], ours["mean"], ours["delta"]) == (0.75, 0.5, -0.25)
    assert (ours["kept"], ours["kept_n"]) == (pytest.approx(4 / 6), 6)
    assert ours["kept_ci95"][0] < 4 / 6 < ours["kept_ci95"][1] and ours["p95"] is None and full["delta"] is None


def forced_cell(item: str, method: str, right: list[int], full_right: list[int]) -> dict[str, Any]:
    count = len(right)
    tokens = {"right": right, "full_right": full_right, "nll": [1.0] * count, "nll_delta": [0.25] * count}
    stats = {"fast_ratio": 0.2, "hot_ratio": 0.0, "hit_rate": None, "guess_rate": None}
    values = [0.01] * count
    named = {"item": item, "group": "forced", "index": int(item), "method": method}
    return {**named, "values": values, "tokens": tokens, "details": {}, "facts": {}, "stats": stats, "seconds": 1.0}


def test_rows_of_a_given_answer_count_the_tokens_that_the_full_cache_ranks_first():
    methods = {label: {"name": label, "settings": {}} for label in ("full", "kivi")}
    run_of_kivi = Run({"task": "extract", "settings": {}, "seed": 0}, "KL, nats", methods)
    cells = [
        forced_cell("0", "kivi", [1, 0, 1, 1], [1, 1, 0, 1]),
        forced_cell("1", "kivi", [0, 0], [0, 0]),  # the full cache knows nothing here
        forced_cell("2", "kivi", [1, 1], [1, 0]),
        forced_cell("2", "full", [1, 0], [1, 0]),
    ]
    full, kivi = sorted(aggregate(run_of_kivi, cells), key=lambda row: row["method"])
    assert set(kivi) == ROW_KEYS
    assert (kivi["kept"], kivi["kept_n"]) == (pytest.approx(3 / 4), 4), "right by chance counts for nothing"
    assert 0 <= kivi["kept_ci95"][0] < 3 / 4 < kivi["kept_ci95"][1] <= 1
    assert kivi["nll_delta"] == pytest.approx(0.25) and kivi["delta"] is None
    assert (full["kept"], full["kept_n"]) == (1.0, 1) and full["kept_ci95"][0] < 1
    unknown = aggregate(run_of_kivi, [cells[1]])[0]
    assert (unknown["kept"], unknown["kept_ci95"], unknown["kept_n"]) == (None, None, None)


def test_finished_cells_are_not_run_again(model, tmp_path):
    first = run(model, tmp_path)
    calls.clear()
    assert run(model, tmp_path).rows == first.rows
    assert not calls, "an item that is done is not even prepared"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of order"), OSError("gone")])
def test_an_interrupted_run_is_resumed(model, tmp_path, error):
    whole = run(model, tmp_path / "whole", "specache")
    calls.clear()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EvaluationError
    with pytest.raises(expected):
        evaluate(model, Divergence(), [failing(error, healthy=2)], tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 2
    calls.clear()
    rows = run(model, tmp_path / "out", "specache").rows
    assert measured() == 2
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole.rows]


def test_an_error_names_item_and_method(model, tmp_path):
    with pytest.raises(EvaluationError, match=r"item 'text/1', method 'specache': RuntimeError: out of order.*kept"):
        evaluate(model, Divergence(), [failing(RuntimeError("out of order"), healthy=1)], tmp_path)


def test_a_method_that_fails_leaves_the_others_to_finish(model, tmp_path):
    healthy = parse_methods("full,kivi")
    broken = failing(RuntimeError("out of order"), healthy=1)
    with pytest.raises(MethodFailedError, match=r"item 'text/1', method 'specache': RuntimeError: out of order.*kept") as failed:
        evaluate(model, Divergence(), [healthy[0], broken, healthy[1]], tmp_path)
    cells = [(cell["item"], cell["method"]) for cell in lines(tmp_path)]
    items = [f"{group}/{number}" for group in ("text", "answer") for number in (0, 1)]
    assert sorted(cells) == sorted([(item, method) for item in items for method in ("full", "kivi")] + [("text/0", "specache")])
    assert failed.value.outcome.cells == lines(tmp_path)
    assert "item 'text/1' (RuntimeError: out of order)" in read_results(tmp_path)[0].skipped["specache"]
    calls.clear()
    outcome = run(model, tmp_path, "full,specache,kivi")
    assert measured() == 3 and len(outcome.cells) == 12 and not outcome.run.skipped


def test_every_method_that_fails_is_named(model, tmp_path):
    first = failing(RuntimeError("out of order"), healthy=1)
    second = NamedMethod("specache bits=1", failing(OSError("gone"), healthy=2).method)
    with pytest.raises(MethodFailedError) as failed:
        evaluate(model, Divergence(), [first, second], tmp_path)
    assert "item 'text/1', method 'specache': RuntimeError: out of order" in str(failed.value)
    assert "item 'answer/0', method 'specache bits=1': OSError: gone" in str(failed.value)
    assert len(lines(tmp_path)) == 3


def test_a_resumed_run_may_add_methods_and_change_nothing_else(model, tmp_path):
    run(model, tmp_path, "full")
    calls.clear()
    rows = run(model, tmp_path, "kivi").rows
    assert measured() == 4
    assert [row["method"] for row in rows] == ["full", "kivi"] * 2
    before = (tmp_path / CELLS_FILE).read_bytes()
    with pytest.raises(EvaluationError) as error:
        run(model, tmp_path, "full", Divergence(length=160))
    assert "length is 420 there and 160 here" in str(error.value) and "--out" in str(error.value)
    with pytest.raises(EvaluationError, match="seed is 0 there and 1 here"):
        run(model, tmp_path, "full", seed=1)
    with pytest.raises(EvaluationError, match=r'another run: task is "divergence" there and "answers" here\. Nothing'):
        run(model, tmp_path, "full", AnswerScores())
    assert (tmp_path / CELLS_FILE).read_bytes() == before


def test_items_that_are_no_longer_the_same_do_not_mix(model, tmp_path):
    """As where a file that the task reads was changed since: prompts, or references alone."""

    @dataclasses.dataclass(frozen=True)
    class Changed(Divergence):
        def items(self, model: TaskModel) -> Iterator[Item]:
            for item in super().items(model):
                prompt = [*item.prompt[:-longer_by], *range(2, 2 + longer_by)]
                yield dataclasses.replace(item, prompt=prompt, facts={**item.facts, "reference": reference})

    longer_by, reference = 1, "one"
    run(model, tmp_path, "full", Changed())
    run(model, tmp_path, "full,kivi", Changed())
    before = files(tmp_path)
    for longer_by, reference in ((2, "one"), (1, "another")):  # noqa: B007 - read by `items`
        with pytest.raises(
            EvaluationError, match=r"item 'text/0' in .* was measured on another prompt \(420 tokens then, 420 now\)"
        ):
            run(model, tmp_path, "full,kivi,specache", Changed())
        assert files(tmp_path)[CELLS_FILE] == before[CELLS_FILE]


def test_weights_that_were_replaced_in_the_same_folder_do_not_mix(model, tmp_path):
    run(model, tmp_path, "full")
    with pytest.raises(EvaluationError, match=r"weights_digest is .* there and .* here"):
        run(TaskModel(llama(seed=1), None, "tiny"), tmp_path, "full,kivi")
    document = json.loads((tmp_path / RUN_FILE).read_text())
    del document["weights_digest"], document["began"]  # as earlier versions wrote it
    (tmp_path / RUN_FILE).write_text(json.dumps(document))
    assert len(run(model, tmp_path, "full,kivi").cells) == 8


def test_a_run_goes_on_with_the_date_on_which_it_began(tmp_path):
    """Chat templates may write today's date, and methods are compared on the same prompts."""
    began, later = datetime(2026, 3, 1), datetime(2026, 3, 2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B') }}" + tokenizer.chat_template
    weights = llama(vocab_size=len(tokenizer), max_position_embeddings=20_000)
    task, methods = Needle(lengths=(1500,), depths=(0.5,), max_new_tokens=2), ("full", "full,streaming-llm")
    for date, labels in zip((began, later), methods, strict=True):
        outcome = evaluate(TaskModel(weights, tokenizer, "tiny", date=date), task, parse_methods(labels), tmp_path)
    assert [cell["method"] for cell in outcome.cells] == ["full", "streaming-llm"]
    assert outcome.run.began == began.isoformat()


def test_a_folder_without_finished_cells_accepts_another_run(model, tmp_path):
    with pytest.raises(EvaluationError, match="no items"):
        run(model, tmp_path, "kivi", Divergence(items_per_group=0))
    run(model, tmp_path, "kivi", Divergence(items_per_group=1))


def test_a_label_whose_defaults_changed_is_another_run(model, tmp_path):
    run(model, tmp_path, "kivi")
    document = json.loads((tmp_path / RUN_FILE).read_text())
    document["methods"]["kivi"]["settings"]["residual"] = 96
    (tmp_path / RUN_FILE).write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match="method 'kivi': residual is 96 there and 128 here"):
        run(model, tmp_path, "kivi")


def test_a_line_left_incomplete_by_a_kill_is_measured_again(model, tmp_path):
    run(model, tmp_path, "kivi")
    data = (tmp_path / CELLS_FILE).read_bytes()
    (tmp_path / CELLS_FILE).write_bytes(data[:-20])
    calls.clear()
    run(model, tmp_path, "kivi")
    assert measured() == 1
    assert [(cell["item"], cell["values"]) for cell in lines(tmp_path)] == [
        (cell["item"], cell["values"]) for cell in map(json.loads, data.splitlines())
    ]


@pytest.mark.parametrize("broken", [b'{"item": "text/0"}', b"{nonsense", b"[]", b"", b'{"item": "\xff"}'])
def test_a_broken_line_is_named_and_nothing_is_changed(model, tmp_path, broken):
    run(model, tmp_path, "kivi")
    kept = (tmp_path / CELLS_FILE).read_bytes().splitlines()
    kept[1] = broken
    (tmp_path / CELLS_FILE).write_bytes(b"\n".join(kept) + b"\n")
    with pytest.raises(EvaluationError, match=r"cells\.jsonl, line 2 is no result: it (lacks|is not JSON|is not UTF-8)"):
        run(model, tmp_path, "kivi,full")
    assert (tmp_path / CELLS_FILE).read_bytes() == b"\n".join(kept) + b"\n"
    assert "full" not in json.loads((tmp_path / RUN_FILE).read_text())["methods"]


def test_a_full_disk_loses_only_the_cell_it_hit(model, tmp_path, monkeypatch):
    write, room = os.write, [3]

    def almost_full(descriptor: int, data: Any) -> int:
        if not bytes(data).startswith(b'{"item"'):
            return write(descriptor, data)
        room[0] -= 1
        if room[0] >= 0:
            return write(descriptor, data)
        write(descriptor, bytes(data)[:30])  # as much as fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "write", almost_full)
    with pytest.raises(EvaluationError, match=r"the disk is full: .*3 finished cells are kept.*same command"):
        run(model, tmp_path)
    assert len(lines(tmp_path)) == 3
    monkeypatch.undo()
    calls.clear()
    run(model, tmp_path)
    assert measured() == 12 - 3


def test_a_folder_in_use_is_refused(tmp_path):
    """The lock belongs to the open file, so a second process is refused in the same way."""
    described = Run({"task": "t", "seed": 0}, "score")
    with open_results(tmp_path, described):  # noqa: SIM117
        with pytest.raises(EvaluationError, match="another process is writing results"), open_results(tmp_path, described):
            pass
    with open_results(tmp_path, described):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_holds_no_folder(tmp_path):
    described = Run({"task": "t", "seed": 0}, "score")
    holding = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with open_results(tmp_path, described):
            holding.set()
            time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    assert holding.wait(30)
    with pytest.raises(EvaluationError, match="another process is writing results"), open_results(tmp_path, described):
        pass
    child.kill()
    child.join()
    with open_results(tmp_path, described):
        pass


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_without_locks_serves(tmp_path, monkeypatch, reason):
    def no_locks(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_results(tmp_path, Run({"task": "t", "seed": 0}, "score")) as opened:
        assert not opened.cells


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    with (
        pytest.raises(EvaluationError, match=r"cannot write results to .*Read-only file system\. Choose another --out"),
        open_results(tmp_path, Run({"task": "t", "seed": 0}, "score")),
    ):
        pass


def test_a_method_that_cannot_run_here_is_skipped_once(model, tmp_path):
    told: list[tuple[str, str]] = []

    class Watch(Progress):
        total = done = 0

        def begin(self, cells: int, done: int) -> None:
            self.total, self.done = cells, done

        def finished(self, cells: int = 1) -> None:
            self.done += cells

        def skipped(self, method: str, reason: str) -> None:
            told.append((method, reason))

    watch = Watch()
    missing = NamedMethod("missing", MissingMethod())
    outcome = evaluate(model, Divergence(), [missing, *parse_methods("kivi")], tmp_path, progress=watch)
    assert told == [("missing", "the library 'nowhere' is not installed")]
    assert outcome.run.skipped == dict(told)
    assert {row["method"] for row in outcome.rows} == {"kivi"} and (watch.total, watch.done) == (8, 8)
    with pytest.raises(EvaluationError, match="none of the methods can run here: missing: the library"):
        evaluate(model, Divergence(), [missing], tmp_path / "other")


def test_items_share_the_prefill_of_what_they_have_in_common(model, tmp_path):
    read: list[int] = []
    hook = model.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: read.append(ids[0].shape[1]))
    try:
        shared = run(model, tmp_path / "shared", "kivi").rows
        assert [count for count in read if count in (100, 320, 420)] == [100, 320, 320] * 2  # the prefills
        read.clear()
        alone = run(model, tmp_path / "alone", "kivi", Divergence(shared=0)).rows
        assert [count for count in read if count in (100, 320, 420)] == [420] * 4
    finally:
        hook.remove()
    assert len(shared) == len(alone)


def test_a_shared_prefill_changes_no_result(model, tmp_path):
    class Unshared(Divergence):
        def items(self, model):
            for item in super().items(model):
                yield runner.Item(item.id, item.group, item.prompt, 0, item.facts)

    shared, alone = run(model, tmp_path / "a", "kivi"), run(model, tmp_path / "b", "kivi", Unshared())
    for mine, theirs in zip(shared.cells, alone.cells, strict=True):
        assert mine["values"] == pytest.approx(theirs["values"], abs=1e-4)


def test_bad_tasks_are_found_before_anything_is_measured(model, tmp_path):
    class Twice(Divergence):
        def items(self, model):
            yield from super().items(model)
            yield from super().items(model)

    with pytest.raises(EvaluationError, match="two items called 'text/0'"):
        run(model, tmp_path / "twice", task=Twice())
    with pytest.raises(EvaluationError, match="no items"):
        run(model, tmp_path / "none", task=Divergence(items_per_group=0))
    assert not calls


def test_a_value_that_is_not_finite_is_an_error(model, tmp_path):
    class Broken(AnswerScores):
        def measure(self, model, prepared, session):
            return runner.Measurement([float("nan")])

    with pytest.raises(EvaluationError, match="item 'answer/0', method 'full': a figure of 'values' is not a finite number"):
        run(model, tmp_path, task=Broken())


def test_a_results_folder_that_cannot_be_used_is_refused(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(EvaluationError, match="cannot write results to"):
        run(model, file)
    (tmp_path / CELLS_FILE).write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"no run\.json"):
        run(model, tmp_path)
    with pytest.raises(ConfigError, match="twice"):
        evaluate(model, Divergence(), parse_methods("kivi") * 2, tmp_path / "out")


def test_rows_do_not_depend_on_the_order_in_which_cells_were_finished(model, tmp_path):
    outcome = run(model, tmp_path)
    assert aggregate(outcome.run, outcome.cells[::-1]) == outcome.rows


def test_a_model_of_the_same_name_goes_on_wherever_its_files_lie():
    """As that of a hub name or of `demo` in another cache folder."""
    moved, other = tiny_task_model(), tiny_task_model()
    moved.model.config._name_or_path = "/elsewhere"
    other.model.config.rms_norm_eps *= 2
    here, there, another = (describe_run(one, Divergence(), [], 0).identity for one in (tiny_task_model(), moved, other))
    assert here == there and here["fingerprint"] != another["fingerprint"]
