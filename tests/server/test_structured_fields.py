"""Every way to ask for an answer of a certain form, and what goes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import LogitsProcessorList

from specache.engine.draft_tokens import DraftProcessors
from specache.server.penalties import RepeatPenalties
from tests.server.random_schemas import check_answer
from tests.server.tiny_server import END, TOKENIZER, chat, complete, printable_model, running, stream, token_of
from tests.tiny import llama

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
OPENAI = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
NUMBERS = "[0-9]{3}-[a-z]{2,4}"
LARK = 'start: "yes" | "no " REASON\nREASON: /[a-z]{3}/'
GBNF = 'root ::= "yes" | "no " [a-z] [a-z] [a-z]'
CHOICES = ["red", 'né\n"two\\words', "blue"]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running() as client:
        yield client


def only(body: dict[str, Any]) -> tuple[str, str]:
    """Return text and finish reason of the only answer."""
    (choice,) = body["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"]


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": OPENAI},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "description": "a person"}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_a_schema_in_every_form(client, ask, fields):
    text, reason = only(ask(client, max_tokens=100, temperature=1.2, seed=3, **fields))
    check_answer(text, SCHEMA)
    assert reason == "stop"


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        *[
            (fields, NUMBERS)
            for fields in ({"regex": NUMBERS}, {"guided_regex": NUMBERS}, {"structured_outputs": {"regex": NUMBERS}})
        ],
        *[({field: text}, "yes|no [a-z]{3}") for field in ("grammar", "guided_grammar") for text in (LARK, GBNF)],
        ({"structured_outputs": {"grammar": LARK}}, "yes|no [a-z]{3}"),
        ({"guided_choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
        ({"structured_outputs": {"choice": CHOICES}}, "|".join(map(re.escape, CHOICES))),
    ],
)
def test_regexes_grammars_and_choices_in_every_form(client, ask, fields, pattern):
    for seed in range(3):
        text, reason = only(ask(client, max_tokens=30, temperature=1.5, seed=seed, **fields))
        assert re.fullmatch(pattern, text) and reason == "stop"


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}])
def test_any_json_object(client, fields):
    bias = {str(token_of(character)): 60 for character in '"}'}  # short names, and an early end
    text, reason = only(chat(client, max_tokens=200, logit_bias=bias, **fields))
    assert isinstance(json.loads(text), dict) and reason == "stop"


def test_an_answer_that_is_cut_says_so(client):
    text, reason = only(chat(client, max_tokens=9, response_format=OPENAI))
    assert reason == "length" and text.startswith('{"name"')


def test_an_answer_that_is_complete_with_its_last_token_is_not_cut(client):
    whole = chat(client, max_tokens=100, response_format=OPENAI)
    tokens = whole["usage"]["completion_tokens"]
    assert only(chat(client, max_tokens=tokens, response_format=OPENAI)) == only(whole)
    assert only(chat(client, max_tokens=tokens - 1, response_format=OPENAI))[1] == "length"


def test_the_answer_may_end_only_where_the_grammar_lets_it(client):
    eager = {str(END): 100}
    check_answer(only(chat(client, max_tokens=100, response_format=OPENAI, logit_bias=eager))[0], SCHEMA)
    assert only(chat(client, max_tokens=30, regex="ab+c*", logit_bias=eager)) == ("ab", "stop")
    assert only(chat(client, max_tokens=30, regex="a{4,30}", min_tokens=9, logit_bias=eager)) == ("a" * 9, "stop")


def test_a_shortest_length_beyond_the_grammar_has_no_effect(client):
    assert only(chat(client, max_tokens=30, regex="abc", min_tokens=20)) == ("abc", "stop")


def test_bias_and_penalties_choose_among_what_is_allowed(client):
    bias = {str(token_of("z")): 100, str(token_of("0")): 100}
    assert only(chat(client, max_tokens=30, regex="[a-z]{5}", logit_bias=bias)) == ("zzzzz", "stop")
    penalties = {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 1.5}
    text, _ = only(chat(client, max_tokens=30, regex="[ab]{12}", **penalties))
    assert text.count("a") == text.count("b") == 6


def test_control_tokens_and_padding_are_never_part_of_it():
    """The model has more logits than its tokenizer has tokens, and likes what is no text."""
    model = llama(vocab_size=len(TOKENIZER) + 59, max_position_embeddings=512, eos_token_id=END)
    likes = {str(token): 100 for token in [*TOKENIZER.all_special_ids, *range(len(TOKENIZER), len(TOKENIZER) + 59)]}
    with running(model) as client:
        for fields in ({"response_format": OPENAI}, {"regex": "(.|\n){30}"}):
            answer = chat(client, max_tokens=200, temperature=1.5, seed=1, logit_bias=likes, logprobs=True, **fields)
            text, reason = only(answer)
            assert reason == "stop"
            assert len(answer["choices"][0]["logprobs"]["content"]) == answer["usage"]["completion_tokens"] == len(text.encode())


@pytest.mark.parametrize("text", ["<user>", "yes<end>no", "a <s> and <pad>"])
def test_the_text_of_a_control_token_is_spelled_out(client, text):
    grammars = ({"grammar": f'start: "{text}"'}, {"grammar": f'root ::= "{text}"'})
    for fields in ({"guided_choice": [text]}, {"regex": re.escape(text)}, *grammars):
        assert only(chat(client, max_tokens=40, **fields)) == (text, "stop")
    for schema in ({"const": text}, {"pattern": f"^{re.escape(text)}$", "type": "string"}):
        assert only(chat(client, max_tokens=40, json_schema=schema)) == (json.dumps(text), "stop")
    named = {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}
    answer, reason = only(chat(client, max_tokens=40, json_schema=named))
    assert json.loads(answer) == {text: 1} and reason == "stop"


def test_several_answers_each_match(client):
    answers = chat(client, n=5, max_tokens=100, temperature=1.5, seed=5, response_format=OPENAI)["choices"]
    texts = [choice["message"]["content"] for choice in answers]
    for text in texts:
        check_answer(text, SCHEMA)
    assert len(set(texts)) == 5 and {choice["finish_reason"] for choice in answers} == {"stop"}
    twice = complete(client, ["a", "b"], n=2, max_tokens=100, temperature=1.5, regex=NUMBERS)["choices"]
    assert len(twice) == 4 and all(re.fullmatch(NUMBERS, choice["text"]) for choice in twice)


def test_a_stream_is_the_same_text(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100, "temperature": 0, "response_format": OPENAI}
    chunks, _ = stream(client, "/v1/chat/completions", body)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert (text, chunks[-1]["choices"][0]["finish_reason"]) == only(chat(client, max_tokens=100, response_format=OPENAI))


def test_log_probabilities_are_those_of_the_model_without_the_grammar(client):
    answer = chat(client, max_tokens=30, regex="[a-z]{4}", logprobs=True, top_logprobs=3)["choices"][0]
    first = answer["logprobs"]["content"][0]
    free = chat(client, max_tokens=1, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"][0]
    assert first["top_logprobs"] == free["top_logprobs"]
    assert len(answer["logprobs"]["content"]) == 4


@pytest.mark.parametrize("policy", ["full", "none", "on-demand", "previous", "speculative", "verified"])
def test_every_policy_obeys(client, policy):
    check_answer(only(chat(client, "Hello " * 40, policy=policy, max_tokens=100, response_format=OPENAI))[0], SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": "json"}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format", "json_object"),
        ({"response_format": OPENAI, "regex": "a"}, "regex", "response_format"),
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice", "regex"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex", "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "Unknown"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "regex"),
        ({"response_format": OPENAI, "stop": ["}"]}, "stop", "response_format"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(client, fields, param, word):
    error = chat(client, code=400, **fields)
    assert error["param"] == param and word in error["message"]


def test_a_stop_that_is_an_end_token_cuts_nothing(client):
    assert only(chat(client, regex="abc", stop=["<end>"])) == ("abc", "stop")


@pytest.mark.parametrize(
    "schema",
    [
        *({"type": "array", "uniqueItems": True}, {"not": {}}, {"contains": {}}, {"if": {}, "then": {}}, {"propertyNames": {}}),
        *({"unevaluatedProperties": False}, {"dependentRequired": {"a": ["b"]}}, {"$dynamicRef": "#a"}),
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
    ],
)
def test_a_keyword_that_cannot_be_held_is_refused_by_name(client, schema):
    keyword = "oneOf" if "properties" in schema else next(name for name in reversed(schema))
    error = chat(client, code=400, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert keyword in error["message"] and error["param"] == "response_format.json_schema.schema"
    assert error["code"] == "invalid_grammar"


def test_a_model_whose_tokenizer_has_no_end_token_ends_with_the_grammar():
    model = printable_model()
    model.generation_config.eos_token_id = None
    tokenizer = type(TOKENIZER)(tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="<pad>")
    with running(model, tokenizer=tokenizer) as client:
        assert only(complete(client, max_tokens=30, regex="abc")) == ("abc", "stop")


def test_penalties_reach_draft_tokens_too():
    penalties = RepeatPenalties(2, presence=1.0, frequency=0.5)
    ids, scores = torch.tensor([[5, 5, 3, 4, 3]]), torch.zeros(1, 8)
    drafts = DraftProcessors(LogitsProcessorList([penalties]))
    assert drafts(ids, scores).tolist() == penalties(ids, scores).tolist() == [[0, 0, 0, -2.0, -1.5, 0, 0, 0]]
