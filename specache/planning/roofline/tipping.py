"""From which context and batch on one method's steps are faster than another's, and where that never happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from specache.config import PAGE_TOKENS
from specache.planning.advice import LARGEST_BATCH, LONGEST, largest
from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.step_time import StepModel

WORTH = 1.01  # times faster that is called winning


@dataclass(frozen=True)
class Tipping:
    """Where a method begins to win against the 16-bit cache. `None`: nowhere up to the limits.

    Attributes:
        context: the shortest at which its step is faster, at the batch that was asked for.
        batch: the smallest at which its step is faster, at the context that was asked for.
        throughput_context: the shortest at which it makes more tokens per second, each at the largest batch that fits it.
    """

    context: int | None
    batch: int | None
    throughput_context: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable."""
        return asdict(self)


def tipping(model: StepModel, capacity: Capacity, full: Method, method: Method, context: int, batch: int) -> Tipping:
    """Where `method` begins to win against `full`. Contexts are whole pages."""
    longest = (capacity.model.max_positions or LONGEST) // PAGE_TOKENS * PAGE_TOKENS

    def faster(tokens: int, sequences: int) -> bool:
        return model.step(method, tokens, sequences).total * WORTH < model.step(full, tokens, sequences).total

    def makes_more(tokens: int) -> bool:
        own, other = (_best_rate(model, capacity, one, tokens) for one in (method, full))
        return own > other * WORTH

    fitting = largest(lambda pages: capacity.fits(method, pages * PAGE_TOKENS, 1), 1, longest // PAGE_TOKENS) * PAGE_TOKENS
    return Tipping(
        context=_first_context(lambda tokens: faster(tokens, batch), longest),
        batch=first(lambda sequences: faster(context, sequences), LARGEST_BATCH),
        throughput_context=_first_context(makes_more, fitting),
    )


def first(wins: Callable[[int], bool], limit: int) -> int | None:
    """The smallest number in `[1, limit]` that wins, if all above it do; `None` where none does."""
    loses = largest(lambda number: not wins(number), 1, limit)
    return loses + 1 if loses < limit else None


def _first_context(wins: Callable[[int], bool], limit: int) -> int | None:
    pages = first(lambda count: wins(count * PAGE_TOKENS), limit // PAGE_TOKENS)
    return None if pages is None else pages * PAGE_TOKENS


def _best_rate(model: StepModel, capacity: Capacity, method: Method, context: int) -> float:
    """Tokens per second at the largest batch that fits; 0 where none does."""
    batch = capacity.largest_batch(method, context)
    return batch / model.step(method, context, batch).total if batch else 0.0
