"""What happened: the one source of numbers for the command line, the benchmarks and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class MemoryUse:
    """Bytes of one cache, counted from the tensors that exist.

    `fast` is low-bit copy and residual (the whole 16-bit cache under policy `full`) of the full-attention layers;
    `full` is what the same layers' ordinary cache takes in a 16-bit dtype. `windows` are the sliding layers' ring
    buffers, `ordinary_windows` the same in an ordinary 16-bit hybrid cache. `checkpoints` are copies of the ring buffers at
    earlier lengths, in main memory or (of a session) in files; those that forks share count in each.
    """

    fast: int = 0
    slow: int = 0
    hot: int = 0
    windows: int = 0
    checkpoints: int = 0
    full: int = 0
    ordinary_windows: int = 0


@dataclass
class Counters:
    """Running totals of one cache.

    `rows_selected` and `rows_ready` count the real token's wanted (KV head, position) pairs; `bytes_fetched` counts
    both rows' reads from the slow tier. `read_s` is the time that reads took, in the background and at once; `wait_s` is how long
    steps waited for them, in `waits` waits. `drafts` counts speculative tokens whose real counterpart became known.
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
    prefetches: bool = False
    speculates: bool = False


def report(memory: MemoryUse, counters: Counters, fast_memory_peak: int) -> dict[str, Any]:
    """The statistics as JSON-ready values. Keys are stable; a rate that was not measured is `None`.

    `fast_memory_peak_bytes` is the most that the byte budget ever held, working sets of passes as planned; forks share it.
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
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
