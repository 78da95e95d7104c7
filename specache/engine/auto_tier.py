"""The choice of `slow_tier="auto"`, made before a prefill from needed and free bytes.

Rows stay in main memory if everything fits beside the model, else they go to files on a disk. The
choice is made again before every later prefill while the rows are in memory: a conversation that
outgrows it moves to disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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

MARGIN_BYTES = 48 << 20  # kept free beside the plan, for what libraries allocate inside an operation
MARGIN_SHARE = 0.05  # kept free too, as a share of the planned bytes


def decide_tier(cache: SpeCache, planned: Sequence[PlannedSequence], chunk: int, memory_left: FreeMemory) -> None:
    """Choose the slow tier of a cache with `slow_tier="auto"`, unless the choice is final.

    Args:
        planned: all sequences that the cache holds or will hold.
        chunk: prompt tokens per forward pass.
        memory_left: the free memory beside the model.

    Raises:
        SlowTierError: main memory is too small, and no folder on a disk has room.
        OutOfMemoryError: main memory is too small even with the rows on disk.
    """
    if not cache.decides_tier:
        return
    in_memory = cache.config.slow_tier
    dimensions = cache.resources.dimensions
    memory = plan(dimensions, cache.config.with_changes(prefill_chunk=chunk), planned)
    held = cache.memory().slow + cache.held_bytes()
    needed = max(0, main_memory_bytes(dimensions, memory, planned) - held)
    free = memory_left.for_bytes(with_margin(needed))
    if free is None or (with_margin(needed) <= free and _may_be_pinned(cache.config, dimensions, memory)):
        cache.choose_tier(TierChoice(in_memory, None, needed, free))
        return
    on_disk = plan(dimensions, disk_config(cache.asked, dimensions.device, chunk), planned)
    needed_on_disk = 0 if dimensions.device == "cuda" else max(0, on_disk.fast - held)
    if needed_on_disk >= needed or not hasattr(os, "preadv") or (cache.sequences and dimensions.device == "cuda"):
        # Stay in memory: the disk's buffers are larger than a short prompt's rows, or this system
        # has no disk tier, or stored rows are page-locked.
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
    """Return the tier that `auto` would choose now for a batch of a model that is not loaded yet.

    Raises:
        SlowTierError: main memory is too small, and no folder on a disk has room.
        OutOfMemoryError: main memory is too small even with the rows on disk.
    """
    device = dimensions.device
    memory = plan(dimensions, config.resolved(device), planned)
    weights = 0 if device == "cuda" else dimensions.weight_bytes
    needed = main_memory_bytes(dimensions, memory, planned) + weights
    free = machine.available_memory()
    on_disk = plan(dimensions, disk_config(config, device, config.prefill_chunk), planned)
    if free is None or with_margin(needed) <= free or (device != "cuda" and on_disk.fast + weights >= needed):
        return TierChoice(config.resolved(device).slow_tier, None, needed, free)
    needed_on_disk = 0 if device == "cuda" else on_disk.fast + weights
    if needed_on_disk > free + machine.free_swap():
        raise OutOfMemoryError(
            f"Even with the 16-bit pairs on disk this needs {needed_on_disk:,} bytes of main memory with the weights, and {free:,} "
            "are free."
        )
    folder = choose_rows_folder(on_disk.slow, make=False)
    return TierChoice(SlowTierKind.DISK, str(folder.folder), needed, free, on_disk.slow, folder.free)


def disk_config(asked: SpeCacheConfig, device: str, chunk: int) -> SpeCacheConfig:
    """Return the settings of a cache with its rows on disk, in a placeholder folder, for a plan."""
    return asked.with_changes(slow_tier=SlowTierKind.DISK, slow_dir=os.curdir, prefill_chunk=chunk).resolved(device)


def main_memory_bytes(dimensions: ModelDimensions, memory: MemoryPlan, planned: Sequence[PlannedSequence]) -> int:
    """Return the main-memory bytes of a batch with its rows in main memory.

    On a CPU this includes fast memory. For a GPU, if decoding stores tokens, it includes one
    layer's rows twice, as a growing buffer is copied.
    """
    if dimensions.device != "cuda":
        return memory.slow + memory.fast
    return memory.slow + (memory.slow // max(1, len(dimensions.full_layers)) if any(sequence.new for sequence in planned) else 0)


def with_margin(needed: int) -> int:
    """Return `needed` bytes plus the margin that is kept free."""
    return needed + MARGIN_BYTES + int(MARGIN_SHARE * needed)


def most_that_fits(free: int) -> int:
    """Return the largest number of needed bytes that fits into `free` bytes with the margin."""
    return max(0, int((free - MARGIN_BYTES) / (1 + MARGIN_SHARE)))


class FreeMemory:
    """The bytes that can be allocated beside a model, measured when they are first asked for.

    Which of its weights are mapped files is looked up once, for its whole life.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._mapped: int | None = None
        self._measured = self._gave_back = False
        self._free: int | None = None

    def forget(self) -> None:
        """Measure again when it is asked next."""
        self._measured = self._gave_back = False

    def for_bytes(self, wanted: int) -> int | None:
        """Return the free bytes; `None` if the system does not say.

        If they are less than `wanted`, free heap memory is returned to the system first.
        """
        if not self._measured:
            self._measure()
        if self._free is not None and self._free < wanted and not self._gave_back:
            self._gave_back = True
            if heap.give_back():
                self._measure()
        return self._free

    def _measure(self) -> None:
        """Note the available memory less the weights of mapped files, which count as available."""
        free, self._measured = machine.available_memory(), True
        if self._mapped is None and free is not None:
            tensors = [*self._model.parameters(), *self._model.buffers()]
            blocks = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device.type == "cpu"}
            self._mapped = machine.mapped_bytes(blocks.items())
        self._free = None if free is None else max(0, free - (self._mapped or 0))


def _may_be_pinned(config: SpeCacheConfig, dimensions: ModelDimensions, memory: MemoryPlan) -> bool:
    """Return whether `pinned_memory` allows the rows."""
    return dimensions.device != "cuda" or config.pinned_memory is None or memory.slow <= config.pinned_memory
