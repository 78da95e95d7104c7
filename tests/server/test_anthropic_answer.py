"""Blocks of an answer in Anthropic's form: the events build the same blocks in its own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolArguments, ToolCallBegin
from specache.server.anthropic_answer import ContentBlocks
from specache.server.anthropic_blocks import hidden_reasoning

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
START = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 0},
}


def grown(pieces: list[AnswerPiece], **settings: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the events of an answer and its blocks, which the client must have too."""
    blocks = ContentBlocks(**settings)
    events = [event for piece in pieces for event in blocks.push(piece)] + blocks.finish()
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in ({"type": "message_start", "message": START}, *events):
        parsed = EVENT.validate_python(event, strict=True)
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    Message.model_validate({**START, "content": blocks.content}, strict=True)
    built = [block.model_dump(exclude={"citations", "caller", "toolset_name", "parsed_output"}) for block in snapshot.content]
    assert built == blocks.content
    return events, blocks.content


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event.get("delta", event.get("content_block", event))["type"] for event in events]


def test_text_is_one_block_that_grows():
    events, content = grown([TextPiece("Hel"), TextPiece("lo"), TextPiece(" ")])
    assert content == [{"type": "text", "text": "Hello "}]
    assert kinds(events) == ["text", "text_delta", "text_delta", "text_delta", "content_block_stop"]
    assert events[0]["content_block"]["text"] == "" and {event["index"] for event in events} == {0}


def test_reasoning_text_and_calls_are_blocks_in_their_order():
    pieces = [
        ReasoningPiece("Hm"),
        ReasoningPiece("."),
        TextPiece("\n\n"),
        TextPiece("Look: "),
        ToolCallBegin(0, "call_1", "weather"),
        ToolArguments(0, '{"city": "Zü'),
        ToolArguments(0, 'rich"}'),
        ToolCallBegin(1, "call_2", "time"),
        TextPiece("Done."),
    ]
    events, content = grown(pieces)
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert content[0]["thinking"] == "Hm." and content[1]["text"] == "\n\nLook: "
    assert content[2] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich"}}
    assert content[3]["input"] == {} and content[4]["text"] == "Done."
    assert kinds(events)[:5] == ["thinking", "thinking_delta", "thinking_delta", "signature_delta", "content_block_stop"]


def test_spaces_between_reasoning_and_calls_are_no_block():
    call = [ToolCallBegin(0, "call_1", "weather"), ToolArguments(0, "{}")]
    _, content = grown([ReasoningPiece("Hm."), TextPiece("\n"), TextPiece("\n"), *call, TextPiece("\n")])
    assert [block["type"] for block in content] == ["thinking", "tool_use"]
    assert grown([TextPiece(" "), TextPiece("\n")])[1] == [{"type": "text", "text": " \n"}]
    assert grown([])[1] == []


def test_reasoning_that_is_not_shown_leaves_an_empty_block():
    events, content = grown([ReasoningPiece("Secret"), TextPiece("Hi")], shows_thinking=False)
    assert content[0]["thinking"] == "" and content[0]["signature"] and "Secret" not in str(events)
    assert kinds(events)[:3] == ["thinking", "signature_delta", "content_block_stop"]
    assert hidden_reasoning(content[0]["signature"]) == "Secret"


@pytest.mark.parametrize(
    "signature", ["", "abc", "specache-hidden:", "specache-hidden:????", "specache-hidden:/w==", "specache-hidden:ä"]
)
def test_a_signature_of_others_holds_nothing(signature):
    assert hidden_reasoning(signature) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": 1, "b": "un', {"a": 1}),
        ('{"a": 1, "b', {"a": 1}),
        ("", {}),
    ],
)
def test_a_call_that_was_cut_has_the_input_so_far(text, value):
    assert grown([ToolCallBegin(0, "call_1", "f"), ToolArguments(0, text)])[1][0]["input"] == value


@pytest.mark.parametrize("text", ["[1]", "none", '{"a": x}', "5"])
def test_what_is_no_object_is_an_empty_input(text):
    blocks = ContentBlocks()
    for piece in (ToolCallBegin(0, "call_1", "f"), ToolArguments(0, text)):
        blocks.push(piece)
    blocks.finish()
    assert blocks.content[0]["input"] == {}


def test_the_same_reasoning_has_the_same_signature():
    signatures = {grown([ReasoningPiece(text)])[1][0]["signature"] for text in ("a", "a", "b")}
    assert len(signatures) == 2


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", '[1, {"y": 1e999}]'])
def test_numbers_that_json_has_not_are_null(number):
    blocks = ContentBlocks()
    for piece in (ToolCallBegin(0, "call_1", "f"), ToolArguments(0, f'{{"x": {number}, "z": 2.5}}')):
        blocks.push(piece)
    blocks.finish()
    text = json.dumps(blocks.content[0]["input"], allow_nan=False)
    assert json.loads(text)["z"] == 2.5 and "null" in text
