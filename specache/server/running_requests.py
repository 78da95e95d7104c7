"""The requests that wait or run, by key: what `/v1/status` shows of them while they do."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from specache.server.request_numbers import request_numbers

if TYPE_CHECKING:
    from specache.engine.ticket import Ticket
    from specache.server.request_context import RequestContext


class RunningRequests:
    """Knows the tickets of each key. Every method may run in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: dict[Ticket, tuple[str, str]] = {}  # -> owner, id of the HTTP request

    def add(self, context: RequestContext, ticket: Ticket) -> None:
        """Show a ticket until its HTTP request ends. If that has ended, do not."""
        with self._lock:
            self._tickets[ticket] = context.owner, context.request_id
        context.at_end(lambda: self._remove(ticket))

    def of(self, owner: str) -> list[dict[str, Any]]:
        """Return what a key's requests need now, the newest first."""
        with self._lock:
            tickets = [(ticket, name) for ticket, (of, name) in self._tickets.items() if of == owner]
        return [_numbers(name, ticket) for ticket, name in reversed(tickets) if not ticket.done]

    def _remove(self, ticket: Ticket) -> None:
        with self._lock:
            del self._tickets[ticket]


def _numbers(request_id: str, ticket: Ticket) -> dict[str, Any]:
    first, started = ticket.first_token_s, ticket.started_s
    facts = ticket.facts_now()
    return {
        **request_numbers(request_id, ticket.prompt_tokens, ticket.new_tokens, facts),
        "state": "waiting" if started is None else "reading" if first is None else "answering",
        "read_tokens": ticket.read_tokens,
        "time_to_first_token_seconds": None if first is None else round(first - ticket.submitted_s, 4),
        "seconds": round(time.monotonic() - ticket.submitted_s, 4),
    }
