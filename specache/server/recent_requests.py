"""The newest requests of each key, as numbers: what `/v1/status` shows of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

_KEPT = 50  # of all keys together


class RecentRequests:
    """Keeps facts about the newest requests. No text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_KEPT)

    def add(self, owner: str, facts: dict[str, Any]) -> None:
        """Keep the facts of a request that ended."""
        with self._lock:
            self._kept.append((owner, {"ended": round(time.time(), 3), **facts}))

    def of(self, owner: str) -> list[dict[str, Any]]:
        """Return what is kept of a key's requests, the newest first."""
        with self._lock:
            return [facts for name, facts in reversed(self._kept) if name == owner]
