"""Confidence intervals: what they contain, how wide they are, and that they are reproducible."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specache.eval import statistics
from specache.eval.statistics import Estimate, agreement, bootstrap, difference, mean, percentile, perplexity, score, wilson

RNG = np.random.default_rng(1)


def test_the_same_numbers_give_the_same_interval():
    series = [RNG.exponential(size=40).tolist() for _ in range(5)]
    assert bootstrap(series, {"mean": mean}, seed=3) == bootstrap(series, {"mean": mean}, seed=3)
    assert bootstrap(series, {"mean": mean}, seed=3) != bootstrap(series, {"mean": mean}, seed=4)


@pytest.mark.parametrize("lengths", [[40] * 6, [40, 7, 90, 1]])
def test_values_are_those_of_all_tokens_and_lie_inside_their_intervals(lengths):
    series = [RNG.exponential(size=length).tolist() for length in lengths]
    together = np.concatenate(series)
    estimates = bootstrap(series, {"mean": mean, "p95": percentile(95), "ppl": perplexity})
    assert estimates["mean"].value == pytest.approx(together.mean())
    assert estimates["p95"].value == pytest.approx(np.percentile(together, 95))
    assert estimates["ppl"].value == pytest.approx(math.exp(together.mean()))
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in estimates.values())


@pytest.mark.parametrize("share", [0, 1, 50, 95, 99, 100])
@pytest.mark.parametrize("length", [1, 2, 7, 128])
def test_percentiles_are_numpys(share, length):
    values = RNG.exponential(size=length)
    assert percentile(share)(values[None])[0] == pytest.approx(np.percentile(values, share))


def test_intervals_of_equal_and_of_unequal_items_are_the_same_bootstrap():
    """Compare the two code paths for equal and unequal lengths: one more token changes little."""
    series = [(RNG.exponential(size=64) + item).tolist() for item in range(8)]
    equal = bootstrap(series, {"mean": mean})["mean"]
    unequal = bootstrap([[*series[0], series[0][0]], *series[1:]], {"mean": mean})["mean"]
    assert equal.high - equal.low == pytest.approx(unequal.high - unequal.low, rel=0.15)


def test_equal_tokens_of_an_item_count_as_one_observation():
    """Five documents of a hundred equal tokens are five observations, not five hundred."""
    correlated = [[value] * 100 for value in RNG.normal(size=5)]
    independent = RNG.permutation(np.concatenate(correlated)).reshape(5, 100).tolist()
    wide, narrow = (bootstrap(series, {"mean": mean})["mean"] for series in (correlated, independent))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_successive_tokens_are_resampled_in_blocks():
    """If tokens come in runs, an interval that ignored the runs would be too narrow."""
    runs = np.repeat(RNG.normal(size=40), 16).tolist()
    blocks = bootstrap([runs], {"mean": mean})["mean"]
    single = bootstrap([runs], {"mean": mean}, block=1)["mean"]
    assert blocks.high - blocks.low > 2.5 * (single.high - single.low)


def test_the_interval_of_a_short_text_has_width():
    """Sixteen tokens are one block of sixteen; its tokens still vary."""
    estimate = bootstrap([RNG.normal(size=16).tolist()], {"mean": mean})["mean"]
    assert estimate.high - estimate.low > 0.2


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        centres = rng.normal(size=30)
        series = [(centre + rng.normal(size=20)).tolist() for centre in centres]
        estimate = bootstrap(series, {"mean": mean}, resamples=200)["mean"]
        hits += estimate.low <= 0 <= estimate.high
    assert 85 <= hits <= 100


def test_wilson_interval_is_the_textbooks():
    estimate = wilson(8, 10)
    assert (estimate.low, estimate.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(300, 300).low == pytest.approx(0.9874, abs=1e-4)
    assert wilson(0, 0).interval == [0.0, 1.0]


def test_scores_of_zero_and_one_are_shares_and_others_are_resampled():
    assert score([1, 1, 0, 1]) == wilson(3, 4)
    graded = score([0.2, 0.9, 0.4, 0.7, 0.5])
    assert graded.value == pytest.approx(0.54)
    assert 0.2 < graded.low < 0.54 < graded.high < 0.9


@pytest.mark.parametrize("estimate", [score([1.0] * 3), score([0.4] * 3), difference([0.0] * 3), agreement([[1.0] * 2] * 2)])
def test_three_equal_items_have_a_wide_interval(estimate: Estimate):
    assert estimate.high - estimate.low > 0.3


def test_more_items_narrow_the_interval():
    assert difference([0.0] * 300).high < 0.02
    assert statistics.score([1.0] * 300).low > 0.98
