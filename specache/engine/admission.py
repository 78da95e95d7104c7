"""Before a batch is prefilled: does it fit into `fast_memory`, and if not, what would make it fit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.engine.auto_tier import decide_tier
from specache.errors import FastMemoryError, OutOfMemoryError
from specache.planning.advice import Suggestion, least_bytes, suggestions
from specache.planning.footprint import FastBytes, PlannedSequence
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


def check_room(cache: SpeCache, planned: list[PlannedSequence], chunk: int) -> None:
    """Refuse a batch that cannot be prefilled and decoded within the cache's budget.

    Args:
        planned: everything that the cache holds or will hold.
        chunk: prompt tokens per pass.

    Raises:
        FastMemoryError: with the bytes of every part, and what would make it fit.
    """
    limit = cache.resources.budget.limit
    if limit is None:
        return
    limit -= cache.resources.budget.used - cache.held_bytes()  # of other caches on the same budget (forks)
    config = replace(cache.config, prefill_chunk=chunk)
    memory = plan(cache.resources.dimensions, config, planned)
    if memory.fast <= limit:
        return
    found = suggestions(cache.resources.dimensions, config, planned, limit)
    least = least_bytes(cache.resources.dimensions, config, planned)
    raise FastMemoryError(_refusal(memory, limit, planned, least) + advice(found))


def fits_beside(model: Any, cache: SpeCache, running: list[PlannedSequence], new: list[PlannedSequence], chunk: int) -> bool:
    """Return whether a request fits beside those that run now; the slow tier is decided on the way.

    Raises:
        FastMemoryError, OutOfMemoryError, SlowTierError: it does not even fit alone.
    """
    planned = [*running, *new]
    try:
        decide_tier(model, cache, planned, chunk)
        check_room(cache, planned, chunk)
    except (FastMemoryError, OutOfMemoryError):
        if not running:
            raise
        return False
    return True


def planned_sequences(stored: Sequence[CachedSequence], token_ids: list[list[int]], new_tokens: int) -> list[PlannedSequence]:
    """Return texts as a plan sees them: equal prompts are prefilled once, and stored beginnings are not prefilled again.

    Args:
        stored: the sequences that the texts continue; empty where they begin anew.
        new_tokens: tokens that decoding may store after each.
    """
    seen: set[tuple[int, ...]] = set()
    planned = []
    for index, ids in enumerate(token_ids):
        kept = _common(stored[index].token_ids, ids) if stored else 0
        planned.append(PlannedSequence(len(ids), new_tokens, kept, twin=not kept and tuple(ids) in seen))
        seen.add(tuple(ids))
    return planned


def breakdown(held: FastBytes) -> str:
    """The parts that are there, in words."""
    return ", ".join(f"{title} {getattr(held, name):,}" for name, title in PARTS.items() if getattr(held, name))


def advice(found: list[Suggestion]) -> str:
    """Suggestions as a sentence."""
    if not found:
        return " No setting makes it fit: raise fast_memory."
    return f" It would fit with {'; or with '.join(map(str, found))}; or with a larger fast_memory."


def _refusal(planned: MemoryPlan, limit: int, loads: list[PlannedSequence], least: int) -> str:
    phase = "prefilling" if planned.prefill.total >= planned.decode.total else "decoding"
    tokens = max(load.total for load in loads)
    what = f"{len(loads)} sequences of up to {tokens:,} tokens" if len(loads) > 1 else f"A sequence of {tokens:,} tokens"
    return (
        f"{what} (prompt and answer) would need {planned.fast:,} bytes of fast memory while {phase}, but fast_memory allows "
        f"{limit:,}: {breakdown(planned.widest)}. The smallest settings need {least:,} bytes."
    )


def _common(stored: list[int], wanted: list[int]) -> int:
    keep = next((i for i, (mine, theirs) in enumerate(zip(stored, wanted, strict=False)) if mine != theirs), len(stored))
    return min(keep, len(wanted) - 1)
