"""Streams of events: JSON data, comments that keep a connection alive, and an error at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent

from specache.errors import SpeCacheError
from specache.server.error_responses import ApiError, api_error, error_document
from specache.server.request_context import RequestContext
from specache.server.settings import ServerSettings

log = logging.getLogger("specache.server")
_LINE = "\n"
DONE = ServerSentEvent("[DONE]", sep=_LINE)


def data_event(value: Any, name: str | None = None) -> ServerSentEvent:
    """Return an event with JSON in one line."""
    return ServerSentEvent(json.dumps(value, ensure_ascii=False, separators=(",", ":")), event=name, sep=_LINE)


def comment(text: str) -> ServerSentEvent:
    """Return a comment, which clients leave out."""
    return ServerSentEvent(comment=text, sep=_LINE)


@dataclass(frozen=True)
class StreamForm:
    """What streams of an API have beside their events.

    Attributes:
        ping: makes what is sent after a pause.
        error: makes the last event of a stream that failed.
    """

    ping: Callable[[], ServerSentEvent]
    error: Callable[[ApiError], ServerSentEvent]


OPENAI_FORM = StreamForm(lambda: comment("ping"), lambda error: data_event(error_document(error, RequestContext())))


async def ending_in_error(events: AsyncIterator[ServerSentEvent], form: StreamForm = OPENAI_FORM) -> AsyncIterator[ServerSentEvent]:
    """Yield events. If making one fails, the last is the error: the status was sent before."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        if not isinstance(error, ApiError | SpeCacheError):
            log.exception("a stream failed")
        yield form.error(api_error(error))


class EventStream(EventSourceResponse):
    """An answer that is a stream of events.

    The events end by themselves when the server shuts down, with a last one that says so.
    """

    def __init__(
        self,
        events: AsyncIterator[ServerSentEvent],
        settings: ServerSettings,
        form: StreamForm = OPENAI_FORM,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            ending_in_error(events, form),
            headers=headers,
            ping=settings.ping_seconds,
            ping_message_factory=form.ping,
            sep=_LINE,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=settings.grace_seconds + 30,
        )
