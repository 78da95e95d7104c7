"""Two runs are compared: what moved is found, what did not is not, and the basis is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specache.cli.console import EXIT_ERROR, EXIT_USAGE
from specache.errors import EvaluationError
from specache.eval.compare_runs import compare_runs
from specache.eval.results import CELLS_FILE
from tests.cli.running import one_line, run
from tests.eval.result_folders import KL, SCORE, write_run

TOKENS = 64


def divergences(scale: float = 0.01, *, seed: int = 0, items: int = 6, tokens: int = TOKENS) -> dict[str, list[float]]:
    """Items that differ much from each other, as documents do."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.2, 5, items)
    return {f"text/{number}": (scale * size * rng.exponential(1, tokens)).tolist() for number, size in enumerate(sizes)}


def scaled(items: dict[str, list[float]], factor: float) -> dict[str, list[float]]:
    return {item: [factor * value for value in values] for item, values in items.items()}


def changes(comparison, figure="mean"):
    return {change.method: change for change in comparison.changes if change.figure == figure}


@pytest.fixture
def before(tmp_path):
    return write_run(tmp_path / "before", {"specache": divergences(), "kivi": divergences(0.1)})


def test_nothing_moves_between_equal_runs(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": divergences(), "kivi": divergences(0.1)})
    comparison = compare_runs(before, after)
    assert comparison.moved == [] and comparison.notes == []
    assert {change.figure for change in comparison.changes} == {"mean", "p99", "memory"}
    assert all(change.difference == 0 for change in comparison.changes)


def test_a_small_change_of_all_tokens_is_found_because_items_are_paired(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": scaled(divergences(), 0.9), "kivi": divergences(0.1)})
    change = changes(compare_runs(before, after))["specache"]
    assert change.verdict == "better" and change.basis == "paired" and change.items == 6
    assert change.ci95 is not None and change.ci95[0] < change.difference < change.ci95[1] < 0
    assert changes(compare_runs(before, after))["kivi"].verdict == "same"
    assert changes(compare_runs(after, before))["specache"].verdict == "worse"


def test_a_change_that_is_noise_is_not_found(before, tmp_path):
    factors = np.random.default_rng(5).choice([0.5, 1.5], TOKENS)
    noisy = {item: (factors * values).tolist() for item, values in divergences().items()}
    after = write_run(tmp_path / "after", {"specache": noisy})
    assert changes(compare_runs(before, after))["specache"].verdict == "same"


def test_other_items_are_compared_by_their_intervals(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": scaled(divergences(seed=1), 0.9)}, facts={"document": "another"})
    change = changes(compare_runs(before, after))["specache"]
    assert change.basis == "intervals" and change.ci95 is None and change.verdict == "same"
    much = write_run(tmp_path / "much", {"specache": scaled(divergences(seed=1), 20)}, facts={"document": "another"})
    assert changes(compare_runs(before, much))["specache"].verdict == "worse"


def test_items_of_another_length_are_not_the_same(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": divergences()}, tokens=9000)
    assert changes(compare_runs(before, after))["specache"].basis == "intervals"


def test_only_items_that_both_have_are_paired(before, tmp_path):
    items = dict(list(divergences().items())[:4])
    change = changes(compare_runs(before, write_run(tmp_path / "after", {"specache": items})))["specache"]
    assert change.items == 4 and change.difference == 0 and change.verdict == "same"


def test_answers_of_other_lengths_are_paired_by_item(before, tmp_path):
    shorter = {item: values[:50] for item, values in scaled(divergences(), 0.5).items()}
    change = changes(compare_runs(before, write_run(tmp_path / "after", {"specache": shorter})))["specache"]
    assert change.basis == "paired" and change.verdict == "better"


@pytest.mark.parametrize(("lost", "verdict"), [(1, "same"), (15, "worse")])
def test_scores_are_paired_and_more_is_better(lost, verdict, tmp_path):
    right = {f"needle/{number}": [1.0] for number in range(40)}
    fewer = {item: [0.0] if number < lost else [1.0] for number, item in enumerate(right)}
    one = write_run(tmp_path / "one", {"full": right, "specache": right}, unit=SCORE)
    other = write_run(tmp_path / "other", {"full": right, "specache": fewer}, unit=SCORE)
    mean = changes(compare_runs(one, other))["specache"]
    assert mean.difference == pytest.approx(-lost / 40) and mean.verdict == verdict and mean.basis == "paired"
    kept = changes(compare_runs(one, other), "kept")["specache"]
    assert kept.before == 1.0 and kept.verdict == verdict and kept.basis == "paired"


def test_what_is_kept_is_paired_where_the_full_cache_got_the_same_right(tmp_path):
    """Ten more of 60 answers: two intervals would still touch."""
    right = {f"needle/{number}": [1.0] for number in range(60)}
    runs = {
        name: {item: [float(number % 6 < kept)] for number, item in enumerate(right)} for name, kept in (("few", 3), ("more", 4))
    }
    few, more = (write_run(tmp_path / name, {"full": right, "specache": scores}, unit=SCORE) for name, scores in runs.items())
    kept = changes(compare_runs(few, more), "kept")["specache"]
    assert (kept.before, kept.after) == (pytest.approx(1 / 2), pytest.approx(2 / 3))
    assert (kept.basis, kept.verdict, kept.items) == ("paired", "better", 60) and kept.ci95 is not None and kept.ci95[0] > 0
    fewer_right = {item: [float(number > 0)] for number, item in enumerate(right)}
    other = write_run(tmp_path / "other", {"full": fewer_right, "specache": runs["more"]}, unit=SCORE)
    assert changes(compare_runs(few, other), "kept")["specache"].basis == "intervals"


def test_memory_is_compared_on_the_items_that_both_have(tmp_path):
    """A run that was stopped after its short documents, where a method holds a larger share."""
    memory = {"specache": [(0.3, 0.0), (0.2, 0.0), (0.1, 0.0)]}
    whole = write_run(tmp_path / "whole", {"specache": divergences(items=3)}, memory=memory)
    begun = write_run(tmp_path / "begun", {"specache": divergences(items=3)}, memory=memory)
    cells = (begun / CELLS_FILE).read_text().splitlines(keepends=True)
    (begun / CELLS_FILE).write_text(cells[0])
    comparison = compare_runs(whole, begun)
    assert comparison.moved == []
    change = changes(comparison, "memory")["specache"]
    assert change.before == change.after == pytest.approx(0.3) and change.items == 1


def test_memory_that_grew_is_worse(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": divergences()}, memory={"specache": (0.19, 0.08)})
    (change,) = compare_runs(before, after).moved
    assert (change.figure, change.verdict) == ("memory", "worse") and change.before == pytest.approx(0.25)


def test_methods_of_one_run_only_and_other_defaults_are_named(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": divergences(), "full": divergences(0.0)}, settings={"bits": 2, "top_k": 128})
    comparison = compare_runs(before, after)
    assert comparison.only_before == [("fidelity/text", "kivi")] and comparison.only_after == [("fidelity/text", "full")]
    assert "specache has other defaults: top_k None -> 128" in comparison.notes


def test_another_dtype_is_another_setting_unless_it_is_ignored(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": scaled(divergences(), 2)}, dtype="bfloat16", fingerprint="other")
    with pytest.raises(EvaluationError, match=r"dtype is float32 .* and bfloat16 .* --ignore dtype"):
        compare_runs(before, after)
    comparison = compare_runs(before, after, ["dtype"])
    assert changes(comparison)["specache"].verdict == "worse"
    assert len(comparison.notes) == 1 and comparison.notes[0].startswith("dtype is float32")
    with pytest.raises(EvaluationError, match="no such setting"):
        compare_runs(before, after, ["colour"])


def test_folders_of_different_tasks_or_without_results_are_refused(before, tmp_path):
    scores = write_run(tmp_path / "scores", {"specache": {"a/0": [1.0]}}, unit=SCORE)
    with pytest.raises(EvaluationError, match="Compare folders of the same task"):
        compare_runs(before, scores)
    with pytest.raises(EvaluationError, match="holds no results"):
        compare_runs(before, tmp_path / "nothing")
    with pytest.raises(EvaluationError, match="no finished cells"):
        compare_runs(before, write_run(tmp_path / "empty", {"specache": {}}))


def test_the_command_shows_what_moved_and_fails_only_if_it_is_asked_to(before, tmp_path):
    after = write_run(tmp_path / "after", {"specache": scaled(divergences(), 2), "full": divergences(0.0)})
    result = run("eval", "report", before, after, "--json", "-")
    document = json.loads(result.stdout)
    assert document["unit"] == KL and document["only_after"] == [{"task": "fidelity/text", "method": "full"}]
    assert {change["verdict"] for change in document["changes"] if change["figure"] == "mean"} == {"worse"}
    text = one_line(result.stderr)
    assert "worse" in text and "2 of 3 figures moved" in text and "only before: fidelity/text, kivi" in text
    assert "memory" not in text and "memory" in one_line(run("eval", "report", before, after, "--all").stderr)
    failed = run("eval", "report", before, after, "--fail-on-regression", code=EXIT_ERROR)
    assert "2 figures became worse" in one_line(failed.stderr)
    run("eval", "report", after, before, "--fail-on-regression")


@pytest.mark.parametrize("option", ["--ignore dtype", "--all", "--fail-on-regression", "--json -", "--commit abc1234"])
def test_options_of_two_runs_are_refused_with_one(option, before):
    run("eval", "report", before, *option.split(), code=EXIT_USAGE)


def test_a_summary_is_of_one_run(before, tmp_path):
    assert "name one folder" in one_line(run("eval", "report", before, before, "--summary", tmp_path / "f", code=EXIT_USAGE).stderr)
