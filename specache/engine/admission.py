"""Before a batch is prefilled: does it fit into `fast_memory`, and if not, what would make it fit?"""

from __future__ import annotations

from dataclasses import replace

from specache.cache.cache import SpeCache
from specache.errors import FastMemoryError
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


def check_room(cache: SpeCache, token_ids: list[list[int]], new_tokens: int, chunk: int) -> None:
    """Refuse a batch that cannot be prefilled and decoded within the cache's budget.

    Args:
        token_ids: whole sequences; what `cache` holds of them is kept.
        new_tokens: tokens that decoding may store after each.
        chunk: prompt tokens per pass.

    Raises:
        FastMemoryError: with the bytes of every part, and what would make it fit.
    """
    limit = cache.resources.budget.limit
    if limit is None:
        return
    limit -= cache.resources.budget.used - cache.held_bytes()  # of other caches on the same budget (forks)
    loads = planned_sequences(cache, token_ids, new_tokens)
    config = replace(cache.config, prefill_chunk=chunk)
    planned = plan(cache.resources.dimensions, config, loads)
    if planned.fast <= limit:
        return
    found = suggestions(cache.resources.dimensions, config, loads, limit)
    raise FastMemoryError(_refusal(planned, limit, loads, least_bytes(cache.resources.dimensions, config, loads)) + advice(found))


def planned_sequences(cache: SpeCache, token_ids: list[list[int]], new_tokens: int) -> list[PlannedSequence]:
    """The batch as the plan sees it: equal prompts are prefilled once, and stored beginnings are not prefilled again."""
    seen: set[tuple[int, ...]] = set()
    loads = []
    for index, ids in enumerate(token_ids):
        stored = _common(cache.sequences[index].token_ids, ids) if cache.sequences else 0
        loads.append(PlannedSequence(len(ids), new_tokens, stored, twin=not stored and tuple(ids) in seen))
        seen.add(tuple(ids))
    return loads


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
