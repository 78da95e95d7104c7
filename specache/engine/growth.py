"""What sequences hold beyond their plan, and what their rows will take in main memory."""

from __future__ import annotations

from specache.cache.cache import SpeCache
from specache.cache.sizes import fetches
from specache.config import Policy
from specache.planning.footprint import CacheFootprint, PlannedSequence
from specache.planning.plan import plan
from specache.tiers.row_memory import BLOCK_TOKENS


def surplus(cache: SpeCache, sequences: int) -> int:
    """Return the bytes that sequences hold beyond what a plan of so many gives to each.

    A hot set keeps the size that it got when fewer sequences shared their bytes, and a cache of
    policy `full` has room to grow.
    """
    config, dimensions = cache.config, cache.resources.dimensions
    if config.policy is Policy.FULL:
        row = sum(layer.row_bytes(dimensions.itemsize) for layer in dimensions.full_layers)
        return sum(max(0, one.dense_bytes - one.length * row) for one in cache.sequences)
    if not fetches(config) or isinstance(config.hot_set, float):
        return 0
    footprint = CacheFootprint(dimensions, config, sequences, 0)
    surplus = 0
    for sequence in cache.sequences:
        held = sum(layer.hot_bytes for layer in sequence.compressed.values())
        surplus += max(0, held - footprint.first_step(PlannedSequence(sequence.length)).hot_set) if held else 0
    return surplus


def row_growth(cache: SpeCache, planned: list[PlannedSequence]) -> int:
    """Return the bytes of rows that planned sequences will store in memory beyond what they hold.

    Each may copy a block that it shares, before it writes to it.
    """
    if not planned or cache.config.policy is Policy.FULL:
        return 0
    held = sum(sequence.tier.nbytes for sequence in cache.sequences)
    needed = plan(cache.resources.dimensions, cache.config, planned).slow
    return max(0, needed + len(planned) * row_block(cache) - held)


def row_block(cache: SpeCache) -> int:
    """Return the bytes of a block of rows in every layer."""
    return BLOCK_TOKENS * cache.resources.dimensions.stored_row_bytes
