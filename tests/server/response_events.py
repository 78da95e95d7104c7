"""Checks of responses and of their events by the types of OpenAI's client."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from starlette.testclient import TestClient

from tests.server.tiny_server import post

PATH = "/v1/responses"
SETTINGS: dict[str, Any] = {"max_output_tokens": 8, "temperature": 0}
EVENTS = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])}
FURTHER = {"store", "name", "bytes"}  # fields of OpenAI's answers that its client has no names for
LAST = ("response.completed", "response.incomplete", "response.failed")
_ITEM = TypeAdapter(ResponseItem)


def respond(client: TestClient, given: Any = "Hello", code: int = 200, **fields: Any) -> Any:
    """Ask for a response of 8 tokens, the likeliest ones unless the fields say otherwise."""
    document = post(client, PATH, {"input": given, **SETTINGS, **fields}, code)
    return checked_response(document) if code == 200 else document


def text_of(document: dict[str, Any]) -> str:
    """Return the text of the messages of a response."""
    parts = [part for item in document["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts)


def checked_response(document: dict[str, Any]) -> dict[str, Any]:
    """Return a response that OpenAI's client reads without a field too many or of another type."""
    check_fields(Response.model_validate(document, strict=True))
    return document


def checked_item(document: dict[str, Any]) -> dict[str, Any]:
    """Return an item of a list that OpenAI's client reads."""
    check_fields(_ITEM.validate_python(document, strict=True))
    return document


def streamed(client: TestClient, given: Any = "Hello", **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each of which was checked, and their order too."""
    body = {"input": given, **SETTINGS, "stream": True, **fields}
    with client.stream("POST", PATH, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return checked_events(parsed(response.iter_lines()))


def parsed(lines: Any) -> list[dict[str, Any]]:
    """Return the events of a stream's lines. Each has its type in front too."""
    events, name = [], None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] == name
            events.append(event)
    return events


def checked_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of one whole response, if they are well formed and in order.

    What grows in deltas is what is done at the end, and what is done is in the last response.
    """
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        check_fields(EVENTS[event["type"]].model_validate(event, strict=True))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] in LAST
    assert not set(LAST) & set(kinds[:-1])
    assert {event["response"]["id"] for event in events if "response" in event} == {events[0]["response"]["id"]}
    if kinds[-1] != "response.failed":
        assert _grown(events) == events[-1]["response"]["output"]
    return events


def _grown(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a stream, from its events alone."""
    items: list[dict[str, Any]] = []
    texts: dict[int, str] = {}
    for event in events:
        kind, place = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert place == len(items) == len(texts), "an item begins before the one in front of it is done"
            texts[place] = ""
        elif kind.endswith(".delta"):
            assert place == len(items)
            texts[place] += event["delta"]
        elif kind.endswith((".done", ".added")) and kind != "response.output_item.done":
            part = event.get("part", {})
            assert event.get("text", event.get("arguments", part.get("text"))) == texts[place]
        elif kind == "response.output_item.done":
            items.append(event["item"])
            content = event["item"].get("content")
            assert texts[place] == (event["item"]["arguments"] if content is None else content[0]["text"])
    return items


def check_fields(model: BaseModel) -> None:
    """Fail if a document has a field that the client does not know."""
    assert set(model.model_extra or {}) <= FURTHER, f"{type(model).__name__} has {model.model_extra}"
    for name in type(model).model_fields:
        value = getattr(model, name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, BaseModel):
                check_fields(one)
