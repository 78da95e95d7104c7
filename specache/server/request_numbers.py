"""One request as numbers, for `/v1/status`. No text of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specache.engine.events import Facts


def request_numbers(request_id: str, prompt_tokens: int, new_tokens: int, facts: Facts) -> dict[str, Any]:
    """Return what running requests and those that ended have in common.

    Args:
        request_id: that of the HTTP request (`x-request-id`), which may have several jobs.
        prompt_tokens: tokens of the prompt.
        new_tokens: new tokens of all answers to it.
    """
    return {
        "id": request_id,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": facts.cached_tokens,
        "new_tokens": new_tokens,
        "fast_bytes": facts.fast_bytes,
        "slow_bytes": facts.slow_bytes,
        "ordinary_cache_bytes": facts.ordinary_bytes,
        "hit_rate": facts.hit_rate,
        "waited_seconds": round(facts.waited_s, 4),
    }
