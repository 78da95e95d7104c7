"""Text is emitted as soon as it is final, and never changes afterwards."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specache.cli.streaming import AnswerRecorder
from specache.templates.answer_text import TextAssembler
from tests.cli.tiny_chat import byte_tokenizer
from tests.templates.tokenizers import CHATML, CHATML_MARKERS, metaspace

TOKENIZER = byte_tokenizer()
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def assemble(text: str, stops: list[str]) -> tuple[list[str], TextAssembler]:
    """Return the pieces in which a text is emitted."""
    assembler = TextAssembler(TOKENIZER, stops)
    pieces = []
    for token in ids_of(text):
        pieces.append(assembler.push(token))
        if assembler.stopped:
            break
    return [*pieces, assembler.finish()], assembler


@given(st.text(max_size=40))
def test_the_pieces_are_the_text(text):
    pieces, assembler = assemble(text, [])
    assert "".join(pieces) == text == assembler.text


@given(st.text("abé\n", max_size=30), STOPS)
def test_everything_before_the_first_stop_text_is_shown_and_nothing_else(text, stops):
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text  # what had been generated when a stop text was first complete
    expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)] if ends else text
    pieces, assembler = assemble(text, stops)
    assert "".join(pieces) == expected
    assert assembler.stopped == bool(ends)


def test_half_a_character_is_held_back():
    pieces, _ = assemble("é!", [])
    assert pieces == ["", "é", "!", ""]


def test_the_beginning_of_a_stop_text_is_held_back():
    pieces, _ = assemble("aST!", ["STOP"])
    assert pieces == ["a", "", "", "ST!", ""]


def test_a_batch_is_recorded_without_the_padding_after_each_end():
    end, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    a, b, c = ids_of("abc")
    spoken: list[tuple[int, str]] = []
    recorder = AnswerRecorder(TOKENIZER, [end], on_text=lambda row, text: spoken.append((row, text)))
    recorder.put(torch.zeros(2, 7, dtype=torch.long))  # the prompt
    for step in ([a, b], [end, c], [pad, a], [pad, end]):
        recorder.put(torch.tensor(step))
    recorder.end()
    assert recorder.token_ids == [[a, end], [b, c, a, end]]
    assert recorder.texts == ["a", "bca"]
    assert spoken == [(0, "a"), (1, "b"), (1, "c"), (1, "a")]


def test_what_continues_a_raw_text_begins_with_its_space():
    tokenizer = metaspace(CHATML, CHATML_MARKERS, "<|im_end|>", "first")  # decoded alone, a first word has no space
    hi = tokenizer.convert_tokens_to_ids("▁hi")
    prompt = tokenizer("me hi")["input_ids"]
    recorder = AnswerRecorder(tokenizer, [], before=[prompt, []])
    recorder.put(torch.zeros(2, 2, dtype=torch.long))
    for _ in range(2):
        recorder.put(torch.tensor([hi, hi]))
    recorder.end()
    assert recorder.texts == [" hi hi", "hi hi"]


def test_nothing_is_recorded_before_the_first_token():
    recorder = AnswerRecorder(TOKENIZER, [])
    recorder.put(torch.zeros(1, 3, dtype=torch.long))
    recorder.end()
    assert recorder.token_ids == [] and recorder.texts == []
