"""What would make a batch fit: single changes first, each computed by the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specache.cache.sizes import fetches
from specache.config import SUPPORTED_BITS, Policy, SlowTierKind, SpeCacheConfig
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, even_loads, plan

SMALLEST_CHUNK = 32  # tokens; below it a prefill reads the weights too often to be advised
LONGEST = 1 << 26  # tokens, where the model states no limit
LARGEST_BATCH = 1 << 16
_FEWEST_PAIRS = 16


@dataclass(frozen=True)
class Suggestion:
    """A change after which the batch fits.

    Attributes:
        changes: settings of `SpeCacheConfig` and their values; `context` and `batch` for the request itself.
        fast_bytes: what it then needs.
    """

    changes: dict[str, Any]
    fast_bytes: int

    def __str__(self) -> str:
        """In the words of the library: `bits=1 (needs 1,234,567 bytes)`."""
        said = " and ".join(f"{name}={_quoted(value)}" for name, value in self.changes.items())
        return f"{said} (needs {self.fast_bytes:,} bytes)"


def suggestions(model: ModelDimensions, config: SpeCacheConfig, loads: Sequence[PlannedSequence], limit: int) -> list[Suggestion]:
    """Every single change that makes the batch fit into `limit` bytes, then several settings together if none does.

    Args:
        config: with every `auto` decided.
    """

    def needed(changes: dict[str, Any]) -> int:
        return plan(model, replace(config, **changes), loads).fast

    def fits(changes: dict[str, Any]) -> bool:
        return needed(changes) <= limit

    singles = list(_single_changes(config))
    if fetches(config) and config.hot_set:
        singles.append({"hot_set": _largest_hot_set(config, fits)})
    if chunk := largest(lambda c: fits({"prefill_chunk": c}), SMALLEST_CHUNK, config.prefill_chunk - 1):
        singles.append({"prefill_chunk": chunk})
    found = [Suggestion(one, needed(one)) for one in singles if fits(one)]
    if not found:
        found += [Suggestion(several, needed(several)) for several in _combined_changes(config) if fits(several)][:1]
    longest = longest_context(model, config, len(loads), limit)
    if longest:
        found.append(Suggestion({"context": longest}, plan(model, config, even_loads(longest, len(loads))).fast))
    batch = largest_batch(model, config, max(load.total for load in loads), limit) if len(loads) > 1 else 0
    if batch:
        context = max(load.total for load in loads)
        found.append(Suggestion({"batch": batch}, plan(model, config, even_loads(context, batch)).fast))
    return found


def smaller(
    model: ModelDimensions,
    config: SpeCacheConfig,
    loads: Sequence[PlannedSequence],
    needs: Callable[[SpeCacheConfig, MemoryPlan], int],
) -> list[Suggestion]:
    """Single changes after which a batch needs less than it does, those first that change no answer.

    Args:
        config: with every `auto` decided.
        needs: of a plan and the settings it is for, the bytes that count; `Suggestion.fast_bytes` are these.
    """
    now = needs(config, plan(model, config, loads))
    changes: list[dict[str, Any]] = []
    if fetches(config) and config.hot_set:
        changes.append({"hot_set": 0.0})
    if config.prefill_chunk > SMALLEST_CHUNK:
        changes.append({"prefill_chunk": max(SMALLEST_CHUNK, config.prefill_chunk // 4)})
    if config.slow_tier is not SlowTierKind.DISK:
        changes.append({"slow_tier": "disk:FOLDER"} | ({"policy": Policy.ON_DEMAND} if config.policy is Policy.FULL else {}))
    changes += _single_changes(config)
    planned = ((one, replace(config, **one)) for one in changes)
    found = [Suggestion(one, needs(settings, plan(model, settings, loads))) for one, settings in planned]
    if len(loads) > 1:
        half = loads[: len(loads) // 2]
        found.insert(0, Suggestion({"batch": len(half)}, needs(config, plan(model, config, half))))
    return [suggestion for suggestion in found if suggestion.fast_bytes < now]


def longest_context(model: ModelDimensions, config: SpeCacheConfig, batch: int, limit: int) -> int:
    """Most tokens that each of `batch` sequences can have within `limit` bytes; 0 where not even one fits."""
    return largest(lambda tokens: plan(model, config, even_loads(tokens, batch)).fast <= limit, 1, model.max_positions or LONGEST)


def largest_batch(model: ModelDimensions, config: SpeCacheConfig, context: int, limit: int) -> int:
    """Most sequences of `context` tokens within `limit` bytes; 0 where not even one fits."""
    return largest(lambda batch: plan(model, config, even_loads(context, batch)).fast <= limit, 1, LARGEST_BATCH)


def least_bytes(model: ModelDimensions, config: SpeCacheConfig, loads: Sequence[PlannedSequence]) -> int:
    """Fast memory with the fewest bits and pairs, no hot set and prompts read token by token, in the same code, groups and tier."""
    smallest = {**_smallest(config), "prefill_chunk": 1, "top_k": 1}
    return plan(model, replace(config, **smallest), loads).fast


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in `[low, high]` that fits, if all below it do; 0 where none fits."""
    if high < low or not fits(low):
        return 0
    step = 1
    while low + step <= high and fits(low + step):  # so that no number far beyond is tried
        low, step = low + step, 2 * step
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _single_changes(config: SpeCacheConfig) -> Iterator[dict[str, Any]]:
    if config.policy is Policy.FULL:
        yield {"policy": Policy.ON_DEMAND}
        return
    yield from ({"bits": bits} for bits in sorted(SUPPORTED_BITS, reverse=True) if bits < config.bits)
    if fetches(config) and config.top_k > _FEWEST_PAIRS:
        yield {"top_k": _FEWEST_PAIRS}


def _largest_hot_set(config: SpeCacheConfig, fits: Callable[[dict[str, Any]], bool]) -> float:
    """In hundredths of the 16-bit cache; 0.0 (the pairs of one step alone) where none fits, or where it was given in bytes."""
    if not isinstance(config.hot_set, float):
        return 0.0
    hundredths = round(config.hot_set * 100)
    return largest(lambda share: fits({"hot_set": share / 100}), 1, hundredths - 1) / 100


def _combined_changes(config: SpeCacheConfig) -> Iterator[dict[str, Any]]:
    """From what costs least to everything at once."""
    smallest = _smallest(config)
    at_these_bits = {name: value for name, value in smallest.items() if name != "bits"}
    chunks = [min(chunk, config.prefill_chunk) for chunk in (config.prefill_chunk, 128, SMALLEST_CHUNK)]
    for settings in (at_these_bits, smallest):
        yield from ({**settings, "prefill_chunk": chunk} if chunk < config.prefill_chunk else settings for chunk in chunks)


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _smallest(config: SpeCacheConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"bits": min(SUPPORTED_BITS)}
    if config.policy is Policy.FULL:
        settings["policy"] = Policy.ON_DEMAND
        config = replace(config, policy=Policy.ON_DEMAND)
    if fetches(config):
        settings |= {"hot_set": 0.0, "top_k": min(config.top_k, _FEWEST_PAIRS)}
    return settings
