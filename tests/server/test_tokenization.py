"""`/tokenize`, `/detokenize`, `/tokenizer_info`, `/v1/models`."""

from __future__ import annotations

from specache.server.settings import ServerSettings
from tests.server.tiny_server import END, POSITIONS, TOKENIZER, chat, complete, error_of, post, prompt_of, running


def test_a_text_and_its_tokens_go_back_and_forth(client):
    document = post(client, "/tokenize", {"prompt": "Héllo <end>", "return_token_strs": True})
    assert document["tokens"] == TOKENIZER("Héllo <end>")["input_ids"] and document["count"] == len(document["tokens"])
    assert document["max_model_len"] == POSITIONS and len(document["token_strs"]) == document["count"]
    assert post(client, "/detokenize", {"tokens": document["tokens"]}) == {"prompt": "Héllo <end>"}


def test_a_conversation_has_the_tokens_that_a_chat_reads(client):
    document = post(client, "/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})
    assert document["tokens"] == prompt_of("Hello") and document["token_strs"] is None


def test_one_of_prompt_and_messages_is_needed(client):
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, {"prompt": 1}, {"messages": []}):
        post(client, "/tokenize", body, 400)


def test_a_field_without_effect_on_what_is_tokenized_is_refused_by_name(client):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": "user", "content": "a"}]
    for field, value in {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}.items():
        assert post(client, "/tokenize", {"prompt": "a", field: value}, 400)["param"] == field
        assert post(client, "/tokenize", {"prompt": "a", field: None})["count"] == 1
    assert post(client, "/tokenize", {"messages": messages, "add_special_tokens": True}, 400)["param"] == "add_special_tokens"
    assert post(client, "/tokenize", {"messages": messages, "add_special_tokens": False})["tokens"] == prompt_of("a")


def test_token_ids_must_be_the_models(client):
    for tokens in ([-1], [10**6], [1.0], "a", None, [True], [10**40]):
        assert post(client, "/detokenize", {"tokens": tokens}, 400)["param"] == "tokens"


def test_the_tokenizers_facts_are_there(client):
    document = client.get("/tokenizer_info").json()
    assert document["eos_token"] == "<end>" and document["eos_token_id"] == END and document["bos_token"] is None
    assert document["chat_template"] == TOKENIZER.chat_template and document["model_max_length"] == POSITIONS


def test_tokenizing_counts_as_an_open_request():
    with running(settings=ServerSettings(most_streams=1)) as limited:
        limited.app.state.open_streams = 1  # an answer
        assert post(limited, "/tokenize", {"prompt": "a"}, 429) == post(limited, "/detokenize", {"tokens": [1]}, 429)
        limited.app.state.open_streams = 0
        for _ in range(2):
            assert post(limited, "/tokenize", {"prompt": "a"})["count"] == 1
        assert limited.app.state.open_streams == 0


def test_answers_carry_the_name_that_the_request_used():
    with running(names=("tiny", "other")) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "other"]
        for answer in (chat, complete):
            assert answer(client, model="other")["model"] == "other"
            assert answer(client)["model"] == answer(client, model="tiny")["model"] == "tiny"


def test_the_model_is_listed_and_shown(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == POSITIONS
    assert client.get("/v1/models/tiny").json() == card
    response = client.get("/v1/models/other")
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_tools_count_as_they_do_in_an_answer(client):
    tools = [{"type": "function", "function": {"name": "weather", "description": "Looks."}}]
    messages = [{"role": "user", "content": "Hello"}]
    counted = post(client, "/tokenize", {"messages": messages, "tools": tools})["count"]
    answered = post(client, "/v1/chat/completions", {"messages": messages, "tools": tools, "max_tokens": 1})
    assert counted == answered["usage"]["prompt_tokens"] > post(client, "/tokenize", {"messages": messages})["count"]
