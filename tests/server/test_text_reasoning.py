"""Think tags that are ordinary text become reasoning_content on the server."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.server.answer_parser import AnswerParser, ChatContext
from specache.server.answer_pieces import ReasoningPiece, TextPiece
from specache.server.text_reasoning import TextReasoning, text_pairs, text_reasoning
from specache.server.tool_formats.known_formats import tool_format
from specache.templates.channels import Part
from tests.server.tiny_server import TOKENIZER
from tests.server.tool_models import FAMILIES
from tests.templates.tokenizers import byte_level

PAIRS = (("<think>", "</think>"),)
THINKING = FAMILIES["hermes"].tokenizer


def split(pieces: list[str], closing: str | None = None) -> tuple[str, str]:
    """Return reasoning and text of an answer that arrives in these pieces."""
    parser = TextReasoning(PAIRS, closing)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    reasoning, text = ("".join(text for part, text in parts if part is kind) for kind in (Part.REASONING, Part.TEXT))
    return reasoning, text


@pytest.mark.parametrize(
    ("answer", "reasoning", "text"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("\n<think>a <b> c</think>Yes. </think>", "a <b> c", "Yes. </think>"),
        ("Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        ("<thin air", "", "<thin air"),
        ("<think>never closed \n", "never closed", ""),
        ("<think>half </thi", "half </thi", ""),
        ("  ", "", "  "),
        ("", "", ""),
    ],
)
def test_an_answer_is_split_however_it_is_cut(answer, reasoning, text):
    assert split([answer]) == split(list(answer)) == (reasoning, text)
    for cut in range(len(answer)):
        assert split([answer[:cut], answer[cut:]]) == (reasoning, text)


def test_the_prompt_may_have_opened_it():
    assert split(["hm\n</think>\n\nYes."], "</think>") == split(list("\nhm\n</think>\n\nYes."), "</think>") == ("hm", "Yes.")
    assert split(["never closed"], "</think>") == ("never closed", "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", "a", " ", "\n"]), max_size=12), st.booleans(), st.data())
def test_no_text_is_lost_or_doubled(parts, opened, data):
    answer = "".join(parts)
    closing = "</think>" if opened else None
    whole = split([answer], closing)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=4)))
    assert split([answer[a:b] for a, b in pairwise([0, *cuts, len(answer)])], closing) == whole
    stripped = answer.replace("<think>", "", 1).replace("</think>", "", 1) if not opened else answer.replace("</think>", "", 1)
    if whole[0]:
        assert "".join("".join(whole).split()) == "".join(stripped.split())
    elif not opened and not answer.lstrip().startswith("<think>"):
        assert whole[1] == answer


def test_only_models_that_know_the_tags_have_them_split():
    assert text_pairs(THINKING) == PAIRS and text_pairs(TOKENIZER) == ()
    splitting = byte_level("{{ messages[0].content.split('</think>')[-1] }}", ("<pad>", "</s>"), "</s>")
    assert text_pairs(splitting) == PAIRS
    special = byte_level("{{ '<think>' }}{{ '</think>' }}", ("<pad>", "</s>", "<think>", "</think>"), "</s>")
    assert text_pairs(special) == ()  # tokens are assigned to parts before they are text


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [("<|im_start|>assistant\n<think>\n", True), ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_what_the_prompt_ends_with_decides(prompt, opened):
    ids = THINKING(prompt, add_special_tokens=False)["input_ids"]
    parser = text_reasoning(THINKING, ids)
    assert parser is not None
    parts = parser.push("a\n</think>b")
    assert parts[0] == ((Part.REASONING, "a") if opened else (Part.TEXT, "a\n</think>b"))


def test_a_stop_string_ends_reasoning_too():
    chat = ChatContext([], tool_format(THINKING), None)
    parser = AnswerParser(THINKING, ("stop",), chat)
    pieces = [
        piece
        for token in THINKING("<think>Do I stop?</think>Yes.", add_special_tokens=False)["input_ids"]
        for piece in parser.push(token)
    ] + parser.finish()
    assert parser.ended and not any(isinstance(piece, TextPiece) for piece in pieces)
    assert "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)) == "Do I"
