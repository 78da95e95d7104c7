"""The events of a submitted job for an asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from specache.engine.events import Event, Failed, Finished
from specache.engine.ticket import OnEvent, Ticket


async def stream(submit: Callable[[OnEvent], Ticket]) -> AsyncIterator[Event]:
    """Submit a job and yield its events up to `Finished`. Leaving early aborts it.

    Args:
        submit: submits the job with a listener.

    Raises:
        Exception: the error that the request ended with, or what `submit` raises.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def listen(event: Event) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits for the event
            loop.call_soon_threadsafe(events.put_nowait, event)

    ticket = submit(listen)
    try:
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return
    finally:
        ticket.abort()
