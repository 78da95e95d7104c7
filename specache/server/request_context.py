"""What belongs to one HTTP request: its owner, what its log line says, and what ends with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from starlette.types import Scope

from specache.server.dialects import Dialect

log = logging.getLogger("specache.server")
_KEY = "specache.request"


class RequestContext:
    """One request, from its headers to its last byte.

    Attributes:
        dialect: the API that it speaks.
        owner: the name of the key that it carries; empty without keys.
        request_id: its identifier, which its answer carries as `x-request-id`.
        began: the `time.monotonic()` of its headers.
        facts: what the log line says, in order.
    """

    def __init__(self, dialect: Dialect = Dialect.OPENAI) -> None:
        self.dialect = dialect
        self.request_id = f"req_{uuid4().hex}"
        self.owner = ""
        self.began = time.monotonic()
        self.facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._endings: list[Callable[[], Any]] = []
        self._ended = False

    @classmethod
    def of(cls, scope: Scope) -> RequestContext:
        """Return the context that `RequestLog` put into a scope."""
        context: RequestContext = scope[_KEY]
        return context

    def put_into(self, scope: Scope) -> None:
        """Make `of` return this context."""
        scope[_KEY] = self

    def at_end(self, ending: Callable[[], Any]) -> None:
        """Call a function when the request ends, however it does. From any thread.

        If the request has ended, call it now.
        """
        with self._lock:
            if not self._ended:
                self._endings.append(ending)
                return
        ending()

    def end(self) -> None:
        """Call what `at_end` was given, the last first, each of them even if another fails."""
        with self._lock:
            self._ended = True
            endings, self._endings = self._endings, []
        for ending in reversed(endings):
            try:
                ending()
            except Exception:
                log.exception("the end of a request failed")
