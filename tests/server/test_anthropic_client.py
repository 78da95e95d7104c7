"""The official Anthropic client against a server behind real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from specache.engine.prefix_store import PrefixStore
from tests.server.live_server import Live, live, wait_until
from tests.server.scripted_model import scripted
from tests.server.tiny_server import SHORT, printable_model

NAMES = ("tiny", "claude-sonnet-5")
KEY = "k" * 24
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = ('\n{"name": "weather", "arguments": ', '{"city":"Zurich"}', "}\n")
SCRIPT = ("<think>", "\nHm.\n", "</think>", "\n\n", "Let me see.", "<tool_call>", *CALL, "</tool_call>")
GREEDY: Any = {"temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(model=printable_model(4096), names=NAMES, keys={"alice": KEY}) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[Anthropic]:
    with connected(server) as made:
        yield made


@pytest.fixture(scope="module")
def agent() -> Iterator[Anthropic]:
    """Return a client of a model that reasons, says something and calls a tool, always."""
    model, tokenizer = scripted(*SCRIPT)
    with live(model=model, tokenizer=tokenizer) as started, connected(started) as made:
        yield made


def connected(server: Live) -> Anthropic:
    return Anthropic(base_url=server.address, api_key=KEY, max_retries=0, timeout=120)


def ask(client: Anthropic, text: Any = "Why is the sky blue?", **fields: Any) -> Any:
    given = {"model": "tiny", "max_tokens": 24, "messages": [{"role": "user", "content": text}], "extra_body": GREEDY}
    return client.messages.create(**{**given, **fields})


def streamed(client: Anthropic, text: Any = "Why is the sky blue?", **fields: Any) -> Any:
    """Return the message that the client builds from a stream."""
    given: Any = {"model": "tiny", "max_tokens": 24, "messages": [{"role": "user", "content": text}], "extra_body": GREEDY}
    with client.messages.stream(**{**given, **fields}) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "".join(block.text for block in message.content if block.type == "text")
    return message


def same(one: Any, other: Any) -> bool:
    """Return whether two messages differ by identifiers alone."""

    def plain(message: Any) -> Any:
        blocks = [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]
        return blocks, message.stop_reason, message.stop_sequence, message.usage.output_tokens, message.model

    return bool(plain(one) == plain(other))


def test_a_stream_is_the_whole_answer(client):
    for text in ("Why is the sky blue?", "And green?", "x" * 700):
        whole = ask(client, text)
        assert whole.content[0].text and whole._request_id.startswith("req_") and same(streamed(client, text), whole)


def test_each_name_of_the_model_may_be_used(client):
    assert [model.id for model in client.models.list()] == [*NAMES]
    for name in NAMES:
        assert client.models.retrieve(name).max_input_tokens == 4096
        assert ask(client, model=name).model == streamed(client, model=name).model == name
    with pytest.raises(anthropic.NotFoundError, match="claude-opus-9"):
        ask(client, model="claude-opus-9")
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude-opus-9")


def test_tokens_are_counted_as_they_are_read(client):
    fields: Any = {"model": "tiny", "messages": [{"role": "user", "content": "How many?"}], "system": "Count."}
    counted = client.messages.count_tokens(**fields).input_tokens
    assert counted == client.messages.create(**fields, max_tokens=4).usage.input_tokens > 15


def test_a_stop_sequence_is_told(client):
    text = ask(client).content[0].text
    stop = next(text[place : place + 2] for place in range(3, 20) if text.index(text[place : place + 2]) == place)
    for get in (ask, streamed):
        message = get(client, stop_sequences=["never this", stop])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert message.content[0].text == text[: text.index(stop)]


def test_an_answer_of_a_schema_is_parsed(client):
    class Point(BaseModel):
        axis: Literal["x", "y"]
        positive: bool

    parsed = client.messages.parse(
        model="tiny", max_tokens=200, messages=[{"role": "user", "content": "A point"}], output_format=Point
    )
    assert isinstance(parsed.parsed_output, Point)
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format"):
        ask(client, output_config={"format": {"type": "json_schema", "schema": {"not": {"type": "string"}}}})


def test_reasoning_text_and_a_call_are_blocks(agent):
    message = ask(agent, tools=[WEATHER], max_tokens=100)
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Hm.") and text.text == "Let me see."
    assert (call.name, call.input, message.stop_reason) == ("weather", {"city": "Zurich"}, "tool_use")
    again = streamed(agent, tools=[WEATHER], max_tokens=100)
    assert again.stop_reason == "tool_use" and again.content[2].input == call.input and again.content[0] == thinking


def test_an_agent_goes_on_with_the_result_of_its_call(agent):
    first = streamed(agent, tools=[WEATHER], max_tokens=100, thinking={"type": "adaptive", "display": "omitted"})
    assert first.content[0].thinking == "" and first.content[0].signature
    messages: Any = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "sunny"}]},
    ]
    fields: Any = {"model": "tiny", "tools": [WEATHER], "messages": messages}
    counted = agent.messages.count_tokens(**fields).input_tokens
    second = agent.messages.create(**fields, max_tokens=100, extra_body=GREEDY)
    assert second.stop_reason == "tool_use" and second.usage.input_tokens == counted
    assert second.content[-1].id != first.content[-1].id
    shown = [{**messages[1], "content": first.content[1:]}]
    without = agent.messages.count_tokens(**{**fields, "messages": [messages[0], *shown, messages[2]]}).input_tokens
    assert without < counted  # the reasoning went back in its signature


def test_each_turn_of_an_agent_reads_only_what_is_new():
    """As Claude Code asks: another first line in each request, and reasoning in signatures."""
    model, tokenizer = scripted(*SCRIPT)
    messages: Any = [{"role": "user", "content": "Look around. " * 40}]
    before = 0
    prefixes = PrefixStore(model, SHORT)
    with (
        live(model=model, tokenizer=tokenizer, service={"prefixes": prefixes}) as server,
        connected(server) as client,
    ):
        for turn in range(4):
            system: Any = [
                {"type": "text", "text": f"x-anthropic-billing-header: cch={turn};"},
                {"type": "text", "text": "You help."},
            ]
            thinking: Any = {"type": "adaptive", "display": "omitted"}
            fields: Any = {"messages": messages, "system": system, "thinking": thinking, "tools": [WEATHER], "max_tokens": 100}
            with client.messages.stream(model="tiny", **fields, extra_body=GREEDY) as stream:
                message = stream.get_final_message()
            assert message.usage.cache_read_input_tokens >= before and message.usage.input_tokens < (150 if turn else 2000)
            before = message.usage.cache_read_input_tokens + message.usage.input_tokens
            result = {"type": "tool_result", "tool_use_id": message.content[-1].id, "content": "sunny"}
            messages = [*messages, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]


def test_a_tool_that_must_be_called_is_called(client, agent):
    fields: Any = {"tools": [WEATHER, {**WEATHER, "name": "time"}], "max_tokens": 200}
    for choice in ({"type": "any"}, {"type": "tool", "name": "time", "disable_parallel_tool_use": True}):
        for get in (ask, streamed):
            message = get(agent, **fields, tool_choice=choice)
            calls = [block for block in message.content if block.type == "tool_use"]
            assert message.stop_reason == "tool_use" and set(calls[0].input) == {"city"}
            assert all(call.name == choice.get("name", call.name) for call in calls)
    never = ask(agent, **fields, tool_choice={"type": "none"})
    assert never.stop_reason == "end_turn" and [block.type for block in never.content] == ["thinking", "text"]


def test_what_cannot_be_served_is_refused_in_the_clients_classes(server, client):
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\]"):
        ask(client, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: [0-9]+ tokens > 4096"):
        ask(client, "x" * 5000)
    with pytest.raises(anthropic.BadRequestError, match="Unknown field colour"):
        ask(client, extra_body={"colour": "blue"})
    with pytest.raises(anthropic.AuthenticationError) as refused, Anthropic(base_url=server.address, api_key="no") as other:
        ask(other.with_options(max_retries=0))
    assert refused.value.request_id.startswith("req_") and refused.value.body["error"]["type"] == "authentication_error"


def test_a_bearer_token_is_a_key_too(server):
    with Anthropic(base_url=server.address, auth_token=KEY, max_retries=0) as bearer:
        assert ask(bearer).content


def test_a_client_that_closes_its_stream_ends_the_request(server, client):
    with client.messages.stream(
        model="tiny", max_tokens=3000, messages=[{"role": "user", "content": "Count."}], extra_body=GREEDY
    ) as stream:
        for _, _ in zip(range(6), stream, strict=False):
            pass
        assert server.service.status().running == 1
    wait_until(lambda: not server.service.status().running)
    wait_until(lambda: not server.app.state.open_streams)


def test_the_end_of_the_server_is_an_error_of_the_stream():
    with live(model=printable_model(8000), grace_seconds=0.0) as server, connected(server) as client:
        with (
            pytest.raises(anthropic.APIStatusError) as ended,
            client.messages.stream(
                model="tiny", max_tokens=7000, messages=[{"role": "user", "content": "Count."}], extra_body=GREEDY
            ) as stream,
        ):
            for number, _ in enumerate(stream):
                if number == 4:
                    server.server.stop()
        assert ended.value.body["error"]["type"] == "overloaded_error" and "shutting down" in str(ended.value)


def test_clients_at_the_same_time_get_what_each_gets_alone(server, client):
    texts = [f"Question {index}: " + "so " * (5 * index) for index in range(6)]
    alone = [ask(client, text).content[0].text for text in texts]

    async def together() -> list[str]:
        async with AsyncAnthropic(base_url=server.address, api_key=KEY, max_retries=0, timeout=120) as asks:

            async def one(index: int, text: str) -> str:
                fields: Any = {"model": "tiny", "max_tokens": 24, "messages": [{"role": "user", "content": text}]}
                if index % 2:
                    return (await asks.messages.create(**fields, extra_body=GREEDY)).content[0].text
                async with asks.messages.stream(**fields, extra_body=GREEDY) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*(one(index, text) for index, text in enumerate(texts)))

    assert asyncio.run(together()) == alone


def test_the_beta_client_of_agents_is_served(client):
    edits: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    message = client.beta.messages.create(
        model="tiny",
        max_tokens=8,
        betas=["context-management-2025-06-27", "interleaved-thinking-2025-05-14"],
        context_management=edits,
        output_config={"effort": "high"},
        thinking={"type": "adaptive"},
        metadata={"user_id": json.dumps({"session_id": "1"})},
        messages=[{"role": "user", "content": "Hi"}, {"role": "system", "content": "It is late."}],
        extra_body=GREEDY,
    )
    assert message.content[0].text and message.stop_reason == "max_tokens"
