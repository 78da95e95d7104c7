"""`/v1/responses`: answers, the fields of a request, and what its object says."""

from __future__ import annotations

import pytest

from specache.server.settings import ServerSettings
from tests.cli.tiny_chat import TEMPLATE, byte_tokenizer
from tests.server.response_events import PATH, checked_response, respond, streamed, text_of
from tests.server.tiny_server import END, chat, post, printable_model, prompt_of, running, token_of


def chat_text(client, messages, **fields) -> str:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return post(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_a_response_has_the_text_of_a_chat(client):
    document = respond(client)
    assert text_of(document) == chat(client)["choices"][0]["message"]["content"]
    assert document["object"] == "response" and document["id"].startswith("resp_") and document["model"] == "tiny"
    (message,) = document["output"]
    assert message["id"].startswith("msg_") and message["role"] == "assistant"


def test_usage_counts_tokens(client):
    usage = respond(client)["usage"]
    prompt = len(prompt_of("Hello"))
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (prompt, 8, prompt + 8)
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_an_answer_that_reached_its_limit_is_incomplete(client):
    document = respond(client, max_output_tokens=5)
    assert document["status"] == "incomplete" and document["incomplete_details"] == {"reason": "max_output_tokens"}
    assert document["output"][0]["status"] == "incomplete" and document["completed_at"] is None


def test_an_answer_that_ended_is_complete(client):
    document = respond(client, logit_bias={str(END): 100})
    assert document["status"] == "completed" and document["incomplete_details"] is None and document["completed_at"]
    assert text_of(document) == "" and document["output"][0]["status"] == "completed"


def test_instructions_are_a_message_of_the_system(client):
    user = {"role": "user", "content": "Hello"}
    expected = chat_text(client, [{"role": "system", "content": "Be brief."}, user])
    assert text_of(respond(client, instructions="Be brief.")) == expected != text_of(respond(client))


def test_messages_of_the_system_join_the_instructions(client):
    developer, user = {"role": "developer", "content": "In Latin."}, {"role": "user", "content": "Hello"}
    expected = chat_text(client, [{"role": "system", "content": "Be brief.\n\nIn Latin."}, user])
    assert text_of(respond(client, [developer, user], instructions="Be brief.")) == expected


@pytest.mark.parametrize(
    "items",
    [
        [{"role": "user", "content": "Hello"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        [{"type": "message", "role": "user", "content": "Hello", "id": "msg_mine", "status": "completed"}],
    ],
)
def test_a_message_may_have_several_forms(client, items):
    assert text_of(respond(client, items)) == text_of(respond(client))


def test_a_conversation_is_that_of_a_chat(client):
    said = {"type": "output_text", "text": "One.", "annotations": [], "logprobs": []}
    items = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [said]},
        {"role": "user", "content": "Go on"},
    ]
    messages = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "One.", "reasoning_content": "Hm."},
        {"role": "user", "content": "Go on"},
    ]
    assert text_of(respond(client, items)) == chat_text(client, messages)


def test_fields_about_tokens_do_what_they_do_in_a_chat(client):
    assert text_of(respond(client, logit_bias={str(token_of("x")): 100})) == "x" * 8
    sampled = {"temperature": 1, "seed": 7, "top_p": 0.9, "top_k": 20}
    assert text_of(respond(client, **sampled)) == chat(client, **sampled)["choices"][0]["message"]["content"]
    plain = text_of(respond(client))
    assert text_of(respond(client, stop=[plain[4]])) == plain[: plain.index(plain[4])]


def test_the_object_repeats_its_request(client):
    asked = {
        "instructions": "Be brief.",
        "metadata": {"run": "1"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "truncation": "auto",
        "parallel_tool_calls": False,
        "max_tool_calls": 3,
        "top_p": 0.5,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }
    document = respond(client, **asked)
    assert {name: document[name] for name in asked} == asked
    assert document["temperature"] == 0 and document["max_output_tokens"] == 8 and document["background"] is False


def test_accepted_fields_change_nothing(client):
    accepted = {
        "service_tier": "auto",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"},
        "tools": [],
        "tool_choice": "auto",
        "background": False,
        "model": "tiny",
        "store": False,
        "prompt_cache_retention": "24h",
        "chat_template_kwargs": {"enable_thinking": False},
        "context_management": None,
        "instructions": "",
        "client_metadata": {"x": "1"},
        "prompt_cache_options": {"ttl": "30m"},
    }
    assert text_of(respond(client, **accepted)) == text_of(respond(client))


def test_log_probabilities_are_those_of_a_chat(client):
    document = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = document["output"][0]["content"][0]["logprobs"]
    assert entries == chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == text_of(document)
    events = streamed(client, top_logprobs=2)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries


def thinking_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{%", "<assistant>[THINK]{%")
    return tokenizer


def test_reasoning_is_an_item_of_its_own():
    tokenizer = thinking_tokenizer()
    model = printable_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with running(model, tokenizer=tokenizer) as client:
        document = respond(client)
        (item,) = document["output"]
        assert item["type"] == "reasoning" and len(item["content"][0]["text"]) == 8 and item["status"] == "incomplete"
        assert document["usage"]["output_tokens_details"]["reasoning_tokens"] == 8
        assert streamed(client)[-1]["response"]["output"][0]["content"] == item["content"]
        again = respond(client, "And now?", previous_response_id=document["id"])
        assert [one["type"] for one in again["output"]] == ["reasoning"]


def test_an_answer_without_a_limit_has_the_servers():
    with running(settings=ServerSettings(default_new_tokens=12)) as client:
        document = post(client, PATH, {"input": "Hello", "temperature": 0, "ignore_eos": True})
        assert checked_response(document)["usage"]["output_tokens"] == 12 and document["max_output_tokens"] is None
