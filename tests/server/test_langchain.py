"""A chat model of LangChain over the server: its calls, streams, tools and structured answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from tests.server.live_server import Live, live
from tests.server.scripted_model import scripted
from tests.server.tiny_server import chat, printable_model, running

CALL = ('\n{"name": "weather", "arguments": ', '{"city":"Zurich"}', "}\n")
KEY = "k" * 24


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"{city}: sunny"


class Light(BaseModel):
    """A lamp."""

    model_config = ConfigDict(extra="forbid")  # any further property could be as long as the answer

    colour: Literal["red", "green"]
    on: bool = Field(description="Whether it shines.")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(model=printable_model(4096), keys={"alice": KEY}) as started:
        yield started


@pytest.fixture(scope="module")
def agent_server() -> Iterator[Live]:
    model, tokenizer = scripted("Let me see.", "<tool_call>", *CALL, "</tool_call>")
    with live(model=model, tokenizer=tokenizer) as started:
        yield started


def model_of(server: Live, **settings: Any) -> ChatOpenAI:
    given = {"temperature": 0, "max_completion_tokens": 24, "max_retries": 0, "timeout": 120, **settings}
    return ChatOpenAI(model="tiny", base_url=f"{server.address}/v1", api_key=SecretStr(KEY), **given)


def test_invoke_is_the_answer_of_a_chat(server):
    messages = [SystemMessage("Be brief."), HumanMessage("Why is the sky blue?")]
    answer = model_of(server).invoke(messages)
    with running(printable_model(4096)) as client:
        body = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
        expected = chat(client, messages=body, max_tokens=24)
    assert answer.content == expected["choices"][0]["message"]["content"]
    assert answer.usage_metadata["output_tokens"] == 24 and answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["input_tokens"] == expected["usage"]["prompt_tokens"]


def test_a_stream_is_the_answer_in_pieces_with_its_usage(server):
    whole = model_of(server).invoke("Hello")
    pieces = list(model_of(server, stream_usage=True).stream("Hello"))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert isinstance(total, AIMessageChunk) and total.content == whole.content and len(pieces) > 4
    assert total.usage_metadata["output_tokens"] == 24

    async def later() -> str:
        return "".join([str(piece.content) async for piece in model_of(server).astream("Hello")])

    assert asyncio.run(later()) == whole.content


def test_a_batch_is_each_answer_alone(server):
    texts = ["One", "Two", "Three"]
    together = model_of(server).batch(texts)
    assert [answer.content for answer in together] == [model_of(server).invoke(text).content for text in texts]


def test_stop_texts_and_our_own_fields_are_passed_on(server):
    text = str(model_of(server).invoke("Hello").content)
    assert model_of(server, stop=[text[3:5]]).invoke("Hello").content == text[:3]
    ours = {"policy": "none", "session": "a", "chat_template_kwargs": {"enable_thinking": False}}
    assert model_of(server, extra_body=ours).invoke("Hello").content
    with pytest.raises(openai.BadRequestError, match="policy"):
        model_of(server, extra_body={"policy": "best"}).invoke("Hello")


def test_an_agent_calls_a_tool_and_takes_its_result(agent_server):
    agent = model_of(agent_server, max_completion_tokens=200).bind_tools([weather])
    question = HumanMessage("How is the weather?")
    answer = agent.invoke([question])
    assert isinstance(answer, AIMessage) and answer.content == "Let me see."
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Zurich"}) and not answer.invalid_tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == "Zurich: sunny"
    again = agent.invoke([question, answer, result])
    assert again.tool_calls[0]["id"] != call["id"] and again.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]

    total = None
    for piece in agent.stream([question]):
        total = piece if total is None else total + piece
    assert [(one["name"], one["args"]) for one in total.tool_calls] == [("weather", {"city": "Zurich"})]


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_a_tool_that_must_be_called_is_called(agent_server, choice):
    answer = model_of(agent_server, max_completion_tokens=200).bind_tools([weather], tool_choice=choice).invoke("Hi")
    assert answer.tool_calls[0]["name"] == "weather" and set(answer.tool_calls[0]["args"]) == {"city"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [True, None])
def test_a_structured_answer_is_an_object_of_its_class(server, agent_server, method, strict):
    place = server if method == "json_schema" else agent_server
    model = model_of(place, max_completion_tokens=300)
    answer = model.with_structured_output(Light, method=method, strict=strict).invoke("Describe the lamp.")
    assert isinstance(answer, Light)


def test_a_structured_answer_may_come_with_what_it_was_made_from(server):
    model = model_of(server, max_completion_tokens=300)
    answer = model.with_structured_output(Light, include_raw=True).invoke("Describe the lamp.")
    assert isinstance(answer["parsed"], Light) and answer["parsing_error"] is None and answer["raw"].content.startswith("{")
