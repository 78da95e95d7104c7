"""Statistics of a cache: the one source of numbers for commands, benchmarks and tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class MemoryUse:
    """Bytes of one cache, or of a part of it, by the sizes that its layers have now.

    Attributes:
        fast: low-bit copy and residual of the full-attention layers (their 16-bit cache under
            policy `full`).
        slow: 16-bit rows in the slow tier. Blocks shared by sequences of a cache count once, those
            shared with forks in each fork.
        hot: the hot set.
        windows: ring buffers of the sliding-window layers.
        checkpoints: copies of the ring buffers at earlier lengths, in main memory or (of a session)
            in files. Those shared by forks count in each fork.
        full: ordinary 16-bit cache of the full-attention layers.
        ordinary_windows: ring buffers of an ordinary 16-bit hybrid cache.
    """

    fast: int = 0
    slow: int = 0
    hot: int = 0
    windows: int = 0
    checkpoints: int = 0
    full: int = 0
    ordinary_windows: int = 0

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class Counters:
    """Running totals of one cache.

    Attributes:
        rows_selected: (KV head, position) pairs selected by the real token.
        rows_ready: those of them that were available when needed.
        bytes_fetched: bytes read from the slow tier, by real and draft rows.
        drafts: draft tokens whose real counterpart became known.
        drafts_right: drafts that were correct.
        read_s: seconds that reads took, in the background and at once.
        wait_s: seconds that steps waited for reads, in `waits` waits.
        decode_steps, compiled_steps, traced_steps: steps, those that ran compiled, and those whose
            layers ran as programs in C++.
        compile_error: why the model could not be compiled in the background.
    """

    rows_selected: int = 0
    rows_ready: int = 0
    bytes_fetched: int = 0
    drafts: int = 0
    drafts_right: int = 0
    read_s: float = 0.0
    wait_s: float = 0.0
    waits: int = 0
    prefill_s: float = 0.0
    first_token_s: float | None = None
    decode_s: float = 0.0
    decoded_tokens: int = 0
    decode_steps: int = 0
    compiled_steps: int = 0
    traced_steps: int = 0
    compile_error: str | None = None
    prefetches: bool = False
    speculates: bool = False


@contextmanager
def timed(counters: Counters, name: str | None) -> Iterator[None]:
    """Add the block's seconds to a counter. `None` counts nothing: the caller counts them."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if name is not None:
            setattr(counters, name, getattr(counters, name) + time.perf_counter() - started)


def report(memory: MemoryUse, counters: Counters, fast_memory_peak: int) -> dict[str, Any]:
    """Return the statistics as plain values for JSON. Keys are stable.

    A rate that was not measured is None. `fast_memory_peak_bytes` is the most that the byte budget
    ever held, with planned working sets; forks share it.
    """
    c, m = counters, memory
    return {
        "fast_bytes": m.fast,
        "slow_bytes": m.slow,
        "hot_bytes": m.hot,
        "window_bytes": m.windows,
        "checkpoint_bytes": m.checkpoints,
        "full_bytes": m.full,
        "fast_ratio": _ratio(m.fast, m.full),
        "hot_ratio": _ratio(m.hot, m.full),
        "model_ratio": _ratio(m.fast + m.windows, m.full + m.ordinary_windows),
        "fast_memory_peak_bytes": fast_memory_peak,
        "total_bytes": m.fast + m.slow + m.hot + m.windows + m.checkpoints,
        "rows_selected": c.rows_selected,
        "rows_ready": c.rows_ready if c.prefetches else None,
        "hit_rate": _ratio(c.rows_ready, c.rows_selected) if c.prefetches else None,
        "bytes_fetched": c.bytes_fetched,
        "guess_rate": _ratio(c.drafts_right, c.drafts) if c.speculates else None,
        "read_s": c.read_s,
        "wait_s": c.wait_s,
        "waits": c.waits,
        "read_hidden": max(0.0, 1 - c.wait_s / c.read_s) if c.prefetches and c.read_s else None,
        "prefill_s": c.prefill_s,
        "time_to_first_token_s": c.first_token_s,
        "decode_s": c.decode_s,
        "tokens_per_s": _ratio(c.decoded_tokens, c.decode_s),
        "decode_steps": c.decode_steps,
        "compiled_steps": c.compiled_steps,
        "traced_steps": c.traced_steps,
        "compile_error": c.compile_error,
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
