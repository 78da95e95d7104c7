"""Device memory of a batch's static state, in bytes: what `DeviceBatch` allocates, and what a planner counts without one.

Hot sets are counted by `hot_set.hot_set_bytes`. Residuals and sliding windows take the place of
the sequences' own and are counted with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from specache.config import PAGE_TOKENS
from specache.low_bit.key_scales import KEY_WEIGHT_BYTES

NUMBER = 8  # bytes of a position, an address, a token id or a counter
LENGTH = 4  # of a sequence's number of low-bit tokens
POSITIONS_OF_LAYER = 4  # wanted next and in this step, and those on their way with their slots
COUNTERS = 5


def step_buffers_bytes(batch: int, heads: int, top_k: int, row_bytes: int, pass_rows: int) -> int:
    """Of `rows.StepBuffers`: rows, positions and slots of one layer's step, with rows of `row_bytes` in `pass_rows` passes."""
    places = batch * heads * top_k
    return places * ((pass_rows + 1) * row_bytes + (pass_rows + 4) * NUMBER)


def batch_bytes(
    layers: Sequence[tuple[int, int]], windows: int, batch: int, top_k: int, capacity: int, pass_rows: int, itemsize: int
) -> int:
    """Of a `batch.DeviceBatch` besides its hot sets, residuals and sliding windows.

    Args:
        layers: (KV heads, head dimension) of every full-attention layer; equal ones share buffers.
        windows: sliding layers.
        capacity: low-bit tokens that there is room for in each sequence.
        pass_rows: tokens per sequence and step.
        itemsize: of the model's dtype.
    """
    total = sum(step_buffers_bytes(batch, heads, top_k, 2 * dim * itemsize, pass_rows) for heads, dim in set(layers))
    for heads, dim in layers:
        total += batch * heads * (POSITIONS_OF_LAYER * top_k * NUMBER + dim * KEY_WEIGHT_BYTES)
    pages = capacity // PAGE_TOKENS
    inputs = 2 * batch * pass_rows + 2 * batch
    return total + NUMBER * (len(layers) * batch * pages + batch + inputs + COUNTERS) + batch * LENGTH + len(layers) + windows
