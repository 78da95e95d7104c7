"""Memory over time: one sample a second of what all requests hold, for `/v1/status?since=`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specache.engine.service_status import ServiceStatus
    from specache.server.app_state import AppState

EVERY_S = 1.0
MOST_SAMPLES = 900  # 15 minutes

Sample = tuple[float, int, int, int, int]


class MemoryHistory:
    """The latest samples of a server's memory, oldest first.

    A sample is (seconds since 1970, then bytes: the running requests' cache in fast memory, their
    16-bit rows, what is kept for later requests in both, and an ordinary cache of the running
    requests). What running and stored texts share counts as the running ones'. Taking a sample
    costs what `EngineService.status` does, and waits for no step.
    """

    def __init__(self, most: int = MOST_SAMPLES) -> None:
        self._samples: deque[Sample] = deque(maxlen=most)

    def add(self, status: ServiceStatus) -> None:
        """Take a sample."""
        stored = 0 if status.prefixes is None else status.prefixes.fast_bytes
        held = max(0, status.fast_bytes - status.fast_working_bytes)
        fast, slow = min(status.running_fast_bytes, held), status.running_slow_bytes
        kept = min(stored, held - fast) + max(0, status.slow_bytes - slow)
        self._samples.append((round(time.time(), 2), fast, slow, kept, status.ordinary_bytes))

    def since(self, seconds: float) -> dict[str, Any]:
        """Return the samples that are newer than `seconds` since 1970."""
        return {
            "names": ["time", "fast_bytes", "slow_bytes", "kept_bytes", "ordinary_cache_bytes"],
            "every_seconds": EVERY_S,
            "samples": [sample for sample in self._samples if sample[0] > seconds],
        }

    async def keep(self, state: AppState) -> None:
        """Take samples until this is cancelled. Before the model is loaded there are none."""
        while True:
            if state.service is not None:
                self.add(state.service.status())
            await asyncio.sleep(EVERY_S)
