"""One line per request, without a word of its text; and the last resort for errors."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specache.server.dialects import dialect_of
from specache.server.error_responses import api_error, error_response
from specache.server.request_context import RequestContext

if TYPE_CHECKING:
    from specache.server.app_state import AppState

log = logging.getLogger("specache.server")
_LONGEST_PATH = 120
_POLLED = frozenset({"/health", "/metrics", "/v1/status"})  # programs ask these every few seconds


class RequestLog:
    """The outermost layer: makes the request's context, ends it, and writes its line."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(dialect_of(scope, self._state.settings.root_path))
        context.put_into(scope)
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", context.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            log.exception("%s %s failed", scope["method"][:16], _path(scope))
            if not status:
                await error_response(api_error(error), context)(scope, receive, noting)
        finally:
            context.end()
            self._write(scope, context, status)

    def _write(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.began
        route = getattr(scope.get("route"), "path", None)
        self._state.metrics.count_request(route or "other", status, seconds)
        parts = [scope["method"][:16], _path(scope), str(status or "-"), context.owner or "-"]
        parts += [f"{name}={value}" for name, value in context.facts.items()]
        level = logging.DEBUG if route in _POLLED else logging.INFO
        log.log(level, "%s %.3fs", " ".join(parts), seconds)


def _path(scope: Scope) -> str:
    """Return the path as it was sent: ASCII without control characters, and not long."""
    raw = scope.get("raw_path") or scope["path"].encode()
    text = raw.decode("ascii", "backslashreplace")
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}..."
