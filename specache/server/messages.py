"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, as Anthropic's clients ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from specache.engine.events import Finished, NewToken, PromptProgress, Started
from specache.server.answer_pieces import AnswerPiece
from specache.server.anthropic_answer import ContentBlocks
from specache.server.anthropic_chat import chat_body, in_anthropic_words
from specache.server.anthropic_fields import CountBody, MessagesBody
from specache.server.app_state import state_of
from specache.server.choices import Choices
from specache.server.error_responses import ApiError, error_document
from specache.server.generation import JobMaker
from specache.server.json_body import read_body
from specache.server.request_context import RequestContext
from specache.server.running_jobs import RunningJobs, while_connected
from specache.server.sse import EventStream, StreamForm, comment, data_event

router = APIRouter()


@router.post("/v1/messages")
async def create_message(http: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, MessagesBody)
    served, _ = state.ready()
    state.open_stream(context)
    maker = JobMaker(served, state.settings, context.owner)
    try:
        jobs = await state.make_jobs(maker.chat, await state.work(chat_body, body))
    except ApiError as error:
        raise in_anthropic_words(error) from error
    running = RunningJobs(state, context, jobs)
    await running.start()
    answer = MessageAnswer(running, body)
    headers = {"request-id": context.request_id}
    if body.stream:
        return EventStream(answer.stream(), state.settings, stream_form(context), headers)
    return JSONResponse(await while_connected(http, answer.whole()), headers=headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(http: Request) -> Response:
    """Return the number of tokens that a conversation's prompt has."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, CountBody)
    served, _ = state.ready()
    maker = JobMaker(served, state.settings, context.owner)
    try:
        prompt = await state.work(maker.chat_prompt, await state.work(chat_body, body))
    except ApiError as error:
        raise in_anthropic_words(error) from error
    return JSONResponse({"input_tokens": len(prompt)}, headers={"request-id": context.request_id})


def stream_form(context: RequestContext) -> StreamForm:
    """Return what a stream has beside the events of its answer."""
    return StreamForm(lambda: _event({"type": "ping"}), lambda error: _event(error_document(error, context)))


class MessageAnswer:
    """Turns the events of a job into Anthropic's message."""

    def __init__(self, running: RunningJobs, body: MessagesBody) -> None:
        self._running = running
        self._body = body
        self._choices = Choices(list(running.jobs), 1)
        self._choice = self._choices.all[0]
        self._blocks = ContentBlocks(body.shows_thinking)
        self._id = f"msg_{uuid4().hex}"

    async def whole(self) -> dict[str, Any]:
        """Return the message after its last token."""
        async for _, event in self._running.events():
            if isinstance(event, NewToken):
                self._take(self._choice.push(event))
            elif isinstance(event, Finished):
                self._end(event)
        return {**self._message(), "content": self._blocks.content, **self._stop(), "usage": self._usage()}

    async def stream(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the message's beginning, its blocks as they grow, and its end."""
        begun = False
        async for _, event in self._running.events():
            if isinstance(event, Started):
                self._choices.cached_tokens = event.cached_tokens  # replaced by that of the end
            if not begun:
                begun = True
                yield _event({"type": "message_start", "message": self._message()})
            if isinstance(event, PromptProgress) and 0 < event.done < event.total:
                yield comment(f"reading the prompt: {event.done} of {event.total} tokens")
            elif isinstance(event, NewToken):
                for change in self._take(self._choice.push(event)):
                    yield _event(change)
            elif isinstance(event, Finished):
                for change in self._end(event):
                    yield _event(change)
        yield _event({"type": "message_delta", "delta": self._stop(), "usage": self._usage()})
        yield _event({"type": "message_stop"})

    def _take(self, pieces: list[AnswerPiece]) -> list[dict[str, Any]]:
        if self._body.max_tokens == 0:
            return []
        return [event for piece in pieces for event in self._blocks.push(piece)]

    def _end(self, event: Finished) -> list[dict[str, Any]]:
        self._choices.cached_tokens = 0
        ((_, pieces),) = self._choices.finish(0, event)
        return [*self._take(pieces), *self._blocks.finish()]

    def _message(self) -> dict[str, Any]:
        """Return the message before its first token."""
        names = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model or self._running.jobs[0].served.names[0],
        }
        return {**names, "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}

    def _stop(self) -> dict[str, Any]:
        """Return why the message ended."""
        choice = self._choice
        if self._body.max_tokens == 0:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if choice.reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if choice.reason == "length":
            is_full = len(choice.tokens) < self._body.max_tokens  # the model's positions are
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        return {"stop_reason": "end_turn" if choice.stop is None else "stop_sequence", "stop_sequence": choice.stop}

    def _usage(self) -> dict[str, Any]:
        """Return the tokens, as Anthropic counts them: those that were stored are no input."""
        cached = self._choices.cached_tokens
        return {
            "input_tokens": len(self._choice.prepared.prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if self._body.max_tokens == 0 else len(self._choice.tokens),
        }


def _event(value: dict[str, Any]) -> ServerSentEvent:
    return data_event(value, value["type"])
