"""Log-probabilities in both of OpenAI's shapes, equal to those of the model alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from specache.engine.events import NewToken
from specache.server.logprobs import LOWEST, CompletionLogprobs, chat_logprobs
from specache.server.token_bytes import TokenBytes
from tests.server.tiny_server import END, TOKENIZER, chat, complete, printable_model, prompt_of, running, stream, token_of
from tests.server.tool_models import seeded_model
from tests.templates.tokenizers import CHATML, CHATML_MARKERS, metaspace

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return printable_model()


def log_softmax(model, ids: list[int]) -> torch.Tensor:
    """[S, V]: what the model alone says after each token."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def test_a_chat_has_the_models_log_probabilities(client, model):
    choice = chat(client, logprobs=True, top_logprobs=3)["choices"][0]
    text, content = choice["message"]["content"], choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == text and choice["logprobs"]["refusal"] is None
    prompt = prompt_of("Hello")
    expected = log_softmax(model, [*prompt, *ids(text)])
    for place, entry in enumerate(content):
        row = expected[len(prompt) + place - 1]
        assert entry["logprob"] == pytest.approx(float(row[token_of(entry["token"])]), abs=2e-3)
        assert entry["bytes"] == list(entry["token"].encode())
        best = row.topk(3)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=2e-3)
        assert [token_of(top["token"]) for top in entry["top_logprobs"]] == best.indices.tolist()


def test_they_are_the_models_whatever_the_sampling_is(client):
    plain = chat(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"][0]
    bias = {str(token_of(plain["token"])): 100}
    forced = chat(client, logprobs=True, max_tokens=1, logit_bias=bias, temperature=2)["choices"][0]["logprobs"]["content"][0]
    assert forced["token"] == plain["token"] and forced["logprob"] == pytest.approx(plain["logprob"], abs=1e-4)


def test_without_top_logprobs_the_lists_are_empty(client):
    content = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(content) == 8 and all(entry["top_logprobs"] == [] for entry in content)
    assert chat(client)["choices"][0]["logprobs"] is None


def test_a_stream_carries_each_once(client):
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    chunks, _ = stream(client, CHAT, body)
    content = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    whole = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [entry["token"] for entry in whole]


def test_an_end_token_has_none_in_a_chat(client):
    choice = chat(client, logprobs=True, logit_bias={str(END): 100})["choices"][0]
    assert choice["logprobs"]["content"] == []


def test_a_completion_has_them_in_the_older_shape(client, model):
    choice = complete(client, logprobs=2)["choices"][0]
    logprobs, prompt = choice["logprobs"], ids("Hello")
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(logprobs["tokens"]) == choice["text"] and logprobs["text_offset"] == list(range(8))
    expected = log_softmax(model, [*prompt, *ids(choice["text"])])
    for place, (token, value, top) in enumerate(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ):
        row = expected[len(prompt) + place - 1]
        assert value == pytest.approx(float(row[token_of(token)]), abs=2e-3)
        assert top[token] == value and 2 <= len(top) <= 3
        assert max(top, key=top.get) == TOKENIZER.decode([int(row.argmax())])


@pytest.mark.parametrize("prompt", ["Hello there", ids("Hello there")])
def test_echo_has_those_of_the_prompt_too(client, model, prompt):
    choice = complete(client, prompt, logprobs=1, echo=True, max_tokens=1)["choices"][0]
    logprobs, text = choice["logprobs"], "Hello there"
    assert choice["text"].startswith(text) and "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    expected = log_softmax(model, ids(text))
    for place in range(1, len(text)):
        row = expected[place - 1]
        assert logprobs["token_logprobs"][place] == pytest.approx(float(row[token_of(text[place])]), abs=2e-3)
        assert max(logprobs["top_logprobs"][place].values()) == pytest.approx(float(row.max()), abs=2e-3)
    assert logprobs["text_offset"] == list(range(len(text) + 1))


def test_echo_of_a_prompt_alone_scores_it(client):
    choice = complete(client, "Hello", logprobs=0, echo=True, max_tokens=0)["choices"][0]
    assert choice["text"] == "Hello" and len(choice["logprobs"]["tokens"]) == 5
    assert choice["logprobs"]["top_logprobs"] == [None] * 5


def test_echo_of_a_long_prompt_scores_every_token_of_it(client, model):
    text = "All of it, chunk by chunk. " * 12
    logprobs = complete(client, text, logprobs=1, echo=True, max_tokens=1)["choices"][0]["logprobs"]
    expected = log_softmax(model, ids(text))
    picked = [float(expected[place - 1, token_of(text[place])]) for place in range(1, len(text))]
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(picked, abs=2e-3)


@pytest.mark.parametrize("answers", [1, 2])
def test_a_streamed_echo_carries_the_same(client, answers):
    body = {"prompt": ["Hello", "world"], "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1, "n": answers}
    chunks, _ = stream(client, "/v1/completions", body)
    tokens = {index: [] for index in range(2 * answers)}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    whole = complete(client, ["Hello", "world"], max_tokens=4, echo=True, logprobs=1, n=answers)
    assert tokens == {choice["index"]: choice["logprobs"]["tokens"] for choice in whole["choices"]}


def test_tokens_that_are_parts_of_a_character_are_spelled_as_bytes():
    token_bytes = TokenBytes(TOKENIZER)
    euro = ids("€")
    assert [token_bytes(token) for token in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert [token_bytes.text(token) for token in euro] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert token_bytes.text(END) == "<end>" and token_bytes(10**6) == b""
    entries = chat_logprobs([NewToken(0, euro[0], -1.0)], token_bytes)["content"]
    assert entries[0]["bytes"] == [0xE2]


def test_offsets_count_characters_and_not_bytes():
    fields = CompletionLogprobs(TokenBytes(TOKENIZER), 0, frozenset({END})).take(
        [NewToken(0, token, -1.0) for token in [*ids("a€b"), END]]
    )
    assert fields["text_offset"] == [0, 1, 1, 1, 2, 3]


def test_offsets_count_special_tokens_that_a_prompt_spells(client):
    logprobs = complete(client, "a<user>b", logprobs=0, echo=True, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["a", "<user>", "b"] and logprobs["text_offset"] == [0, 1, 7, 8]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_offsets_do_not_count_the_space_that_a_tokenizer_adds(scheme):
    tokenizer = metaspace(CHATML, CHATML_MARKERS, "<|im_end|>", scheme)
    hi = {str(tokenizer.convert_tokens_to_ids("▁hi")): 100}
    with running(seeded_model(tokenizer), tokenizer=tokenizer) as client:
        for prompt in ("me hi", "hi<|im_end|>me", tokenizer("hi me hi")["input_ids"]):
            choice = complete(client, prompt, logprobs=0, echo=True, max_tokens=2, logit_bias=hi)["choices"][0]
            offsets, text = choice["logprobs"]["text_offset"], choice["text"]
            pieces = [text[start:end] for start, end in pairwise([*offsets, len(text)])]
            assert "".join(pieces) == text and pieces[-2:] == [" hi", " hi"]
            assert all(piece in (token, token[1:]) for piece, token in zip(pieces, choice["logprobs"]["tokens"], strict=True))


def test_a_masked_token_has_a_number_that_json_has():
    fields = CompletionLogprobs(TokenBytes(TOKENIZER), 1, frozenset()).take([NewToken(0, END, -math.inf, ((END, -math.inf),))])
    assert fields["token_logprobs"] == [LOWEST] and fields["top_logprobs"] == [{"<end>": LOWEST}]
