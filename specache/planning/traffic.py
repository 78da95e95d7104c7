"""Compute the bytes that one decode step is expected to move, which a roofline divides by
bandwidths.

Weights are read once per step, whatever the batch; the low-bit copy, the residual and the windows
once per sequence. The slow tier delivers all `k` pairs of every KV head except those that the hot
set still holds. That share is an assumption.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from specache.cache.sizes import fetches, hot_slots, page_layout
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.model.dimensions import ModelDimensions

# Share of a step's pairs that are missing from a hot set as large as one step's pairs. It falls
# with the square root of the hot set's size. An assumption, from SmolLM2-135M on English text with
# k = 64, policies verified and on-demand: with 64 slots per head a share of 0.47 was read, with 85
# slots 0.40, with 227 slots 0.22 and 0.26, with 390 slots 0.18 (contexts of 2,000 to 6,000 tokens).
# For other k, the ratio of slots to k is assumed to decide.
MISSES_OF_ONE_STEP = 0.47


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one decode step of a whole batch moves.

    Attributes:
        weights: read from the model's parameters.
        scan: read from the low-bit copy (from the 16-bit cache under policy `full`).
        recent: read from residuals and sliding windows.
        rows: 16-bit pairs read from the slow tier.
        written: 16-bit pairs of the new tokens, written to the slow tier.
        assumed_misses: share of the selected pairs that must come from the slow tier; an
            assumption, not a computation.
        sequences: tokens that the step generates.
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
        """Return plain values for JSON. Keys are stable."""
        return {**asdict(self), "total": self.total, "per_token": self.total / self.sequences}


def step_traffic(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> StepTraffic:
    """Return the traffic of one step of `batch` sequences with `context` tokens each.

    Args:
        config: settings with every `auto` resolved.
    """
    low_bit = config.low_bit_length(context)
    full, misses = config.policy is Policy.FULL, _misses(model, config, context, batch)
    scan = recent = rows = written = 0
    for layer in model.layers:
        row = layer.row_bytes(model.itemsize)
        if layer.window is not None:
            recent += layer.kept(context) * row
        elif full:
            scan += context * row
        else:
            scan += low_bit * page_layout(config, layer.kv_heads, layer.head_dim).page_bytes // PAGE_TOKENS
            recent += (context - low_bit) * row
            rows += int(config.selection.of(low_bit) * row * misses)
            written += row
    return StepTraffic(model.read_bytes, batch * scan, batch * recent, batch * rows, batch * written, misses, batch)


def _misses(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> float:
    """Return the share of the selected pairs that come from the slow tier.

    It is 1 if the tier is read in place, and 0 if the policy selects none.
    """
    if not config.policy.fetches:
        return 0.0
    if not fetches(config):
        return 1.0
    layer = model.full_layers[0]
    slots = hot_slots(model, config, layer.kv_heads, layer.head_dim, context, batch)
    return MISSES_OF_ONE_STEP / math.sqrt(max(slots / config.selection.most(config.low_bit_length(context)), 1.0))
