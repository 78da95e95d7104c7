"""Admission before prefill: whether a batch fits into `fast_memory`, and settings that fit."""

from __future__ import annotations

from collections.abc import Sequence

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.cache.sizes import FastBytes
from specache.config import SpeCacheConfig
from specache.errors import FastMemoryError
from specache.planning.advice import Suggestion, least_bytes, suggestions
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, plan

PARTS = {
    "low_bit": "low-bit copy",
    "residual": "residual",
    "key_weights": "key weights",
    "hot_set": "hot set",
    "read_buffers": "read buffers",
    "windows": "sliding windows",
    "full_cache": "16-bit cache",
    "working_set": "working set of a pass",
}


def check_room(cache: SpeCache, planned: list[PlannedSequence], chunk: int, more: int = 0) -> None:
    """Refuse a batch that cannot be prefilled and decoded within the cache's budget.

    Args:
        planned: all sequences that the cache holds or will hold.
        chunk: prompt tokens per forward pass.
        more: further bytes that are needed at the same time.

    Raises:
        FastMemoryError: names the bytes of every part, and settings that fit.
    """
    budget = cache.resources.budget
    if budget.limit is not None:
        of_others = budget.used - cache.held_bytes()  # bytes of other caches on the budget (forks)
        check_limit(cache, cache.config, planned, chunk, budget.limit - of_others - more)


def check_limit(cache: SpeCache, config: SpeCacheConfig, planned: list[PlannedSequence], chunk: int, limit: int) -> None:
    """Refuse a batch that would need more than `limit` bytes alone. Raises as `check_room`."""
    config = config.with_changes(prefill_chunk=chunk)
    memory = plan(cache.resources.dimensions, config, planned)
    if memory.fast <= limit:
        return
    found = suggestions(cache.resources.dimensions, config, planned, limit)
    least = least_bytes(cache.resources.dimensions, config, planned)
    raise FastMemoryError(_refusal(memory, limit, planned, least) + advice(found))


def planned_sequences(stored: Sequence[CachedSequence], token_ids: list[list[int]], new_tokens: int) -> list[PlannedSequence]:
    """Return prompts for a memory plan. Equal prompts, and stored prefixes, are prefilled once.

    Args:
        stored: the sequences that the prompts continue, one each; empty for new prompts.
        new_tokens: tokens that decoding may store per sequence.
    """
    seen: set[tuple[int, ...]] = set()
    planned = []
    for index, ids in enumerate(token_ids):
        kept = _common_prefix(stored[index].token_ids, ids) if stored else 0
        planned.append(PlannedSequence(len(ids), new_tokens, kept, twin=not kept and tuple(ids) in seen))
        seen.add(tuple(ids))
    return planned


def breakdown(held: FastBytes) -> str:
    """Return the parts that are not empty, with their bytes, as text."""
    return ", ".join(f"{title} {getattr(held, name):,}" for name, title in PARTS.items() if getattr(held, name))


def advice(settings: list[Suggestion]) -> str:
    """Return the suggested settings as a sentence."""
    if not settings:
        return " No setting makes it fit: raise fast_memory."
    return f" It would fit with {'; or with '.join(map(str, settings))}; or with a larger fast_memory."


def _refusal(memory: MemoryPlan, limit: int, planned: list[PlannedSequence], least: int) -> str:
    phase = "prefilling" if memory.prefill.total >= memory.decode.total else "decoding"
    tokens = max(sequence.total for sequence in planned)
    batch = f"{len(planned)} sequences of up to {tokens:,} tokens" if len(planned) > 1 else f"A sequence of {tokens:,} tokens"
    return (
        f"{batch} (prompt and answer) would need {memory.fast:,} bytes of fast memory while {phase}, but fast_memory allows "
        f"{limit:,}: {breakdown(memory.widest)}. The smallest settings need {least:,} bytes."
    )


def _common_prefix(stored: list[int], ids: list[int]) -> int:
    """Return how many leading tokens agree; at most `len(ids) - 1`, as one token must run."""
    length = next((i for i, (mine, theirs) in enumerate(zip(stored, ids, strict=False)) if mine != theirs), len(stored))
    return min(length, len(ids) - 1)
