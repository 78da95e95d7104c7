"""Means, tails and their 95% confidence intervals, reproducible for a seed.

Values come in series, one per item. A score is a series of one value. The tokens of one item are
correlated, so a hierarchical block bootstrap resamples them: first items, then blocks of successive
tokens within each item that was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 16  # successive tokens that are drawn together
MINIMUM_BLOCKS = 4  # per series: a block as long as the series would always give the series itself
RESAMPLES = 1000
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution

_CHUNK = 1 << 21  # numbers of resamples in memory at once

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]  # [m, N] -> [m]: one figure per sample


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """Return `[low, high]`, for JSON."""
        return [self.low, self.high]


def mean(samples: Values) -> Values:
    """Return the average."""
    return np.asarray(samples.mean(axis=-1))


def percentile(share: float) -> Statistic:
    """Return a statistic: the value that `share` percent of all are at most, interpolated."""

    def statistic(samples: Values) -> Values:
        place = (samples.shape[-1] - 1) * share / 100
        low, high = math.floor(place), math.ceil(place)
        near = np.partition(samples, (low, high), axis=-1)  # several times faster than np.percentile
        return np.asarray(near[..., low] + (near[..., high] - near[..., low]) * (place - low))

    return statistic


def perplexity(samples: Values) -> Values:
    """Return exp of the mean negative log-likelihood, in nats."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(samples.mean(axis=-1)))


def bootstrap(
    series: Sequence[Sequence[float]],
    statistics: Mapping[str, Statistic],
    *,
    seed: int = 0,
    block: int = BLOCK_TOKENS,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """Estimate statistics of all values, with intervals from a seeded hierarchical block bootstrap.

    With a single item the interval covers the variation of its tokens, not of other items.

    Args:
        series: one per item, none of them empty. Every token weighs the same, so long items weigh
            more.
        statistics: by name. All of them see the same resamples.
        block: successive tokens that are drawn together, at most a quarter of a series. Blocks wrap
            around its end.
    """
    parts = [np.asarray(values, dtype=np.float64) for values in series]
    together = np.concatenate(parts)[None]
    drawn: dict[str, list[Values]] = {name: [] for name in statistics}
    for samples in _samples(parts, np.random.default_rng(seed), block, resamples):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(samples))
    return {name: _estimate(float(statistic(together)[0]), drawn[name]) for name, statistic in statistics.items()}


def score(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Estimate the mean of one score in [0, 1] per item.

    The interval is a bootstrap over items. It is the Wilson interval if all scores are 0 or 1, and
    if all are equal: a bootstrap would then have no width, even after three items.
    """
    array = np.asarray(values, dtype=np.float64)
    average = float(array.mean())
    within = bool(((array >= 0) & (array <= 1)).all())
    if within and (np.isin(array, (0.0, 1.0)).all() or np.ptp(array) == 0):
        return wilson(average * len(array), len(array))
    return bootstrap([[value] for value in array], {"mean": mean}, seed=seed, resamples=resamples)["mean"]


def difference(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Estimate the mean of one difference of two scores per item, each in [-1, 1].

    The interval is a bootstrap over items. If all differences are equal, a bootstrap would have no
    width. The interval then reaches as far as an unseen difference could: by the Wilson bound of a
    share of which nothing was observed.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0:
        value, hidden = float(array[0]), wilson(0, len(array)).high
        return Estimate(value, max(-1.0, value - hidden), min(1.0, value + hidden))
    return bootstrap([[value] for value in array], {"mean": mean}, seed=seed, resamples=resamples)["mean"]


def agreement(series: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """Estimate the share of ones in series of 0 and 1.

    The interval is a hierarchical bootstrap, or the Wilson interval if all values are equal, where
    a bootstrap would have no width.
    """
    array = np.concatenate([np.asarray(values, dtype=np.float64) for values in series])
    if np.ptp(array) > 0:
        return bootstrap(series, {"share": mean}, seed=seed)["share"]
    return wilson(float(array.sum()), len(array))


def wilson(successes: float, trials: int) -> Estimate:
    """Return a share with its Wilson score interval. Without trials it is (nan, 0, 1)."""
    if trials == 0:
        return Estimate(math.nan, 0.0, 1.0)
    share = successes / trials
    scale = 1 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / scale
    margin = _Z / scale * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return Estimate(share, max(0.0, min(share, centre - margin)), min(1.0, max(share, centre + margin)))


def _samples(parts: list[Values], rng: np.random.Generator, block: int, resamples: int) -> Iterator[Values]:
    """Yield all resamples [m, N], batched where the series have equal lengths and memory allows."""
    if len({len(part) for part in parts}) > 1:
        for _ in range(resamples):
            yield _resample(parts, rng, block)[None]
        return
    series = np.stack(parts)
    at_once = max(1, _CHUNK // series.size)
    for begin in range(0, resamples, at_once):
        yield _resample_equal(series, rng, block, min(at_once, resamples - begin))


def _resample(parts: list[Values], rng: np.random.Generator, block: int) -> Values:
    chosen = rng.integers(len(parts), size=len(parts))
    return np.concatenate([parts[index][_positions(rng, (), len(parts[index]), block)] for index in chosen])


def _resample_equal(series: Values, rng: np.random.Generator, block: int, count: int) -> Values:
    """Return `count` resamples [count, n * length] of items [n, length]."""
    items, length = series.shape
    chosen = rng.integers(items, size=(count, items, 1))
    flat = chosen * length + _positions(rng, (count, items), length, block)
    return series.reshape(-1)[flat.reshape(count, -1)]


def _positions(rng: np.random.Generator, shape: tuple[int, ...], length: int, block: int) -> NDArray[np.int64]:
    """Draw `length` positions [*shape, length] in a series (circular block bootstrap).

    Blocks begin anywhere and wrap around.
    """
    width = min(block, max(1, length // MINIMUM_BLOCKS))
    starts = rng.integers(length, size=(*shape, -(-length // width), 1))
    places = (starts + np.arange(width)).reshape(*shape, -1)
    return np.asarray(places[..., :length] % length)


def _estimate(value: float, drawn: list[Values]) -> Estimate:
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return Estimate(value, min(float(low), value), max(float(high), value))
