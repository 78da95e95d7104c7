"""Suggest changes that make a batch fit: single settings first, each checked by the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specache.cache.sizes import fetches
from specache.config import SUPPORTED_BITS, Policy, SlowTierKind, SpeCacheConfig
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, plan, uniform_batch

SMALLEST_CHUNK = 32  # tokens; a smaller chunk reads the weights too often to be advised
LONGEST = 1 << 26  # tokens, where the model has no limit
LARGEST_BATCH = 1 << 16
_FEWEST_PAIRS = 16  # pairs per KV head and step; fewer are not advised


@dataclass(frozen=True)
class Suggestion:
    """A change after which the batch fits.

    Attributes:
        changes: settings of `SpeCacheConfig` and their values; `context` and `batch` change the
            request itself.
        fast_bytes: fast memory that the batch then needs.
    """

    changes: dict[str, Any]
    fast_bytes: int

    def __str__(self) -> str:
        """Return the change as Python settings: `bits=1 (needs 1,234,567 bytes)`."""
        changes = " and ".join(f"{name}={_quoted(value)}" for name, value in self.changes.items())
        return f"{changes} (needs {self.fast_bytes:,} bytes)"


def suggestions(
    model: ModelDimensions, config: SpeCacheConfig, sequences: Sequence[PlannedSequence], limit: int
) -> list[Suggestion]:
    """Return every single change that makes the batch fit into `limit` bytes.

    If there is none, return a combination of settings.

    Args:
        config: settings with every `auto` resolved.
    """

    def needed(changes: dict[str, Any]) -> int:
        return plan(model, config.with_changes(**changes), sequences).fast

    def fits(changes: dict[str, Any]) -> bool:
        return needed(changes) <= limit

    singles = list(_fewer_bits(config))
    singles += [pairs for pairs in _fewer_pairs(config) if fits(pairs)][:1]
    if fetches(config) and config.hot_set:
        singles.append({"hot_set": _largest_hot_set(config, fits)})
    if chunk := largest(lambda c: fits({"prefill_chunk": c}), SMALLEST_CHUNK, config.prefill_chunk - 1):
        singles.append({"prefill_chunk": chunk})
    fitting = [Suggestion(one, needed(one)) for one in singles if fits(one)]
    if not fitting:
        fitting += [Suggestion(several, needed(several)) for several in _combined_changes(config) if fits(several)][:1]
    longest = longest_context(model, config, len(sequences), limit)
    if longest:
        fitting.append(Suggestion({"context": longest}, plan(model, config, uniform_batch(longest, len(sequences))).fast))
    batch = largest_batch(model, config, max(sequence.total for sequence in sequences), limit) if len(sequences) > 1 else 0
    if batch:
        context = max(sequence.total for sequence in sequences)
        fitting.append(Suggestion({"batch": batch}, plan(model, config, uniform_batch(context, batch)).fast))
    return fitting


def smaller(
    model: ModelDimensions,
    config: SpeCacheConfig,
    sequences: Sequence[PlannedSequence],
    needs: Callable[[SpeCacheConfig, MemoryPlan], int],
) -> list[Suggestion]:
    """Return single changes after which a batch needs fewer bytes.

    Those that do not change the output come first.

    Args:
        config: settings with every `auto` resolved.
        needs: function of settings and their plan that returns the bytes to compare. They become
            `Suggestion.fast_bytes`.
    """
    now = needs(config, plan(model, config, sequences))
    changes: list[dict[str, Any]] = []
    if fetches(config) and config.hot_set:
        changes.append({"hot_set": 0.0})
    if config.prefill_chunk > SMALLEST_CHUNK:
        changes.append({"prefill_chunk": max(SMALLEST_CHUNK, config.prefill_chunk // 4)})
    if config.slow_tier is not SlowTierKind.DISK:
        changes.append({"slow_tier": "disk:FOLDER"} | ({"policy": Policy.ON_DEMAND} if config.policy is Policy.FULL else {}))
    changes += _fewer_bits(config)
    changes += _fewer_pairs(config)[-1:]
    planned = ((one, config.with_changes(**one)) for one in changes)
    suggested = [Suggestion(one, needs(settings, plan(model, settings, sequences))) for one, settings in planned]
    if len(sequences) > 1:
        half = sequences[: len(sequences) // 2]
        suggested.insert(0, Suggestion({"batch": len(half)}, needs(config, plan(model, config, half))))
    return [suggestion for suggestion in suggested if suggestion.fast_bytes < now]


def longest_context(model: ModelDimensions, config: SpeCacheConfig, batch: int, limit: int) -> int:
    """Return the most tokens that each of `batch` sequences can have within `limit` bytes.

    Return 0 if none fits.
    """
    return largest(
        lambda tokens: plan(model, config, uniform_batch(tokens, batch)).fast <= limit, 1, model.max_positions or LONGEST
    )


def largest_batch(model: ModelDimensions, config: SpeCacheConfig, context: int, limit: int) -> int:
    """Return the most sequences of `context` tokens within `limit` bytes; 0 if none fits."""
    return largest(lambda batch: plan(model, config, uniform_batch(context, batch)).fast <= limit, 1, LARGEST_BATCH)


def least_bytes(model: ModelDimensions, config: SpeCacheConfig, sequences: Sequence[PlannedSequence]) -> int:
    """Return the fast memory needed with the smallest settings in the same code, groups and tier.

    The smallest settings are the fewest bits and pairs, no hot set, and prefill token by token.
    """
    smallest = {**_smallest(config), "prefill_chunk": 1, **_pairs(config, 1)}
    return plan(model, config.with_changes(**smallest), sequences).fast


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in `[low, high]` that fits, given that all below it fit.

    Return 0 if none does.
    """
    if high < low or not fits(low):
        return 0
    step = 1
    while low + step <= high and fits(low + step):  # so that no number far beyond the answer is tried
        low, step = low + step, 2 * step
    return bisect(fits, low, min(high, low + step - 1))


def bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in `[low, high]` that fits, given that `low` does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fewer_bits(config: SpeCacheConfig) -> Iterator[dict[str, Any]]:
    if config.policy is Policy.FULL:
        yield {"policy": Policy.ON_DEMAND}
        return
    yield from ({"bits": bits} for bits in sorted(SUPPORTED_BITS, reverse=True) if bits < config.bits)


def _fewer_pairs(config: SpeCacheConfig) -> list[dict[str, Any]]:
    """Return changes to fewer pairs per step, powers of two, the most first."""
    if not fetches(config):
        return []
    exponents = range((config.long_top_k - 1).bit_length() - 1, _FEWEST_PAIRS.bit_length() - 2, -1)
    return [_pairs(config, 1 << exponent) for exponent in exponents]


def _pairs(config: SpeCacheConfig, pairs: int) -> dict[str, Any]:
    """Return the changes to so many pairs per step at every length."""
    follows = "long_top_k" in config.left_open or config.long_top_k == pairs
    return {"top_k": pairs} if follows else {"top_k": pairs, "long_top_k": pairs}


def _largest_hot_set(config: SpeCacheConfig, fits: Callable[[dict[str, Any]], bool]) -> float:
    """Return the largest share of the 16-bit cache that fits as hot set, in steps of 0.01.

    Return 0.0 (the pairs of one step only) if none fits or the hot set was given in bytes.
    """
    if not isinstance(config.hot_set, float):
        return 0.0
    hundredths = round(config.hot_set * 100)
    return largest(lambda share: fits({"hot_set": share / 100}), 1, hundredths - 1) / 100


def _combined_changes(config: SpeCacheConfig) -> Iterator[dict[str, Any]]:
    """Yield combinations of changes, from the least costly to all of them."""
    smallest = _smallest(config)
    at_these_bits = {name: value for name, value in smallest.items() if name not in ("bits", "residual")}
    chunks = [min(chunk, config.prefill_chunk) for chunk in (config.prefill_chunk, 128, SMALLEST_CHUNK)]
    for settings in (at_these_bits, smallest):
        yield from ({**settings, "prefill_chunk": chunk} if chunk < config.prefill_chunk else settings for chunk in chunks)


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _smallest(config: SpeCacheConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"bits": min(SUPPORTED_BITS)}
    if "residual" in config.left_open and config.bits > settings["bits"]:
        settings["residual"] = config.residual  # fewer bits would keep more tokens at 16 bits by default
    if config.policy is Policy.FULL:
        settings["policy"] = Policy.ON_DEMAND
        config = config.with_changes(policy=Policy.ON_DEMAND)
    if fetches(config):
        settings |= {"hot_set": 0.0, **_pairs(config, min(config.top_k, _FEWEST_PAIRS))}
    return settings
