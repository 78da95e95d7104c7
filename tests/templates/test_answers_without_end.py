"""Answers that never become text cost the same at every token."""

from __future__ import annotations

from typing import Any

import pytest

from specache.server.answer_parser import AnswerParser
from specache.templates.answer_text import TextAssembler
from specache.templates.channels import channel_parser
from tests.templates.tokenizers import HARMONY, HARMONY_MARKERS, byte_level

GPT_OSS = byte_level(HARMONY, HARMONY_MARKERS, "<|return|>")
HALF = GPT_OSS("\N{GRINNING FACE}")["input_ids"][0]
SPECIAL = GPT_OSS.convert_tokens_to_ids("<|end|>")
LONG = 2000


class Counting:
    """A tokenizer that notes how many tokens it decodes at a time."""

    def __init__(self) -> None:
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(GPT_OSS, name)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.most = max(self.most, len(token_ids))
        return str(GPT_OSS.decode(token_ids, **options))


@pytest.mark.parametrize(("token", "text"), [(HALF, "\N{REPLACEMENT CHARACTER}" * LONG), (SPECIAL, "")])
def test_tokens_that_are_no_text_are_not_decoded_again_and_again(token, text):
    tokenizer = Counting()
    assembler = TextAssembler(tokenizer)
    written = "".join(assembler.push(one) for one in [token] * LONG)
    assert written + assembler.finish() == text and tokenizer.most < 200


def test_text_goes_on_behind_them():
    assembler = TextAssembler(GPT_OSS)
    after = GPT_OSS(" na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve")["input_ids"]
    written = "".join(assembler.push(one) for one in [*GPT_OSS("so")["input_ids"], *[SPECIAL] * LONG, *after])
    assert written + assembler.finish() == "so na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"


@pytest.mark.parametrize("text", ["to=" + "a" * LONG, "\n" * LONG + "a"])
def test_what_may_be_a_header_is_text_once_it_is_too_long_for_one(text):
    tokenizer = Counting()
    parser = channel_parser(tokenizer, GPT_OSS("<|start|>assistant")["input_ids"])
    assert parser is not None
    pieces = [piece for token in GPT_OSS(text)["input_ids"] for piece in parser.push(token)]
    assert GPT_OSS.decode([token for piece in pieces for token in piece.token_ids]) == text and tokenizer.most < 200


def test_an_answer_of_halves_streams():
    parser = AnswerParser(GPT_OSS, (), None)
    pieces = [parser.push(HALF) for _ in range(LONG)]
    assert sum(map(len, pieces)) > 10 and len(parser.text) > LONG - 100
