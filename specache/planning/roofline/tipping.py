"""Find the context and batch from which one method's steps are faster than another's, if there are
any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from specache.config import PAGE_TOKENS
from specache.planning.advice import LARGEST_BATCH, LONGEST, largest
from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.step_time import StepModel

WORTH = 1.01  # speed-up that counts as winning


@dataclass(frozen=True)
class Tipping:
    """The points from which a method is faster than the 16-bit cache.

    None: nowhere up to the limits.

    Attributes:
        context: shortest context at which its step is faster, at the requested batch.
        batch: smallest batch at which its step is faster, at the requested context.
        throughput_context: shortest context at which it generates more tokens per second, each
            method at its largest batch.
    """

    context: int | None
    batch: int | None
    throughput_context: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable."""
        return asdict(self)


def tipping(model: StepModel, capacity: Capacity, full: Method, method: Method, context: int, batch: int) -> Tipping:
    """Return the points from which `method` is faster than `full`. Contexts are whole pages."""
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
    """Return the smallest number in `[1, limit]` that wins, given that all above it do.

    Return None if none does.
    """
    loses = largest(lambda number: not wins(number), 1, limit)
    return loses + 1 if loses < limit else None


def _first_context(wins: Callable[[int], bool], limit: int) -> int | None:
    pages = first(lambda count: wins(count * PAGE_TOKENS), limit // PAGE_TOKENS)
    return None if pages is None else pages * PAGE_TOKENS


def _best_rate(model: StepModel, capacity: Capacity, method: Method, context: int) -> float:
    """Return the tokens per second at the largest batch that fits; 0 if none does."""
    batch = capacity.largest_batch(method, context)
    return batch / model.step(method, context, batch).total if batch else 0.0
