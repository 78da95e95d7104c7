"""`/v1/completions`: raw texts, token ids, lists of them, and echo."""

from __future__ import annotations

import pytest
import torch

from tests.server.tiny_server import END, TOKENIZER, complete, printable_model, running, stream, token_of
from tests.server.tool_models import seeded_model
from tests.templates.tokenizers import CHATML, CHATML_MARKERS, metaspace


@pytest.fixture(scope="module")
def model():
    return printable_model()


def text(client, prompt="Hello", **fields):
    return complete(client, prompt, **fields)["choices"][0]["text"]


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def test_a_completion_has_the_shape_of_openai(client):
    document = complete(client)
    assert document["object"] == "text_completion" and document["id"].startswith("cmpl-") and document["model"] == "tiny"
    (choice,) = document["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"} and choice["finish_reason"] == "length"
    assert document["usage"]["prompt_tokens"] == 5 and document["usage"]["completion_tokens"] == 8


def test_a_prompt_of_tokens_is_that_of_its_text(client):
    assert text(client, ids("Hello")) == text(client, "Hello")


def test_special_tokens_of_a_raw_prompt_are_special(client):
    assert complete(client, "<user>Hi<end>")["usage"]["prompt_tokens"] == 4


def test_sixteen_tokens_are_the_default(client):
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "prompts", [["Hello", "world", "Hello"], [ids("Hello"), ids("world"), ids("Hello")], ["Hello", ids("world"), "Hello"]]
)
def test_a_list_of_prompts_is_answered_in_order(client, prompts):
    document = complete(client, prompts, n=2)
    assert [choice["index"] for choice in document["choices"]] == list(range(6))
    hello, world = text(client, "Hello"), text(client, "world")
    assert [choice["text"] for choice in document["choices"]] == [hello, hello, world, world, hello, hello]
    assert document["usage"]["prompt_tokens"] == 15 and document["usage"]["completion_tokens"] == 48


def test_more_prompts_than_may_wait_are_answered_one_after_the_other():
    with running(most_waiting=1) as client:
        document = complete(client, ["a", "b", "c", "d", "e", "f"], max_tokens=2)
    assert len(document["choices"]) == 6 and document["usage"]["completion_tokens"] == 12


def test_echo_puts_the_prompt_in_front(client):
    assert text(client, echo=True) == "Hello" + text(client)
    assert text(client, ids("Hello"), echo=True) == "Hello" + text(client)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_space_behind_the_prompt_is_part_of_the_answer(scheme):
    tokenizer = metaspace(CHATML, CHATML_MARKERS, "<|im_end|>", scheme)  # decoded alone, a first word has no space
    hi = tokenizer.convert_tokens_to_ids("▁hi")
    fields = {"max_tokens": 2, "logit_bias": {str(hi): 100}}
    with running(seeded_model(tokenizer), tokenizer=tokenizer) as client:
        assert text(client, "hi me", **fields) == " hi hi"
        assert text(client, "hi me", echo=True, **fields) == "hi me hi hi"
        assert text(client, tokenizer("hi me")["input_ids"], echo=True, **fields) == "hi me hi hi"
        assert text(client, "hi me", stop=" hi", **fields) == ""


def test_a_prompt_may_end_with_half_a_character(client):
    half = ids("€")[:1]
    answer = {"max_tokens": 2, "logit_bias": {str(token_of("x")): 100}}
    assert text(client, half, **answer) == text(client, [*ids("a"), *half], **answer) == "xx"


def test_echo_without_new_tokens_is_the_prompt(client):
    document = complete(client, echo=True, max_tokens=0)
    assert document["choices"][0]["text"] == "Hello" and document["usage"]["completion_tokens"] == 0


def test_best_of_may_equal_n(client):
    assert len(complete(client, n=2, best_of=2)["choices"]) == 2


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_carries_the_same_text(client, echo):
    body = {
        "prompt": ["Hello", "world"],
        "max_tokens": 6,
        "temperature": 0,
        "echo": echo,
        "stream_options": {"include_usage": True},
    }
    chunks, _ = stream(client, "/v1/completions", body)
    *parts, usage = chunks
    texts, reasons = ["", ""], [None, None]
    for chunk in parts:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in complete(client, ["Hello", "world"], max_tokens=6, echo=echo)["choices"]]
    assert reasons == ["length", "length"] and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12


def test_an_answer_that_ends_at_once_has_no_text(client):
    document = complete(client, logit_bias={str(END): 100})
    assert document["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}


def test_stop_strings_end_a_completion(client):
    assert text(client, logit_bias={str(token_of("x")): 100}, stop="xxx") == ""


def test_stop_strings_and_answers_of_the_models_files():
    """The texts end an answer, but a constrained one; `n` alone says how many there are."""
    model = printable_model()
    model.generation_config.stop_strings = ["xxx", "<user>"]
    model.generation_config.num_return_sequences = 3
    bias = {str(token_of("x")): 100}
    with running(model) as client:
        ended = complete(client, logit_bias=bias, n=2)["choices"]
        assert [(choice["text"], choice["finish_reason"]) for choice in ended] == [("", "stop")] * 2
        assert text(client, logit_bias=bias, stop="x", temperature=1) == ""
        assert text(client, logit_bias=bias, max_tokens=5, ignore_eos=True) == "xxxxx"
        assert complete(client, logit_bias={str(token_of("<user>")): 100})["usage"]["completion_tokens"] == 1
        assert text(client, max_tokens=9, structured_outputs={"regex": "x{6}"}) == "xxxxxx"


@pytest.mark.parametrize(("presence", "frequency"), [(2, 0), (0, 1.5), (-2, 0), (0.5, -1.5), (0.6, 0.4)])
def test_penalties_choose_the_tokens_that_openais_formula_does(client, model, presence, frequency):
    prompt, new = ids("Hello world"), []
    with torch.no_grad():
        for _ in range(24):
            logits = model(torch.tensor([prompt + new])).logits[0, -1].float()
            for token in set(new):
                logits[token] -= presence + frequency * new.count(token)
            new.append(int(logits.argmax()))
    document = complete(client, "Hello world", max_tokens=24, n=2, presence_penalty=presence, frequency_penalty=frequency)
    assert [choice["text"] for choice in document["choices"]] == [TOKENIZER.decode(new)] * 2
