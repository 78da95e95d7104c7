"""The official OpenAI client against a real server process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.server import references
from tests.server.real_server import SERVED_NAME, RealServer, idle

QUESTION = "Why is the sky blue?"
SETTINGS: dict[str, Any] = {"model": SERVED_NAME, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server(long_folder: Path) -> Iterator[RealServer]:
    with RealServer(long_folder) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(client: OpenAI, text: str = QUESTION, **changes: Any) -> Any:
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **{**SETTINGS, **changes})


def streamed(client: OpenAI, text: str = QUESTION, **changes: Any) -> tuple[str, list[Any]]:
    """Return text and chunks of a stream."""
    chunks = list(ask(client, text, stream=True, **changes))
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


def test_an_answer_is_that_of_generate(client, long_folder):
    for text in (QUESTION, "And green?", "x" * 700):
        completion = ask(client, text)
        (choice,) = completion.choices
        assert choice.message.role == "assistant" and choice.message.content == references.answer(long_folder, text, 24)
        prompt = len(references.chat_ids(str(long_folder), text))
        assert completion.usage.prompt_tokens == prompt and completion.usage.completion_tokens <= 24
        assert completion.usage.total_tokens == prompt + completion.usage.completion_tokens
        assert choice.finish_reason == ("length" if completion.usage.completion_tokens == 24 else "stop")
        assert completion.object == "chat.completion" and completion.model == SERVED_NAME


class Town(BaseModel):
    """A town."""

    name: str = Field(max_length=12)
    kind: Literal["harbour", "mine"]
    people: int = Field(ge=0, le=99_999)
    near: list[Town] = Field(max_length=1)


def test_an_answer_is_parsed_into_a_class_whole_and_streamed(client):
    messages: Any = [{"role": "user", "content": "Name a town."}]
    settings = {**SETTINGS, "max_tokens": 4000, "messages": messages, "response_format": Town, "seed": 4, "temperature": 1.0}
    town = client.chat.completions.parse(**settings).choices[0].message.parsed
    assert isinstance(town, Town) and town.kind in ("harbour", "mine")
    with client.chat.completions.stream(**settings) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == town


def test_a_stream_is_the_answer_in_pieces_and_usage_comes_last(client):
    whole = ask(client)
    text, chunks = streamed(client, stream_options={"include_usage": True})
    assert text == whole.choices[0].message.content
    *pieces, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(piece.usage is None and piece.id == last.id for piece in pieces)
    assert pieces[0].choices[0].delta.role == "assistant" and len(pieces) > 3
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in streamed(client)[1])


def test_clients_at_the_same_time_get_what_each_gets_alone(server, client):
    texts = [f"Question {index}: " + "so " * (5 * index) for index in range(8)]
    alone = [ask(client, text).choices[0].message.content for text in texts]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as asks:

            async def one(index: int, text: str) -> str:
                messages: Any = [{"role": "user", "content": text}]
                if index % 2:
                    done = await asks.chat.completions.create(messages=messages, **SETTINGS)
                    return done.choices[0].message.content or ""
                stream = await asks.chat.completions.create(messages=messages, stream=True, **SETTINGS)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

            return await asyncio.gather(*(one(index, text) for index, text in enumerate(texts)))

    assert asyncio.run(together()) == alone


def test_several_answers_have_indices_and_a_seed_repeats_them(client):
    changes: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 11}
    first, second = ask(client, **changes), ask(client, **changes)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert texts != [choice.message.content for choice in ask(client, **{**changes, "seed": 12}).choices]
    _, chunks = streamed(client, **changes)
    pieces = ["".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index) for index in range(3)]
    assert pieces == texts


def test_log_probabilities_are_those_of_the_model(client, long_folder):
    choice = ask(client, logprobs=True, top_logprobs=4, max_tokens=12).choices[0]
    entries = choice.logprobs.content
    answer = references.answer_ids(str(long_folder), references.chat_ids(str(long_folder), QUESTION), 12, do_sample=False)
    expected = references.log_probabilities(long_folder, references.chat_ids(str(long_folder), QUESTION) + answer)[
        -len(answer) - 1 : -1
    ]
    assert len(entries) == len(answer)
    for entry, token, row in zip(entries, answer, expected, strict=True):
        top = row.topk(4)
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert entry.top_logprobs[0].token == entry.token and entry.bytes is not None
    text = b"".join(bytes(entry.bytes) for entry in entries)
    assert text.decode(errors="replace").startswith(choice.message.content.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_completion_echoes_its_prompt_with_its_log_probabilities(client, long_folder):
    prompt = "The tree has forty rings."
    done = client.completions.create(model=SERVED_NAME, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0)
    tokenizer = references.loaded(str(long_folder)).tokenizer
    ids = tokenizer(prompt)["input_ids"]
    expected = references.log_probabilities(long_folder, ids)
    scores = done.choices[0].logprobs
    assert done.choices[0].text.startswith(prompt) and scores.token_logprobs[0] is None
    assert scores.token_logprobs[1 : len(ids)] == pytest.approx(
        [expected[i, ids[i + 1]].item() for i in range(len(ids) - 1)], abs=1e-3
    )
    assert scores.text_offset[: len(ids)] == list(range(len(prompt)))
    assert all(len(top) >= 2 for top in scores.top_logprobs[1:])


def test_token_ids_are_a_prompt(client, long_folder):
    ids = references.loaded(str(long_folder)).tokenizer("Once upon a time")["input_ids"]
    by_ids = client.completions.create(model=SERVED_NAME, prompt=ids, max_tokens=12, temperature=0)
    by_text = client.completions.create(model=SERVED_NAME, prompt="Once upon a time", max_tokens=12, temperature=0)
    both = client.completions.create(model=SERVED_NAME, prompt=[ids, ids[:4]], max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text == both.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1]


def test_an_answer_stops_before_a_text_and_no_part_of_it_is_streamed(client):
    whole = ask(client, max_tokens=40).choices[0].message.content
    place = next(index for index in range(4, len(whole) - 2) if whole.index(whole[index : index + 3]) == index)
    stop = whole[place : place + 3]
    choice = ask(client, max_tokens=40, stop=["never this", stop]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[:place], "stop")
    text, chunks = streamed(client, max_tokens=40, stop=stop)
    assert text == whole[:place] and chunks[-1].choices[0].finish_reason == "stop"


def test_a_client_that_closes_its_stream_ends_the_request_and_leaves_a_prefix(server, client):
    text = "Count from one to a million. " * 60
    before = server.wait_until(idle, "idle")
    stream = ask(client, text, stream=True, max_tokens=4000)
    for _, chunk in zip(range(6), stream, strict=False):
        assert not (chunk.choices and chunk.choices[0].finish_reason)
    stream.close()
    server.wait_until(idle, "the end of an aborted request", 30)
    again = ask(client, text)
    assert again.usage.prompt_tokens_details.cached_tokens > 1000
    read = server.status()["prompt_tokens_read"] - before["prompt_tokens_read"]
    assert read < 1.5 * again.usage.prompt_tokens


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [SERVED_NAME] and client.models.retrieve(SERVED_NAME).id == SERVED_NAME


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "gpt-9"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, openai.BadRequestError, "20003 tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "image",
        ),
        ({"extra_body": {"suffix": "x"}}, openai.BadRequestError, "suffix"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(client, changes, error, message):
    given = {"messages": [{"role": "user", "content": QUESTION}], **SETTINGS, **changes}
    with pytest.raises(error) as refused:
        client.chat.completions.create(**given)
    assert message in str(refused.value) and refused.value.body["type"] and refused.value.body["message"]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks out of the window.",
        "parameters": {
            "type": "object",
            "properties": {"units": {"enum": ["si", "us"]}},
            "required": ["units"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 120}


def test_a_tool_is_called_and_its_result_answered(client):
    (choice,) = ask(client, **FORCED).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments)["units"] in ("si", "us")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [{"role": "user", "content": QUESTION}, choice.message.model_dump(exclude_none=True), result]
    answered = client.chat.completions.create(messages=messages, tools=[WEATHER], tool_choice="none", **SETTINGS)
    assert answered.choices[0].message.content and answered.choices[0].message.tool_calls is None


def test_a_streamed_call_adds_up(client):
    (whole,) = ask(client, **FORCED).choices[0].message.tool_calls
    with client.chat.completions.stream(messages=[{"role": "user", "content": QUESTION}], **{**SETTINGS, **FORCED}) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (whole.function.name, whole.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"
