"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from specache.engine.events import Event, Finished, NewToken, PromptLogprobs, PromptProgress, TokenLogprob
from specache.server.answer_pieces import AnswerPiece, TextPiece
from specache.server.app_state import state_of
from specache.server.choices import Choice, Choices
from specache.server.completion_fields import CompletionBody
from specache.server.generation import JobMaker, PreparedJob
from specache.server.json_body import read_body
from specache.server.logprobs import CompletionLogprobs
from specache.server.request_context import RequestContext
from specache.server.running_jobs import RunningJobs, while_connected
from specache.server.sse import DONE, EventStream, comment, data_event

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(http: Request) -> Response:
    """Continue texts, whole or as a stream."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, CompletionBody)
    served, _ = state.ready()
    state.open_stream(context)
    jobs = await state.make_jobs(JobMaker(served, state.settings, context.owner).completion, body)
    running = RunningJobs(state, context, jobs)
    await running.start()
    answer = CompletionAnswer(running, body)
    if body.stream:
        return EventStream(answer.stream(), state.settings)
    return JSONResponse(await while_connected(http, answer.whole()))


class CompletionAnswer:
    """Turns the events of the jobs into OpenAI's objects."""

    def __init__(self, running: RunningJobs, body: CompletionBody) -> None:
        self._running = running
        self._body = body
        self._drops_answer = body.max_tokens == 0
        self._choices = Choices(list(running.jobs), body.answers)
        self._served = running.jobs[0].served
        self._prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in running.jobs]
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or self._served.names[0],
            "system_fingerprint": self._served.fingerprint,
        }
        special = frozenset(self._served.special_tokens.values())
        wanted = body.logprobs or 0
        self._logprobs = [CompletionLogprobs(self._served.token_bytes, wanted, special) for _ in self._choices.all]
        self._shown = [0] * len(self._choices.all)  # tokens whose log-probabilities were sent

    async def whole(self) -> dict[str, Any]:
        """Return the answers after the last token."""
        async for job, event in self._running.events():
            self._take(job, event)
        choices = []
        for choice in self._choices.all:
            echoed = self._echo(choice)
            logprobs = _joined(echoed["logprobs"], self._new_logprobs(choice))
            text = echoed["text"] + ("" if self._drops_answer else choice.text)
            choices.append(self._choice(choice, text, logprobs, choice.reason))
        return {**self._head, "choices": choices, "usage": self._choices.usage(dropped=self._drops_answer)}

    async def stream(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the prompts if asked, chunks of text, reasons, usage, and `[DONE]`."""
        echoed = set()
        async for job, event in self._running.events():
            if isinstance(event, PromptProgress) and 0 < event.done < event.total:
                yield comment(f"reading the prompt: {event.done} of {event.total} tokens")
            for choice, text in self._take(job, event):
                if self._body.echo and choice.index not in echoed:
                    echoed.add(choice.index)
                    prompt = self._echo(choice)
                    yield self._chunk(choice, prompt["text"], prompt["logprobs"], None)
                if self._drops_answer and choice.reason is None:
                    continue
                if text or choice.reason is not None:
                    shown = "" if self._drops_answer else text
                    yield self._chunk(choice, shown, self._new_logprobs(choice), choice.reason)
        if self._body.includes_usage:
            yield data_event({**self._head, "choices": [], "usage": self._choices.usage(dropped=self._drops_answer)})
        yield DONE

    def _take(self, job: int, event: Event) -> list[tuple[Choice, str]]:
        """Take an event and return what it adds to the answers."""
        if isinstance(event, PromptLogprobs) and event.row == 0:
            self._prompt_logprobs[job].extend(event.tokens)
        if isinstance(event, NewToken):
            choice = self._choices.of(job, event.row)
            return [(choice, _text(choice.push(event)))]
        if isinstance(event, Finished):
            return [(choice, _text(pieces)) for choice, pieces in self._choices.finish(job, event)]
        return []

    def _echo(self, choice: Choice) -> dict[str, Any]:
        """Return the prompt's text and log-probabilities, if the request asks for them."""
        if not self._body.echo:
            return {"text": "", "logprobs": None}
        prepared = choice.prepared
        logprobs = None
        if self._body.logprobs is not None:
            scored = self._prompt_logprobs[choice.index // self._body.answers]
            text = prepared.prompt_text
            logprobs = self._logprobs[choice.index].take(scored, with_special=text is None, text=_prompt_text(prepared))
        return {"text": _prompt_text(prepared), "logprobs": logprobs}

    def _new_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return the log-probabilities of the answer's tokens since the last call."""
        if self._body.logprobs is None or self._drops_answer:
            return None
        start, self._shown[choice.index] = self._shown[choice.index], len(choice.tokens)
        return self._logprobs[choice.index].take(choice.tokens[start:])

    def _chunk(self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> ServerSentEvent:
        usage = {"usage": None} if self._body.includes_usage else {}
        return data_event({**self._head, "choices": [self._choice(choice, text, logprobs, reason)], **usage})

    def _choice(self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _text(pieces: list[AnswerPiece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def _prompt_text(prepared: PreparedJob) -> str:
    return prepared.served.decode(prepared.prompt_ids) if prepared.prompt_text is None else prepared.prompt_text


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return first or second
    return {name: [*first[name], *second[name]] for name in first}
