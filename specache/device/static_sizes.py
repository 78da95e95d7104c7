"""Device memory of a batch's static state in bytes, for `DeviceBatch` and for planning.

`device_hot_set.hot_set_bytes` counts hot sets. Residuals and sliding windows replace the sequences'
own buffers and are counted with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from specache.attention.decode import StepKind
from specache.config import PAGE_TOKENS, Policy, SlowTierKind, SpeCacheConfig
from specache.low_bit.key_scales import key_scale_bytes
from specache.model.dimensions import row_bytes

NUMBER = 8  # bytes of a position, an address, a token id or a counter
LENGTH = 4  # bytes of a sequence's number of low-bit tokens
POSITIONS_OF_LAYER = 4  # arrays [B, Hkv, k]: next and used positions, prefetched positions and their slots
COUNTERS = 5

HEADS_OF_BATCH = 65_535  # KV heads of all sequences together: a grid's second and third dimension end there
CAPACITY_STEP = 4096  # low-bit tokens: a batch has room for a multiple, so that it is seldom rebuilt
KINDS: dict[Policy, StepKind] = {  # what a step over static buffers decodes; other policies have none
    policy: StepKind.PAIR if policy.drafts else StepKind.SINGLE for policy in Policy if policy not in (Policy.AUTO, Policy.FULL)
}


def unsupported_reason(config: SpeCacheConfig, dynamic_rope: bool) -> str | None:
    """Return why no step over static buffers runs with these settings, or `None`."""
    if config.policy not in KINDS:
        return f"policy {config.policy.value!r} is not served"
    if config.slow_tier is not SlowTierKind.RAM:
        return f"the 16-bit pairs are in slow tier {config.slow_tier.value!r}, not in RAM"
    if dynamic_rope:
        return "with dynamic RoPE every position has frequencies of its own"
    if config.residual == 0:
        return "residual=0 leaves no token at 16 bits while its group becomes low bit"
    return None


def step_pairs(config: SpeCacheConfig, capacity: int) -> int:
    """Return the pairs per KV head that a step fetches, with room for `capacity` low-bit tokens."""
    return config.selection.of(capacity) if config.policy.fetches else 0


def low_bit_room(config: SpeCacheConfig, tokens: int, step: int = CAPACITY_STEP) -> int:
    """Return the low-bit tokens that a batch has room for, whose longest sequence has `tokens`.

    One group more than it needs, in whole steps of `step`.
    """
    return -(-(config.low_bit_length(tokens) + config.group_size) // step) * step


def row_room(config: SpeCacheConfig, tokens: int, step: int = CAPACITY_STEP) -> int:
    """Return the tokens for which the slow-tier buffers of such a batch have room.

    A buffer that is made for as many from the start need not be copied to a larger one when its
    sequence is attached.
    """
    return low_bit_room(config, tokens, step) + config.residual + config.group_size


def batch_bytes(
    layers: Sequence[tuple[int, int]], windows: int, batch: int, top_k: int, capacity: int, queries: int, itemsize: int
) -> int:
    """Return the bytes of a `batch.DeviceBatch` without hot sets, residuals and sliding windows.

    Args:
        layers: (KV heads, head dimension) of every full-attention layer; equal ones share buffers.
        windows: number of sliding layers.
        capacity: low-bit tokens per sequence.
        queries: tokens per sequence and step.
        itemsize: bytes per element of the model's dtype.
    """
    total = 0
    for heads, dim in set(layers):  # `device_rows.StepBuffers`
        total += batch * top_k * ((queries + 1) * row_bytes(heads, dim, itemsize) + heads * (queries + 4) * NUMBER)
    for heads, dim in layers:
        total += batch * (heads * POSITIONS_OF_LAYER * top_k * NUMBER + key_scale_bytes(heads, dim))
    pages = capacity // PAGE_TOKENS
    inputs = 2 * batch * queries + 2 * batch
    return total + NUMBER * (len(layers) * batch * pages + inputs + COUNTERS) + batch * LENGTH + len(layers) + windows
