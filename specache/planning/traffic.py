"""Bytes that one decode step is expected to move: what a roofline divides by bandwidths.

Weights are read once per step, whatever the batch; the low-bit copy, the residual and the windows once per sequence. Rows come from
the slow tier: all `k` pairs of every KV head, less those that the hot set still has, which is assumed and not computed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from specache.cache.sizes import fetches, hot_slots, page_layout
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.model.dimensions import ModelDimensions

# Of the pairs that a step wants, the share that a hot set of just one step's pairs lacks; it falls with the square root of the hot
# set's size. An assumption, from SmolLM2-135M on English text with k = 64, verified and on-demand: with 64 slots per head 0.47 were
# read, with 85: 0.40, 227: 0.22 and 0.26, 390: 0.18 (contexts of 2,000 to 6,000 tokens).
MISSES_OF_ONE_STEP = 0.47


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of one decode step of a whole batch.

    Attributes:
        weights: read from the model's parameters.
        scan: read from the low-bit copy (of the 16-bit cache under policy `full`).
        recent: read from residuals and sliding windows.
        rows: read from the slow tier.
        written: of the new tokens' rows, to the slow tier.
        assumed_misses: share of the wanted rows that must come from the slow tier; an assumption, not a computation.
        sequences: tokens that the step makes.
    """

    weights: int
    scan: int
    recent: int
    rows: int
    written: int
    assumed_misses: float
    sequences: int

    @property
    def total(self) -> int:
        return self.weights + self.scan + self.recent + self.rows + self.written

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable."""
        return {**asdict(self), "total": self.total, "per_token": self.total / self.sequences}


def step_traffic(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> StepTraffic:
    """Of `batch` sequences with `context` tokens each.

    Args:
        config: with every `auto` decided.
    """
    low_bit = config.low_bit_length(context)
    full, misses = config.policy is Policy.FULL, _misses(model, config, context, batch)
    scan = recent = rows = written = 0
    for layer in model.layers:
        row = layer.row_bytes(model.itemsize)
        if layer.window is not None:
            recent += min(context, layer.window) * row
        elif full:
            scan += context * row
        else:
            scan += low_bit * page_layout(config, layer).page_bytes // PAGE_TOKENS
            recent += (context - low_bit) * row
            rows += int(min(config.top_k, low_bit) * row * misses)
            written += row
    return StepTraffic(model.read_bytes, batch * scan, batch * recent, batch * rows, batch * written, misses, batch)


def _misses(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> float:
    """Share of the wanted pairs that come from the slow tier: all where it is read in place, none where none is wanted."""
    if config.policy in (Policy.FULL, Policy.NONE):
        return 0.0
    if not fetches(config):
        return 1.0
    layer = model.full_layers[0]
    slots = hot_slots(model, config, layer.kv_heads, layer.head_dim, context, batch)
    return MISSES_OF_ONE_STEP / math.sqrt(max(slots / config.top_k, 1.0))
