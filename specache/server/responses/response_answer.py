"""A response while it is generated: events, the object, and its place in the store."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from specache.engine.events import Finished, NewToken, PromptProgress
from specache.errors import SpeCacheError
from specache.server.app_state import AppState
from specache.server.choices import Choices
from specache.server.error_responses import ApiError, api_error
from specache.server.logprobs import chat_logprobs
from specache.server.responses.output_items import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, Logprobs, OutputItems
from specache.server.responses.response_preparation import PreparedResponse
from specache.server.running_jobs import RunningJobs
from specache.server.sse import comment, data_event

log = logging.getLogger("specache.server")


class ResponseAnswer:
    """Turns the events of a job into those of a response.

    Args:
        owner: the name of the key that the response is stored for.
    """

    def __init__(self, state: AppState, running: RunningJobs, prepared: PreparedResponse, owner: str) -> None:
        self._state = state
        self._running = running
        self._prepared = prepared
        self._owner = owner
        self._head = prepared.head
        self._choices = Choices(list(running.jobs), 1)
        self._output = OutputItems(prepared.new_item_id, self._logprobs)

    async def whole(self) -> dict[str, Any]:
        """Return the response after its last token."""
        document: dict[str, Any] = {}
        async for event in self._events():
            if isinstance(event, dict):
                document = event.get("response", document)
        return document

    async def stream(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the events, numbered without a gap. If the response fails, the last two say so."""
        number = 0
        try:
            async for event in self._events():
                if isinstance(event, str):
                    yield comment(event)
                    continue
                yield _numbered(event, number)
                number += 1
        except Exception as error:
            if not isinstance(error, ApiError | SpeCacheError):
                log.exception("a stream failed")
            for place, event in enumerate(self._failure(api_error(error))):
                yield _numbered(event, number + place)

    async def _events(self) -> AsyncIterator[Event | str]:
        """Yield events, the last with the response, and as texts how far the prompt is read."""
        begun = self._head.to_json(IN_PROGRESS)
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        choice = self._choices.all[0]
        async for job, event in self._running.events():
            if isinstance(event, PromptProgress) and 0 < event.done < event.total:
                yield f"reading the prompt: {event.done} of {event.total} tokens"
            elif isinstance(event, NewToken):
                pieces = choice.push(event)
                if event.token_id not in choice.prepared.end_ids:
                    for one in self._output.push(event, pieces):
                        yield one
            elif isinstance(event, Finished):
                ((_, pieces),) = self._choices.finish(job, event)
                for one in self._output.finish(pieces, complete=choice.reason != "length"):
                    yield one
        status = INCOMPLETE if choice.reason == "length" else COMPLETED
        yield {"type": f"response.{status}", "response": await self._ended(status)}

    async def _ended(self, status: str) -> dict[str, Any]:
        """Return the response at its end, and store it if it is to be."""
        output, usage = self._output.items(), self._usage()
        if self._head.stored:
            document = self._head.to_json(status, output, usage)
            self._head.stored = await self._state.work(self._store, document)
        return self._head.to_json(status, output, usage)

    def _store(self, document: dict[str, Any]) -> bool:
        """Store the response, on a worker thread. Return False if there is no room for it."""
        prepared = self._prepared
        return self._state.responses.add(
            self._owner, self._head.response_id, _encoded(document), _encoded(prepared.input_items), prepared.parent
        )

    def _failure(self, error: ApiError) -> list[Event]:
        """Return the last events of a response that failed."""
        self._head.stored = False
        response = self._head.to_json("failed", self._output.items(), error=error)
        return [
            {"type": "error", "code": error.code or "server_error", "message": error.message, "param": error.param},
            {"type": "response.failed", "response": response},
        ]

    def _logprobs(self, tokens: Sequence[NewToken]) -> Logprobs:
        if not self._prepared.body.shows_logprobs:
            return []
        served = self._running.jobs[0].served
        special = set(served.special_tokens.values())
        shown = [token for token in tokens if token.token_id not in special]
        found: Logprobs = chat_logprobs(shown, served.token_bytes)["content"]
        return found

    def _usage(self) -> dict[str, Any]:
        """Return the tokens of the response. What was stored costs nothing, so none are counted."""
        prompt, new = len(self._running.jobs[0].prompt_ids), len(self._choices.all[0].tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._choices.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": self._output.reasoning_tokens},
            "total_tokens": prompt + new,
        }


def _numbered(event: Event, number: int) -> ServerSentEvent:
    return data_event({**event, "sequence_number": number}, event["type"])


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
