"""The official OpenAI client asks a real server process for responses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from tests.server.real_server import POSITIONS, SERVED_NAME, RealServer, idle
from tests.server.response_events import check_fields
from tests.server.tool_models import FAMILIES, seeded_model

QUESTION = "Why is the sky blue?"
DOCUMENT = "The old tree had forty rings, and the young one had three. " * 20
SETTINGS: dict[str, Any] = {"model": SERVED_NAME, "temperature": 0, "max_output_tokens": 24}


class Weather(pydantic.BaseModel):
    """Ask for the weather."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server of a tiny seeded model with tools. Its free answers are printable and never end."""
    tokenizer = FAMILIES["llama3"].tokenizer
    model, folder = seeded_model(tokenizer, POSITIONS), tmp_path_factory.mktemp("model")
    others = torch.ones(len(tokenizer), dtype=torch.bool)
    others[[tokenizer(chr(code))["input_ids"][0] for code in range(32, 127)]] = False
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with RealServer(folder, "--response-bytes", "100KB") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: OpenAI, given: Any = QUESTION, **changes: Any) -> Any:
    return client.responses.create(input=given, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def ending(client: OpenAI) -> dict[str, Any]:
    """Fields that make an answer end by itself after some tokens."""
    return {"extra_body": {"stop": ask(client).output_text[12:15]}}


def test_a_response_is_the_answer_of_a_chat(client):
    response = ask(client)
    check_fields(response)
    messages: Any = [{"role": "user", "content": QUESTION}]
    completion = client.chat.completions.create(model=SERVED_NAME, messages=messages, temperature=0, max_tokens=24)
    assert response.output_text == completion.choices[0].message.content
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == completion.usage.prompt_tokens and response.usage.output_tokens == 24


def test_an_answer_that_ends_is_complete(client, ending):
    response = ask(client, **ending)
    assert response.status == "completed" and response.output_text == ask(client).output_text[:12]


def test_raw_events_tell_the_whole_response(client):
    events = list(ask(client, stream=True))
    for event in events:
        check_fields(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == ask(client).output_text == events[-1].response.output_text


def test_the_stream_helper_assembles_the_response(client, ending):
    with client.responses.stream(input=QUESTION, **SETTINGS, **ending) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == ask(client, **ending).output_text and len(snapshots) > 3
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_a_conversation_goes_on_by_its_identifier_and_is_not_read_again(client):
    first = ask(client, DOCUMENT + "How old?", instructions="Be brief.")
    second = ask(client, "And the other?", previous_response_id=first.id, instructions="Be brief.")
    sent: Any = [{"role": "user", "content": DOCUMENT + "How old?"}, *first.output, {"role": "user", "content": "And the other?"}]
    stateless = ask(client, sent, instructions="Be brief.", store=False)
    assert second.output_text == stateless.output_text and second.previous_response_id == first.id
    assert second.usage.input_tokens == stateless.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 32
    counted = client.responses.input_tokens.count(input=sent, model=SERVED_NAME, instructions="Be brief.")
    assert counted.input_tokens == second.usage.input_tokens
    items = list(client.responses.input_items.list(second.id, limit=2))  # the client turns the pages
    assert [item.type for item in items] == ["message"] * 3 and items[1].content[0].text == first.output_text


def test_a_stored_response_may_be_retrieved_and_deleted(client):
    response = ask(client, metadata={"run": "7"})
    again = client.responses.retrieve(response.id)
    assert again == response and again.metadata == {"run": "7"}
    client.responses.delete(response.id)
    for lost in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match=response.id):
            lost(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id) as refused:
        ask(client, "More", previous_response_id=response.id)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ask(client, store=False).id)


def test_old_responses_go_when_there_are_too_many(server, client):
    first = ask(client, max_output_tokens=1)
    for _ in range(60):
        ask(client, max_output_tokens=1)
    status = server.status()["responses"]
    assert status["bytes"] <= 100_000 and 10 < status["stored"] < 60
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_client_that_closes_its_stream_ends_the_response(server, client):
    before = server.wait_until(idle, "idle")["responses"]
    stream = ask(client, "Count from one to a million. " * 60, stream=True, max_output_tokens=4000)
    for event, _ in zip(stream, range(8), strict=False):
        assert event.type not in ("response.completed", "response.incomplete")
    stream.close()
    assert server.wait_until(idle, "the end of an aborted request", 30)["responses"] == before


def test_clients_at_the_same_time_get_what_each_gets_alone(server, client):
    texts = [f"Question {index}: " + "so " * (5 * index) for index in range(6)]
    alone = [ask(client, text, store=False).output_text for text in texts]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as asks:

            async def one(index: int, text: str) -> str:
                if index % 2:
                    return (await asks.responses.create(input=text, **SETTINGS)).output_text
                stream = await asks.responses.create(input=text, stream=True, **SETTINGS)
                return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

            return await asyncio.gather(*(one(index, text) for index, text in enumerate(texts)))

    assert asyncio.run(together()) == alone


def test_a_forced_tool_is_called_and_its_result_answered(client):
    tool: Any = openai.pydantic_function_tool(Weather, name="weather")
    flat: Any = {"type": "function", **tool["function"]}
    forced: Any = {"tools": [flat], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 300}
    with client.responses.stream(**{**SETTINGS, **forced, "input": QUESTION}) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    call = first.output[-1]
    assert call.type == "function_call" and call.name == "weather" and deltas[-1].snapshot == call.arguments
    assert Weather.model_validate_json(call.arguments).city in ("Rome", "Oslo")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    free = ask(client, result, previous_response_id=first.id, tools=[flat])
    stateless: Any = [{"role": "user", "content": QUESTION}, *first.output, *result]
    assert free.output_text == ask(client, stateless, tools=[flat], store=False).output_text
    assert next(iter(client.responses.input_items.list(free.id))).type == "function_call_output"


def test_a_parsed_answer_is_of_its_class(client):
    parsed = client.responses.parse(input=QUESTION, text_format=Weather, **{**SETTINGS, "max_output_tokens": 300})
    assert isinstance(parsed.output_parsed, Weather) and parsed.status == "completed"
    with client.responses.stream(input=QUESTION, text_format=Weather, **{**SETTINGS, "max_output_tokens": 300}) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "gpt-9"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": "x" * 20_000}, openai.BadRequestError, "too long"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "web_search"),
        ({"background": True}, openai.BadRequestError, "background"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(client, changes, error, message):
    with pytest.raises(error) as refused:
        client.responses.create(**{"input": QUESTION, **SETTINGS, **changes})
    assert message in str(refused.value) and refused.value.body["type"] and refused.value.body["message"]
