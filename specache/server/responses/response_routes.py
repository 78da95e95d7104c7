"""`/v1/responses`: make a response, count its prompt, and show, list or delete what is stored."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from specache.server.app_state import state_of
from specache.server.error_responses import ApiError
from specache.server.json_body import read_body
from specache.server.request_context import RequestContext
from specache.server.responses.response_answer import ResponseAnswer
from specache.server.responses.response_fields import ResponsesBody
from specache.server.responses.response_preparation import count_prompt, prepare_response
from specache.server.responses.response_store import StoredTurn
from specache.server.responses.stored_items import items_up_to
from specache.server.running_jobs import RunningJobs, while_connected
from specache.server.sse import EventStream

router = APIRouter()
_COUNT = "input_tokens"
_PAGE, _LONGEST_PAGE = 20, 100


@router.post("/v1/responses")
async def create_response(http: Request) -> Response:
    """Answer, whole or as a stream, and store the answer unless told not to."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, ResponsesBody)
    state.ready()
    state.open_stream(context)
    prepared = await prepare_response(state, context, body)
    running = RunningJobs(state, context, prepared.jobs)
    await running.start()
    answer = ResponseAnswer(state, running, prepared, context.owner)
    if body.stream:
        return EventStream(answer.stream(), state.settings)
    return JSONResponse(await while_connected(http, answer.whole()))


@router.post(f"/v1/responses/{_COUNT}")
async def count_input_tokens(http: Request) -> dict[str, Any]:
    """Return the tokens of the prompt that a request for a response would have."""
    state, context = state_of(http), RequestContext.of(http.scope)
    body = await read_body(http, state, ResponsesBody)
    return {"object": "response.input_tokens", "input_tokens": await state.work(count_prompt, state, context, body)}


@router.api_route("/v1/responses/{response_id}", methods=["GET", "DELETE"])
async def stored_response(http: Request, response_id: str) -> Response:
    """Return or delete a stored response."""
    if response_id == _COUNT:  # no response has this name, but an address that takes POST alone
        raise HTTPException(405, headers={"Allow": "POST"})
    state, owner = state_of(http), RequestContext.of(http.scope).owner
    if http.method == "DELETE":
        state.responses.delete(owner, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})
    if http.query_params.get("stream", "false") != "false":
        raise ApiError(400, "stream: a stored response is not streamed again. Leave it out.", param="stream", code="invalid_value")
    return Response(state.responses.find(owner, response_id).response, media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(http: Request, response_id: str) -> dict[str, Any]:
    """Return the items that a response was made from, those of earlier turns among them."""
    state, owner = state_of(http), RequestContext.of(http.scope).owner
    query = dict(http.query_params)
    order, after, limit = query.get("order", "desc"), query.get("after"), _limit(query.get("limit"))
    if order not in ("asc", "desc"):
        raise ApiError(400, "order: it must be asc or desc.", param="order", code="invalid_value")
    return await state.work(_page, state.responses.find(owner, response_id), order, after, limit)


def _limit(text: str | None) -> int:
    if text is None:
        return _PAGE
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= _LONGEST_PAGE):
        raise ApiError(400, f"limit: it must be a number from 1 to {_LONGEST_PAGE}.", param="limit", code="invalid_value")
    return int(text)


def _page(turn: StoredTurn, order: str, after: str | None, limit: int) -> dict[str, Any]:
    """Return a part of the list of items, on a worker thread."""
    items = items_up_to(turn, with_output=False)
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise ApiError(400, "after: there is no such item in this list.", param="after", code="invalid_value")
        items = items[place + 1 :]
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": "", "last_id": ""}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > limit}
