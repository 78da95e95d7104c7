"""An answer ends where the model's chat template ends a message, whatever its other files say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specache.templates.end_tokens import end_tokens
from specache.templates.template import ChatTemplate
from tests.templates.tokenizers import CHATML, CHATML_MARKERS, HARMONY, HARMONY_MARKERS, byte_level

LOOP = "{% for m in messages %}"


def ends(tokenizer: Any, named: int | list[int] | None = None, chat: bool = True) -> list[str]:
    template = ChatTemplate(tokenizer) if chat else None
    return tokenizer.convert_ids_to_tokens(end_tokens(SimpleNamespace(eos_token_id=named), tokenizer, template))


@pytest.mark.parametrize("named", [None, 0, [0]])
def test_the_token_after_an_answer_in_the_template_ends_it(named: Any) -> None:
    tokenizer = byte_level(CHATML, (*CHATML_MARKERS, "<|endoftext|>"), "<|endoftext|>")
    expected = ["<pad>"] if named is not None else []
    assert ends(tokenizer, named) == [*expected, "<|endoftext|>", "<|im_end|>"]


def test_raw_text_ends_at_the_tokenizers_end_token() -> None:
    assert ends(byte_level(CHATML, (*CHATML_MARKERS, "</s>"), "</s>"), 0, chat=False) == ["<pad>", "</s>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOP + "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}", ["<end_of_turn>"]),
        (LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}", ["<|user|>"]),  # GLM-4: the next turn ends the last
        (LOOP + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}User: <|user|>", []),  # nothing but text follows
        (LOOP + "{{ m['content'] }}<turn>{% endfor %}", ["<turn>"]),  # an added token that is not special
        ("{% if messages[1] %}{{ raise_exception('one message only') }}{% endif %}", []),
    ],
)
def test_end_tokens_of_known_models_templates_are_found(template: str, expected: list[str]) -> None:
    markers = ("<pad>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>")
    assert ends(byte_level(template, markers, None, written=("<turn>",))) == expected


def test_a_message_of_a_channel_does_not_end_the_answer() -> None:
    tokenizer = byte_level(HARMONY, HARMONY_MARKERS, "<|return|>")
    assert ends(tokenizer) == ["<|return|>", "<|call|>"]
