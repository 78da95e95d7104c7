"""What `slow_tier="auto"` takes: decided when a prompt is about to be prefilled, from what it needs and the memory that is free.

Rows stay in main memory where everything fits beside the model; else they go to files on a disk. What fits is decided again before
every later prefill of a cache whose rows are in place: a conversation that outgrows the memory moves to disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specache.cache.cache import SpeCache
from specache.config import SlowTierKind, SpeCacheConfig
from specache.errors import OutOfMemoryError
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, plan
from specache.platform import heap, machine
from specache.tiers.disk.rows_folder import choose_rows_folder
from specache.tiers.tier_choice import TierChoice

MARGIN_BYTES = 48 << 20  # kept free beside what is planned: what libraries allocate inside an operation
MARGIN_SHARE = 0.05  # and this part of what is planned


def decide_tier(model: Any, cache: SpeCache, planned: Sequence[PlannedSequence], chunk: int) -> None:
    """Decide the slow tier of a cache that was made with `slow_tier="auto"`, unless that is decided for good.

    Args:
        planned: everything that the cache holds or will hold.
        chunk: prompt tokens per pass.

    Raises:
        SlowTierError: memory does not suffice, and no folder on a disk has room.
        OutOfMemoryError: memory does not suffice even with the rows on disk.
    """
    if not cache.decides_tier:
        return
    in_memory = cache.config.slow_tier
    dimensions = cache.resources.dimensions
    memory = plan(dimensions, replace(cache.config, prefill_chunk=chunk), planned)
    held = sum(sequence.tier.nbytes + sequence.held_bytes() for sequence in cache.sequences)
    needed = max(0, main_memory_bytes(dimensions, memory, planned) - held)
    free = free_memory(model, with_margin(needed))
    if free is None or (with_margin(needed) <= free and _may_be_pinned(cache.config, dimensions, memory)):
        cache.choose_tier(TierChoice(in_memory, None, needed, free))
        return
    on_disk = plan(dimensions, disk_config(cache.asked, dimensions.device, chunk), planned)
    needed_on_disk = 0 if dimensions.device == "cuda" else max(0, on_disk.fast - held)
    if needed_on_disk >= needed or not hasattr(os, "preadv") or (cache.sequences and dimensions.device == "cuda"):
        # A disk's buffers are larger than a short prompt's rows; this system has no disk tier; rows that are page-locked stay.
        return cache.choose_tier(TierChoice(in_memory, None, needed, free))
    if needed_on_disk > free + machine.free_swap():
        raise OutOfMemoryError(
            f"Even with the 16-bit pairs on disk this needs {needed_on_disk:,} bytes of main memory beside the model, and {free:,} "
            "are free. Use a shorter prompt, a smaller prefill_chunk or hot_set, fewer bits or a smaller model, or free some "
            "memory. To try all the same name the tier: slow_tier='disk:FOLDER'."
        )
    folder = choose_rows_folder(on_disk.slow)
    cache.choose_tier(TierChoice(SlowTierKind.DISK, str(folder.folder), needed, free, on_disk.slow, folder.free))


def expected_tier(dimensions: ModelDimensions, config: SpeCacheConfig, planned: Sequence[PlannedSequence]) -> TierChoice:
    """Return what `auto` would take for a batch on this machine now, for a model that is not loaded yet.

    Raises:
        SlowTierError: memory does not suffice, and no folder on a disk has room.
    """
    device = dimensions.device
    memory = plan(dimensions, config.resolved(device), planned)
    weights = 0 if device == "cuda" else dimensions.weight_bytes
    needed = main_memory_bytes(dimensions, memory, planned) + weights
    free = machine.available_memory()
    on_disk = plan(dimensions, disk_config(config, device, config.prefill_chunk), planned)
    if free is None or with_margin(needed) <= free or (device != "cuda" and on_disk.fast + weights >= needed):
        return TierChoice(config.resolved(device).slow_tier, None, needed, free)
    folder = choose_rows_folder(on_disk.slow, make=False)
    return TierChoice(SlowTierKind.DISK, str(folder.folder), needed, free, on_disk.slow, folder.free)


def disk_config(asked: SpeCacheConfig, device: str, chunk: int) -> SpeCacheConfig:
    """Return the settings that a cache would have with its rows on disk, for a plan: the folder is nobody's."""
    return replace(asked, slow_tier=SlowTierKind.DISK, slow_dir=os.curdir, prefill_chunk=chunk).resolved(device)


def main_memory_bytes(dimensions: ModelDimensions, memory: MemoryPlan, planned: Sequence[PlannedSequence]) -> int:
    """Return the main memory that a batch needs with its rows there: on a CPU fast memory too, and a layer's rows twice where a
    buffer grows while decoding.
    """
    growing = memory.slow // max(1, len(dimensions.full_layers)) if any(each.new for each in planned) else 0
    return memory.slow + growing + (0 if dimensions.device == "cuda" else memory.fast)


def with_margin(needed: int) -> int:
    """Return `needed` bytes and what is kept free beside them."""
    return needed + MARGIN_BYTES + int(MARGIN_SHARE * needed)


def most_that_fits(free: int) -> int:
    """Return the largest need that `free` bytes of memory suffice for."""
    return max(0, int((free - MARGIN_BYTES) / (1 + MARGIN_SHARE)))


def free_memory(model: Any, wanted: int) -> int | None:
    """Return the bytes that can be allocated beside the model, whose weights may be a mapped file; `None` if nobody knows.

    Where that is less than `wanted`, the heap gives back what is free in it, and it is measured again.
    """
    free = _beside(model)
    if free is not None and free < wanted and heap.give_back():
        free = _beside(model)
    return free


def _beside(model: Any) -> int | None:
    free = machine.available_memory()
    if free is None:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    blocks = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device.type == "cpu"}
    return max(0, free - machine.mapped_bytes(blocks.items()))


def _may_be_pinned(config: SpeCacheConfig, dimensions: ModelDimensions, memory: MemoryPlan) -> bool:
    """Whether `pinned_memory` allows the rows."""
    return dimensions.device != "cuda" or config.pinned_memory is None or memory.slow <= config.pinned_memory
