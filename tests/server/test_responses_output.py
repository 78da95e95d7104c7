"""Items and events of a response from the pieces of an answer: reasoning, text, calls of tools."""

from __future__ import annotations

from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from specache.engine.events import NewToken
from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolArguments, ToolCallBegin
from specache.server.responses.output_items import OutputItems
from specache.server.responses.response_fields import ResponsesBody
from specache.server.responses.response_object import ResponseObject
from tests.server.response_events import checked_events

_EVENT = TypeAdapter(ResponseStreamEvent)
USAGE = {
    **{"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
    **{"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
}
THINK = [ReasoningPiece("Let me "), ReasoningPiece("see.")]
SAY = [TextPiece("The "), TextPiece("sky.")]
CALL = [ToolCallBegin(0, "call_a", "weather"), ToolArguments(0, '{"city": '), ToolArguments(0, '"Rome"}')]
CALL_TOO = [ToolCallBegin(1, "call_b", "time"), ToolArguments(1, "{}")]


def events_of(
    pieces: list[AnswerPiece], held: list[AnswerPiece] | None = None, complete: bool = True
) -> tuple[list[Any], OutputItems]:
    """Return the checked events of a whole response, one token for each piece, and its output."""
    head = ResponseObject(ResponsesBody.model_validate({"input": "Hello"}), "tiny")
    output = OutputItems(lambda prefix, place: f"{prefix}_{place}", lambda tokens: [])
    begun = head.to_json("in_progress")
    events = [{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}]
    for piece in pieces:
        events += output.push(NewToken(0, 1), [piece])
    events += output.finish(held or [], complete=complete)
    status = "completed" if complete else "incomplete"
    events.append({"type": f"response.{status}", "response": head.to_json(status, output.items(), USAGE)})
    return checked_events([{**event, "sequence_number": number} for number, event in enumerate(events)]), output


@pytest.mark.parametrize(
    ("pieces", "types"),
    [
        ([], ["message"]),
        (SAY, ["message"]),
        (THINK, ["reasoning"]),
        ([*THINK, *SAY], ["reasoning", "message"]),
        (CALL, ["function_call"]),
        ([*THINK, *SAY, *CALL, *CALL_TOO], ["reasoning", "message", "function_call", "function_call"]),
        ([*CALL, *SAY], ["function_call", "message"]),
        ([*THINK, *SAY, *THINK, *SAY], ["reasoning", "message", "reasoning", "message"]),
    ],
)
def test_pieces_become_items_in_their_order(pieces, types):
    _, output = events_of(pieces)
    assert [item["type"] for item in output.items()] == types
    assert all(item["status"] == "completed" for item in output.items())
    assert len({item["id"] for item in output.items()}) == len(types)


def test_every_item_has_its_text():
    _, output = events_of([*THINK, *SAY, *CALL, *CALL_TOO])
    reasoning, message, call, other = output.items()
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}] and reasoning["summary"] == []
    assert message["content"] == [{"type": "output_text", "text": "The sky.", "annotations": [], "logprobs": []}]
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_a", "weather", '{"city": "Rome"}')
    assert (other["call_id"], other["name"], other["arguments"]) == ("call_b", "time", "{}")


def test_pieces_held_back_are_part_of_the_answer():
    _, output = events_of(SAY[:1], held=[*SAY[1:], *CALL])
    message, call = output.items()
    assert message["content"][0]["text"] == "The sky." and call["arguments"] == '{"city": "Rome"}'


@pytest.mark.parametrize("pieces", [SAY, THINK, CALL[:2], [*THINK, *SAY], [*CALL, *CALL_TOO]])
def test_of_an_answer_that_reached_its_limit_the_last_item_is_incomplete(pieces):
    events, output = events_of(pieces, complete=False)
    assert [item["status"] for item in output.items()] == ["completed"] * (len(output.items()) - 1) + ["incomplete"]
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_an_item_that_grows_is_shown_as_incomplete():
    output = OutputItems(lambda prefix, place: f"{prefix}_{place}", lambda tokens: [])
    output.push(NewToken(0, 1), CALL[:2])
    (call,) = output.items()
    assert call["status"] == "incomplete" and call["arguments"] == '{"city": '


def test_tokens_of_the_reasoning_are_counted():
    output = OutputItems(lambda prefix, place: f"{prefix}_{place}", lambda tokens: [])
    for pieces in ([], THINK[:1], [], THINK[1:], SAY[:1], [], SAY[1:]):
        output.push(NewToken(0, 1), pieces)
    output.finish([], complete=True)
    assert output.reasoning_tokens == 4


def test_the_official_client_assembles_the_same_response():
    events, output = events_of([*THINK, *SAY, *CALL, *CALL_TOO])
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    told = [one for event in events for one in state.handle_event(_EVENT.validate_python(event))]
    assert [event.snapshot for event in told if event.type == "response.output_text.delta"] == ["The ", "The sky."]
    assert [event.snapshot for event in told if event.type == "response.function_call_arguments.delta"][1] == '{"city": "Rome"}'
    final = state._completed_response
    assert final.output_text == "The sky." and [item.type for item in final.output] == [item["type"] for item in output.items()]
