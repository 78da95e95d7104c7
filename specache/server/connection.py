"""Connections: uvicorn's protocol, with deadlines and limits that it lacks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from specache.server.dialects import Dialect, dialect_of
from specache.server.error_responses import ApiError, error_document, error_headers, headers_too_large, unavailable
from specache.server.request_context import RequestContext
from specache.server.settings import MOST_HEADER_BYTES, ServerSettings


class Connection(H11Protocol):
    """A connection whose headers must arrive in time, and whose errors have the API's shape.

    uvicorn waits for half a request forever, and reads the rest of a body that was refused.
    """

    settings: ServerSettings  # set by `connection_class`
    _timer: asyncio.TimerHandle | None = None
    _drain: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers, or refuse a connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.most_connections:
            self._end(unavailable(f"{self.settings.most_connections:,} connections are open. Try again later.", "busy"))
        else:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and wait for the rest of headers as long as is allowed."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._waits_for_headers():
            self._wait_for_headers()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Close a connection soon whose request still arrives: nobody reads it."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._drain = self.loop.call_later(self.settings.drain_seconds, self._end_drain, self.cycle)

    def shutdown(self) -> None:
        """Let the answer end, but wait for no request that still arrives: the server ends."""
        if self.cycle is not None and not self.cycle.response_started and self.conn.their_state is h11.SEND_BODY:
            self._end(unavailable("The server is shutting down.", "shutting_down"))
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has headers that are too long."""
        if len(self.conn.trailing_data[0]) > MOST_HEADER_BYTES:
            self._end(headers_too_large())
        else:
            self._end(ApiError(400, msg, code="bad_request"))

    def pause_writing(self) -> None:
        """Give a client that does not read what was sent some time, and then up."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.settings.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with a client that reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also one whose client never reads the last answer."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.settings.send_seconds, self.transport.abort)

    def _end_drain(self, cycle: Any) -> None:
        """Close, unless the body has arrived meanwhile and the connection has gone on."""
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _waits_for_headers(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _wait_for_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.header_seconds, self._headers_late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_late(self) -> None:
        self._timer = None
        message = f"The headers did not arrive within {self.settings.header_seconds:g} seconds."
        self._end(ApiError(408, message, code="header_timeout"))

    def _end(self, error: ApiError) -> None:
        """Write an answer, if the connection is still before one, and close."""
        self._cancel()
        scope = None
        if self.cycle is not None and not self.cycle.response_started:  # the request is given up
            scope = self.cycle.scope
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            context = RequestContext(Dialect.OPENAI if scope is None else dialect_of(scope, self.settings.root_path))
            body = json.dumps(error_document(error, context)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            headers += error_headers(error, context).items()
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _cancel(self) -> None:
        self._stop_waiting()
        for timer in (self._drain, self._unread):
            if timer is not None:
                timer.cancel()
        self._drain = self._unread = None


def connection_class(limits: ServerSettings) -> type[Connection]:
    """Return the protocol of a server with these settings, as uvicorn takes it: a class."""

    class Limited(Connection):
        settings = limits

    return Limited
