"""The memory that a batch will need, in bytes per tier, computed before anything of it runs.

The same arithmetic decides whether a request is let in (`admission`), what would make it fit (`advice`) and what `specache plan`
prints. It follows what is really allocated: whole pages, residuals of `R + g` rows, whole windows, buffers as they grow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from specache.cache.sizes import ordinary_bytes, window_bytes
from specache.config import SpeCacheConfig
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import CacheFootprint, FastBytes, PlannedSequence, last_chunk
from specache.planning.working_set import decode_bytes, prefill_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier of one batch.

    Attributes:
        prefill, decode: fast memory at the end of prefilling and of decoding, each with the working set of its widest pass.
        slow: 16-bit rows in the slow tier.
        checkpoints: copies of sliding windows at earlier lengths, in main memory. Nothing needs them: they are given up where it is
            short, and count in no other figure.
        full_cache: the ordinary 16-bit cache of all layers, for comparison.
        weights: the model's parameters, which no budget of specache counts.
    """

    prefill: FastBytes
    decode: FastBytes
    slow: int
    full_cache: int
    weights: int
    checkpoints: int = 0

    @property
    def fast(self) -> int:
        """Fast memory that the batch needs: `fast_memory` must be at least this."""
        return max(self.prefill.total, self.decode.total)

    @property
    def widest(self) -> FastBytes:
        """The phase that needs most."""
        return self.prefill if self.prefill.total >= self.decode.total else self.decode

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable; all are bytes."""
        return {
            "fast_bytes": self.fast,
            "prefill": {**asdict(self.prefill), "total": self.prefill.total},
            "decode": {**asdict(self.decode), "total": self.decode.total},
            "slow_bytes": self.slow,
            "checkpoint_bytes": self.checkpoints,
            "full_cache_bytes": self.full_cache,
            "weight_bytes": self.weights,
        }


def plan(model: ModelDimensions, config: SpeCacheConfig, loads: Sequence[PlannedSequence]) -> MemoryPlan:
    """Memory of a batch.

    Args:
        config: with every `auto` decided (`SpeCacheConfig.resolved`).
        loads: at least one sequence.
    """
    longest = max(config.low_bit_length(load.total) for load in loads)
    holdings = CacheFootprint(model, config, len(loads), min(config.top_k, longest))
    counts = Counter(loads)
    decode = max(_sum(holdings.first_step, counts), _sum(holdings.last_step, counts), key=lambda held: held.total)
    return MemoryPlan(
        prefill=max(_prefill_moments(holdings, loads, counts), key=lambda held: held.total),
        decode=replace(decode, working_set=_step_working_set(holdings, loads, longest)),
        slow=sum(holdings.slow(load) * count for load, count in counts.items()),
        full_cache=sum(ordinary_bytes(model, load.total) * count for load, count in counts.items()),
        weights=model.weight_bytes,
        checkpoints=sum(holdings.checkpoints(load) * count for load, count in counts.items()),
    )


def even_loads(context: int, batch: int) -> list[PlannedSequence]:
    """`batch` different prompts of `context` tokens."""
    return [PlannedSequence(context)] * batch


def prefill_working_set(model: ModelDimensions, config: SpeCacheConfig, load: PlannedSequence) -> int:
    """Of the passes that prefill one sequence."""
    return prefill_bytes(model, config, *last_chunk(model, config, load))


def _prefill_moments(
    holdings: CacheFootprint, loads: Sequence[PlannedSequence], counts: Counter[PlannedSequence]
) -> Iterator[FastBytes]:
    """The widest points of prefilling one sequence after the other; of equal neighbours only the last can be the widest."""
    continued = any(load.stored for load in loads)
    before = FastBytes()
    for load, group in groupby(loads):
        count = sum(1 for _ in group)
        others = before + holdings.prefilled(load).times(count - 1)
        if continued:  # those that come later hold something already
            others = _sum(holdings.prefilled, counts - Counter([load]))
        before += holdings.prefilled(load).times(count)
        if load.twin:
            continue
        working_set = prefill_working_set(holdings.model, holdings.config, load) + holdings.growing(load, load.prompt)
        working_set += window_bytes(holdings.model) if load.stored else 0  # they are kept until its prefill has succeeded
        yield from (replace(others + moment, working_set=working_set) for moment in holdings.while_prefilled(load))


def _step_working_set(holdings: CacheFootprint, loads: Sequence[PlannedSequence], longest: int) -> int:
    """Of a decode step and what happens in one: a hot set that grows is held twice; who crosses a RoPE switch is prefilled."""
    model, config = holdings.model, holdings.config
    step = decode_bytes(model, config, len(loads), longest)
    step += max(holdings.growing(load, load.total) for load in set(loads))
    if any(load.stored for load in loads) or config.top_k > config.group_size:  # pairs grow with the first groups
        step += max(holdings.largest_hot_set(load) for load in set(loads))
    switch = model.rope_switch
    if switch is not None and any(load.prompt <= switch < load.total for load in loads):
        step = max(step, prefill_bytes(model, config, switch + 1, 0))
    return step


def _sum(held_by: Callable[[PlannedSequence], FastBytes], counts: Counter[PlannedSequence]) -> FastBytes:
    return sum((held_by(load).times(count) for load, count in counts.items()), FastBytes())
