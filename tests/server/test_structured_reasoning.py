"""Models that reason first: the reasoning is free, the final message is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.tiny_server import chat, running
from tests.templates.tokenizers import CHATML, HARMONY, HARMONY_MARKERS, byte_level
from tests.tiny import llama

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
MAGISTRAL = byte_level(CHATML, ("<pad>", "<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"), "<|im_end|>")
OPENED = byte_level(CHATML + "[THINK]", ("<pad>", "<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]"), "<|im_end|>")
GPT_OSS = byte_level(HARMONY, HARMONY_MARKERS, "<|return|>")


def ask(tokenizer: Any, likes: dict[str, float], **fields: Any) -> list[dict[str, Any]]:
    """Return the answers of a tiny model that likes some tokens."""
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    known = {tokenizer.convert_tokens_to_ids(token): value for token, value in likes.items()}
    bias = {str(token): value for token, value in known.items() if token is not None}
    with running(model, tokenizer=tokenizer) as client:
        choices: list[dict[str, Any]] = chat(client, logit_bias=bias, response_format=FORMAT, **fields)["choices"]
        return choices


@pytest.mark.parametrize(
    ("tokenizer", "likes", "reasons"),
    [
        (MAGISTRAL, {"[THINK]": 9, "[/THINK]": 8, "<|im_end|>": 90}, True),
        (MAGISTRAL, {"[THINK]": -100, "<|im_end|>": 90}, False),
        (OPENED, {"[/THINK]": 9, "<|im_end|>": 90}, True),
        (GPT_OSS, {"<|end|>": 9, "<|return|>": 90, "<|call|>": 90, "a": 4, "f": 4}, True),
        (GPT_OSS, {"<|return|>": 90, "f": 90}, False),
    ],
)
def test_the_final_message_is_what_was_asked_for(tokenizer, likes, reasons):
    answers = ask(tokenizer, likes, temperature=1.5, seed=1, n=6, max_tokens=120)
    whole = [one["message"] for one in answers if one["finish_reason"] == "stop"]
    assert len(whole) >= 3
    for message in whole:
        assert 0 <= int(message["content"].replace(" ", "").removeprefix('{"a":').removesuffix("}")) <= 99
    assert any(message.get("reasoning_content") for message in whole) == reasons


@pytest.mark.parametrize("tokenizer", [OPENED, GPT_OSS])
def test_an_answer_that_is_cut_in_its_reasoning_says_so(tokenizer):
    likes = {"[/THINK]": -100, "<|end|>": -100, "<|im_end|>": 90, "<|return|>": 90, "a": 20}
    (answer,) = ask(tokenizer, likes, max_tokens=30)
    assert answer["finish_reason"] == "length" and answer["message"]["content"] == ""
    assert answer["message"]["reasoning_content"]


def test_reasoning_that_an_earlier_message_left_open_is_not_that_of_the_answer():
    tokenizer = byte_level(
        CHATML + "{# <think> </think> #}", ("<pad>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", written=("<think>", "</think>")
    )
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>cut off"},
        {"role": "user", "content": "b"},
    ]
    (answer,) = ask(tokenizer, {"<think>": -100, "<|im_end|>": 90}, messages=history, max_tokens=60)
    assert answer["finish_reason"] == "stop" and answer["message"]["content"].replace(" ", "").startswith('{"a":')
