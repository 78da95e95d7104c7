"""Plan the memory of a batch, in bytes per tier, before anything is allocated.

The same arithmetic decides whether a request is admitted (`engine.admission`), what would make it
fit (`advice`), and what `specache plan` prints. It follows the real allocations: whole pages,
residuals of `R + g` tokens, whole windows, and buffers as they grow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from specache.cache.sizes import FastBytes, ordinary_bytes, pairs_in_flight, window_bytes
from specache.config import SpeCacheConfig
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import CacheFootprint, PlannedSequence, last_chunk
from specache.planning.working_set import decode_bytes, prefill_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier of one batch.

    Attributes:
        prefill: fast memory at the peak of prefilling, with the working set of its largest pass.
        decode: the same of decoding.
        slow: 16-bit pairs in the slow tier.
        full_cache: the ordinary 16-bit cache of all layers, for comparison.
        weights: the model's parameters, which no budget of specache counts.
        checkpoints: window checkpoints, in main memory. They are optional, are freed where memory
            is short, and count in no other figure.
    """

    prefill: FastBytes
    decode: FastBytes
    slow: int
    full_cache: int
    weights: int
    checkpoints: int = 0

    @property
    def fast(self) -> int:
        """Return the fast memory that the batch needs. `fast_memory` must be at least this."""
        return max(self.prefill.total, self.decode.total)

    @property
    def widest(self) -> FastBytes:
        """Return the phase that needs the most fast memory."""
        return self.prefill if self.prefill.total >= self.decode.total else self.decode

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable; all values are bytes."""
        return {
            "fast_bytes": self.fast,
            "prefill": {**asdict(self.prefill), "total": self.prefill.total},
            "decode": {**asdict(self.decode), "total": self.decode.total},
            "slow_bytes": self.slow,
            "checkpoint_bytes": self.checkpoints,
            "full_cache_bytes": self.full_cache,
            "weight_bytes": self.weights,
        }


def plan(model: ModelDimensions, config: SpeCacheConfig, sequences: Sequence[PlannedSequence]) -> MemoryPlan:
    """Return the memory plan of a batch.

    Args:
        config: settings with every `auto` resolved (`SpeCacheConfig.resolved`).
        sequences: the batch, at least one sequence.
    """
    runs = [(sequence, len(list(group))) for sequence, group in groupby(sequences)]  # few, also of a large batch
    counts: Counter[PlannedSequence] = Counter()
    for sequence, count in runs:
        counts[sequence] += count
    longest = max(config.low_bit_length(sequence.total) for sequence in counts)
    footprint = CacheFootprint(model, config, len(sequences), min(pairs_in_flight(config, longest), longest))
    decode = max(_sum(footprint.first_step, counts), _sum(footprint.last_step, counts), key=lambda held: held.total)
    return MemoryPlan(
        prefill=max(_prefill_moments(footprint, runs, counts), key=lambda held: held.total),
        decode=replace(decode, working_set=_step_working_set(footprint, counts, longest)),
        slow=sum(footprint.slow(sequence) * count for sequence, count in counts.items()),
        full_cache=sum(ordinary_bytes(model, sequence.total) * count for sequence, count in counts.items()),
        weights=model.weight_bytes,
        checkpoints=sum(footprint.checkpoints(sequence) * count for sequence, count in counts.items()),
    )


def uniform_batch(context: int, batch: int) -> list[PlannedSequence]:
    """Return `batch` distinct prompts of `context` tokens each."""
    return [PlannedSequence(context)] * batch


def _prefill_moments(
    footprint: CacheFootprint, runs: Sequence[tuple[PlannedSequence, int]], counts: Counter[PlannedSequence]
) -> Iterator[FastBytes]:
    """Yield the candidates for the peak of prefilling the sequences one after the other.

    Of equal neighbours only the last can be the peak.

    Args:
        runs: the sequences in order: each with the number of equal neighbours that it stands for.
    """
    model, config = footprint.model, footprint.config
    continued = any(sequence.stored for sequence in counts)
    before = FastBytes()
    for sequence, count in runs:
        others = before + footprint.prefilled(sequence).times(count - 1)
        if continued:  # sequences that follow already hold stored tokens
            others = _sum(footprint.between_steps, counts - Counter([sequence]))
        before += footprint.prefilled(sequence).times(count)
        if sequence.twin:
            continue
        chunk, stored = last_chunk(model, config.prefill_chunk, sequence.prompt, sequence.stored)
        working_set = prefill_bytes(model, config, chunk, stored) + footprint.growing(sequence, sequence.prompt)
        # the old windows are kept until the prefill succeeds
        working_set += window_bytes(model) if sequence.stored else 0
        yield from (replace(others + moment, working_set=working_set) for moment in footprint.while_prefilled(sequence))


def _step_working_set(footprint: CacheFootprint, counts: Counter[PlannedSequence], longest: int) -> int:
    """Return the working set of a decode step and of what can happen inside one.

    A hot set that grows exists twice. A sequence that crosses a RoPE switch is prefilled again.
    """
    model, config = footprint.model, footprint.config
    step = decode_bytes(model, config, counts.total(), longest)
    step += max(footprint.growing(sequence, sequence.total) for sequence in counts)
    # the number of pairs grows with the first groups, and where a sequence becomes a long one
    if any(sequence.stored for sequence in counts) or pairs_in_flight(config, longest) > config.group_size:
        step += max(footprint.largest_hot_set(sequence) for sequence in counts)
    switch = model.rope_switch
    if switch is not None and any(sequence.prompt <= switch < sequence.total for sequence in counts):
        step = max(step, prefill_bytes(model, config, switch + 1, 0))
    return step


def _sum(held_by: Callable[[PlannedSequence], FastBytes], counts: Counter[PlannedSequence]) -> FastBytes:
    return sum((held_by(sequence).times(count) for sequence, count in counts.items()), FastBytes())
