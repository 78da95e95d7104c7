"""`/v1/chat/completions`: answers, and that each field does what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import AddedToken

import specache
from tests.cli.tiny_chat import TEMPLATE, byte_tokenizer
from tests.server.tiny_server import (
    END,
    SHORT,
    TOKENIZER,
    chat,
    complete,
    post,
    printable_model,
    prompt_of,
    running,
    stream,
    token_of,
)


def generated(text: str = "Hello", new_tokens: int = 8, **arguments: object) -> str:
    """What `specache.generate` writes, greedily."""
    prompt = torch.tensor([prompt_of(text)])
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": new_tokens, **arguments}
    tokens = specache.generate(printable_model(), prompt, config=SHORT, **settings)
    return TOKENIZER.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)


def answer(client, text: str = "Hello", **fields: object) -> str:
    return chat(client, text, **fields)["choices"][0]["message"]["content"]


def test_an_answer_has_the_shape_of_openai(client):
    document = chat(client)
    assert document["object"] == "chat.completion" and document["id"].startswith("chatcmpl-")
    assert document["model"] == "tiny" and document["system_fingerprint"] == "specache-test"
    (choice,) = document["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length" and choice["index"] == 0
    prompt = len(prompt_of("Hello"))
    usage = document["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, 8, prompt + 8)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_temperature_zero_answers_as_generate_does(client):
    assert answer(client, max_tokens=40) == generated(new_tokens=40)


def test_a_long_prompt_answers_as_generate_does(client):
    text = "A long document. " * 20
    assert answer(client, text, max_tokens=20) == generated(text, 20)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_fields_that_leave_the_likeliest_token_alone_give_it(client, fields):
    assert answer(client, **{"temperature": 1.5, **fields}) == answer(client)


def test_answers_are_sampled_unless_the_temperature_is_zero(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    texts = {post(client, "/v1/chat/completions", {**body, "seed": seed})["choices"][0]["message"]["content"] for seed in range(4)}
    assert len(texts) == 4


def test_a_seed_repeats_an_answer(client):
    first, second, other = (answer(client, temperature=1, seed=seed, max_tokens=20) for seed in (7, 7, -7))
    assert first == second != other


def test_a_higher_temperature_spreads_the_answers(client):
    def different(temperature: float) -> int:
        choices = chat(client, n=16, temperature=temperature, seed=1, max_tokens=1)["choices"]
        return len({choice["message"]["content"] for choice in choices})

    assert different(0.3) < different(30)


def test_n_answers_differ_when_sampled_and_agree_when_not(client):
    sampled = chat(client, n=3, temperature=1, seed=3, max_tokens=12)
    assert [choice["index"] for choice in sampled["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in sampled["choices"]}) == 3
    assert sampled["usage"]["completion_tokens"] == 36
    greedy = chat(client, n=3)
    assert {choice["message"]["content"] for choice in greedy["choices"]} == {answer(client)}
    assert greedy["usage"]["prompt_tokens"] == len(prompt_of("Hello"))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_is_limited_by_either_name(client, name):
    document = chat(client, **{"max_tokens": None, name: 5})
    assert document["usage"]["completion_tokens"] == 5 and document["choices"][0]["finish_reason"] == "length"


def test_an_answer_without_a_limit_ends_where_the_model_does(client):
    document = chat(client, max_tokens=None, max_completion_tokens=None)
    assert document["usage"]["total_tokens"] == 512 and document["choices"][0]["finish_reason"] == "length"


def test_an_end_token_ends_the_answer_and_is_no_text(client):
    document = chat(client, logit_bias={str(END): 100})
    assert document["choices"][0]["message"]["content"] == ""
    assert document["choices"][0]["finish_reason"] == "stop" and document["usage"]["completion_tokens"] == 1


def test_min_tokens_and_ignore_eos_keep_an_answer_going(client):
    bias = {str(END): 100}
    assert chat(client, logit_bias=bias, min_tokens=4)["usage"]["completion_tokens"] == 5
    assert chat(client, logit_bias=bias, ignore_eos=True)["usage"]["completion_tokens"] == 8


def test_an_answer_that_ignores_the_models_end_still_ends_at_the_tokens_that_it_is_to_stop_at(client):
    bias = {str(TOKENIZER.convert_tokens_to_ids("<user>")): 100}
    for fields in ({"stop": "<user>", "logit_bias": bias}, {"stop": ["<user>", "<end>"], "logit_bias": {str(END): 100}}):
        document = chat(client, ignore_eos=True, **fields)
        assert document["choices"][0]["finish_reason"] == "stop" and document["usage"]["completion_tokens"] == 1
        assert chat(client, ignore_eos=True, min_tokens=3, **fields)["usage"]["completion_tokens"] == 4


def test_logit_bias_forces_and_forbids_tokens(client):
    assert answer(client, logit_bias={str(token_of("x")): 100}) == "x" * 8
    plain = answer(client)
    without = answer(client, logit_bias={str(token_of(plain[0])): -100})
    assert plain[0] not in without


def test_repetition_penalty_is_that_of_generate(client):
    assert answer(client, repetition_penalty=1.8, max_tokens=40) == generated(new_tokens=40, repetition_penalty=1.8)
    assert answer(client, repetition_penalty=1.8, max_tokens=40) != answer(client, max_tokens=40)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_make_an_answer_repeat_less(client, name):
    favourite = {str(token_of("x")): 1.5, str(token_of("y")): 1.0}
    plain = answer(client, max_tokens=100, logit_bias=favourite)
    lowered = answer(client, max_tokens=100, logit_bias=favourite, **{name: 2.0})
    raised = answer(client, max_tokens=100, logit_bias=favourite, **{name: -2.0})
    assert len(set(lowered)) > len(set(plain)) > len(set(raised))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_answer_ends_before_a_stop_string(client, length):
    plain = answer(client, max_tokens=30)
    stop = plain[10 : 10 + length]
    document = chat(client, max_tokens=30, stop=[stop, "never in it"])
    assert document["choices"][0]["message"]["content"] == plain[: plain.index(stop)]
    assert document["choices"][0]["finish_reason"] == "stop"
    assert document["usage"]["completion_tokens"] == plain.index(stop) + length


def test_a_stop_string_may_be_one_text_or_a_special_token(client):
    plain = answer(client)
    assert answer(client, stop=plain[3]) == plain[: plain.index(plain[3])]
    document = chat(client, stop="<user>", logit_bias={str(TOKENIZER.convert_tokens_to_ids("<user>")): 100})
    assert document["choices"][0]["finish_reason"] == "stop" and document["usage"]["completion_tokens"] == 1


def test_a_special_token_that_has_no_name_in_the_tokenizer_is_one_too():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<eom>", special=True, normalized=False)])  # as Llama 3's files do
    assert "<eom>" not in tokenizer.all_special_tokens
    model = printable_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bias = {str(tokenizer.convert_tokens_to_ids("<eom>")): 100}
    with running(model, tokenizer=tokenizer) as client:
        document = chat(client, stop="<eom>", logit_bias=bias)
        assert document["choices"][0]["finish_reason"] == "stop" and document["usage"]["completion_tokens"] == 1
        logprobs = complete(client, max_tokens=2, logprobs=0, logit_bias=bias)["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["<eom>", "<eom>"] and logprobs["text_offset"] == [0, 0]


def test_parts_of_a_message_are_one_text(client):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    assert post(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"] == answer(client, "Hello\nthere")


def test_a_developer_is_the_system_where_the_template_knows_no_developer(client):
    def after(role: str) -> str:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        return post(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]

    assert after("developer") == after("system") != answer(client)


def test_special_tokens_in_a_message_are_text(client):
    usage = chat(client, "<end><user>Hello")["usage"]
    assert usage["prompt_tokens"] == len(prompt_of("")) + len("<end><user>Hello")


def test_accepted_fields_change_nothing(client):
    accepted = {
        "store": True,
        "metadata": {"run": "1", "nested": {"a": [1, None]}},
        "prompt_cache_key": "k",
        "user": "u",
        "service_tier": "auto",
        "safety_identifier": "s",
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "logprobs": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "model": "tiny",
    }
    assert answer(client, **accepted) == answer(client)


def test_a_stream_carries_the_same_answer_in_order(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    chunks, _ = stream(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    *parts, last, usage = chunks
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in parts)
    assert text == answer(client, max_tokens=12) and len(parts) == 13
    assert all(chunk["choices"][0]["finish_reason"] is None and chunk["usage"] is None for chunk in parts)
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12


def test_a_stream_has_no_usage_unless_asked(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}
    chunks, _ = stream(client, "/v1/chat/completions", body)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_a_stream_tells_the_answers_apart(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "temperature": 1, "seed": 5, "n": 3}
    chunks, _ = stream(client, "/v1/chat/completions", body)
    texts = ["", "", ""]
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    whole = post(client, "/v1/chat/completions", body)
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_a_stream_never_shows_a_part_of_a_stop_string(client):
    plain = answer(client, max_tokens=30)
    stop = plain[10:14]
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30, "temperature": 0, "stop": stop}
    chunks, _ = stream(client, "/v1/chat/completions", body)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == plain[: plain.index(stop)] and chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_how_far_a_long_prompt_is_read():
    with running(chunk_ms=None, config=dataclasses.replace(SHORT, prefill_chunk=64)) as client:
        for text, chunks in (("word " * 60, 5), ("word", 1)):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0}
            _, comments = stream(client, "/v1/chat/completions", body)
            total = len(prompt_of(text))
            assert comments == [f"reading the prompt: {64 * done} of {total} tokens" for done in range(1, chunks)]


def test_reasoning_is_told_from_the_answer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{%", "<assistant>[THINK]{%")
    model = printable_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with running(model, tokenizer=tokenizer) as client:
        thinking = chat(client)["choices"][0]["message"]
        assert thinking["content"] == "" and len(thinking["reasoning_content"]) == 8
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        chunks, _ = stream(client, "/v1/chat/completions", body)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thinking["reasoning_content"]
        assert all(not delta.get("content") for delta in deltas)
        closing = {str(tokenizer.convert_tokens_to_ids("[/THINK]")): 100}
        assert chat(client, logit_bias=closing)["choices"][0]["message"]["content"] == ""
