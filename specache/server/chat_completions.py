"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from specache.engine.events import Finished, NewToken, PromptProgress
from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolCallBegin
from specache.server.app_state import AppState, state_of
from specache.server.chat_fields import ChatBody
from specache.server.choices import Choice, Choices
from specache.server.generation import JobMaker
from specache.server.json_body import read_body
from specache.server.logprobs import chat_logprobs
from specache.server.request_context import RequestContext
from specache.server.running_jobs import RunningJobs, while_connected
from specache.server.sse import DONE, EventStream, comment, data_event

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(http: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, ChatBody)
    served, _ = state.ready()
    state.open_stream(context)
    jobs = await state.make_jobs(JobMaker(served, state.settings, context.owner).chat, body)
    running = RunningJobs(state, context, jobs)
    await running.start()
    answer = ChatAnswer(state, running, body)
    if body.stream:
        return EventStream(answer.stream(), state.settings)
    return JSONResponse(await while_connected(http, answer.whole()))


class ChatAnswer:
    """Turns the events of a job into OpenAI's objects."""

    def __init__(self, state: AppState, running: RunningJobs, body: ChatBody) -> None:
        self._running = running
        self._body = body
        self._choices = Choices(list(running.jobs), body.answers)
        self._served = running.jobs[0].served
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())
        self._shown: dict[int, int] = {}  # choice -> tokens whose log-probabilities were sent

    async def whole(self) -> dict[str, Any]:
        """Return the answer after its last token."""
        async for job, event in self._running.events():
            if isinstance(event, NewToken):
                self._choices.of(job, event.row).push(event)
            elif isinstance(event, Finished):
                self._choices.finish(job, event)
        choices = [self._whole_choice(choice) for choice in self._choices.all]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._choices.usage()}

    async def stream(self) -> AsyncIterator[ServerSentEvent]:
        """Yield a first chunk per answer, chunks of text, reasons, usage, and `[DONE]`."""
        for choice in self._choices.all:
            yield self._chunk(choice, {"role": "assistant", "content": ""})
        async for job, event in self._running.events():
            if isinstance(event, PromptProgress) and 0 < event.done < event.total:
                yield comment(f"reading the prompt: {event.done} of {event.total} tokens")
            elif isinstance(event, NewToken):
                choice = self._choices.of(job, event.row)
                for piece in choice.push(event):
                    yield self._chunk(choice, _delta(piece))
            elif isinstance(event, Finished):
                for choice, pieces in self._choices.finish(job, event):
                    for piece in pieces:
                        yield self._chunk(choice, _delta(piece))
                    yield self._chunk(choice, {})
        if self._body.includes_usage:
            yield data_event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._choices.usage()})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        names = {"model": self._body.model or self._served.names[0], "system_fingerprint": self._served.fingerprint}
        return {"id": self._id, "object": kind, "created": self._created, **names}

    def _chunk(self, choice: Choice, delta: dict[str, Any]) -> ServerSentEvent:
        fields = {"index": choice.index, "delta": delta, "logprobs": self._new_logprobs(choice), "finish_reason": None}
        if not delta:
            fields["finish_reason"] = choice.reason
        usage = {"usage": None} if self._body.includes_usage else {}
        return data_event({**self._head("chat.completion.chunk"), "choices": [fields], **usage})

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning is not None:
            message["reasoning_content"] = choice.reasoning
        if choice.tool_calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.tool_calls
            ]
            message["content"] = choice.text or None
        logprobs = self._new_logprobs(choice)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _new_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return those of the tokens since the last call, but not of end tokens."""
        start = self._shown.get(choice.index, 0)
        tokens = [token for token in choice.tokens[start:] if token.token_id not in choice.prepared.end_ids]
        self._shown[choice.index] = len(choice.tokens)
        if not self._body.logprobs or not (tokens or not self._body.stream):
            return None
        return chat_logprobs(tokens, self._served.token_bytes)


def _delta(piece: AnswerPiece) -> dict[str, Any]:
    """Return what a piece adds to the message."""
    if isinstance(piece, TextPiece):
        return {"content": piece.text}
    if isinstance(piece, ReasoningPiece):
        return {"reasoning_content": piece.text}
    if isinstance(piece, ToolCallBegin):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": piece.call_id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
