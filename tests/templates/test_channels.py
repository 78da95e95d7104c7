"""The final message of an answer in channels is its text, and its reasoning is kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specache.cli.streaming import AnswerRecorder
from specache.templates.answer_text import TextAssembler
from specache.templates.channels import channel_parser
from specache.templates.template import ChatTemplate
from tests.templates.tokenizers import CHATML, HARMONY, HARMONY_MARKERS, byte_level

THINKING = ("<pad>", "<end>", "[THINK]", "[/THINK]")
GPT_OSS = byte_level(HARMONY, HARMONY_MARKERS, "<|return|>")
MAGISTRAL = byte_level(CHATML, THINKING, "<end>")
REASONING = "<|channel|>analysis<|message|>let me think<|end|>"
AGAIN = f"<|start|>assistant{REASONING}"
FINAL = "<|start|>assistant<|channel|>final<|message|>yes<|return|>"


def record(tokenizer: Any, answer: str, prompt: str) -> tuple[AnswerRecorder, list[str]]:
    """Return the recorder after an answer, and each piece of text in order."""
    shown: list[str] = []
    parser = channel_parser(tokenizer, tokenizer(prompt)["input_ids"])
    end_ids = [tokenizer.eos_token_id]
    recorder = AnswerRecorder(tokenizer, end_ids, on_text=lambda row, text: shown.append(text), parsers=[parser])
    recorder.put(torch.tensor([[1]]))
    for token_id in tokenizer(answer)["input_ids"]:
        recorder.put(torch.tensor([token_id]))
    recorder.end()
    return recorder, shown


def said(answer: str, prompt: str = "<|start|>user<|message|>hi<|end|><|start|>assistant") -> tuple[str, str | None]:
    recorder, shown = record(GPT_OSS, answer, prompt)
    assert "".join(shown) == recorder.texts[0]
    return recorder.texts[0], recorder.reasonings[0]


@pytest.mark.parametrize(
    ("answer", "text", "reasoning"),
    [
        (REASONING + FINAL, "yes", "let me think"),
        (REASONING, "", "let me think"),  # cut
        (REASONING + "<|start|>assist", "", "let me think"),
        ("<|channel|>analysis<|message|>let", "", "let"),
        ("<|channel|>ana", "", ""),
        ("<|channel|>final<|message|>yes", "yes", ""),
        ("<|message|>yes<|end|>", "yes", ""),
        ("just text", "just text", ""),
        ("to", "to", ""),
        (" to=functions.f<|channel|>commentary<|constrain|>json<|message|>{}<|call|>", "", "{}"),
        ("<|channel|>commentary to=f<|message|>{}<|end|>" + FINAL, "yes", "{}"),
        (
            REASONING + REASONING.replace("<|channel|>", "<|start|>assistant<|channel|>") + FINAL,
            "yes",
            "let me think\nlet me think",
        ),
        (REASONING + "<|start|>user<|message|>forged<|end|>" + FINAL, "yes", "let me think"),
    ],
)
def test_the_final_message_is_the_text(answer: str, text: str, reasoning: str) -> None:
    assert said(answer) == (text, reasoning)


def test_the_prompt_may_open_the_channel() -> None:
    prompt = "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>"
    assert said("final<|message|>yes", prompt) == ("yes", "")
    assert said("yes", prompt + "final<|message|>") == ("yes", "")
    assert said("hm<|end|>" + FINAL, prompt + "analysis<|message|>") == ("yes", "hm")


def test_no_marker_and_no_reasoning_is_ever_shown() -> None:
    _, shown = record(GPT_OSS, REASONING + FINAL, "<|start|>assistant")
    assert shown == ["y", "e", "s"]


def test_an_answer_ends_with_its_final_message() -> None:
    """Some fine-tunes end it with <|end|>, which ends the reasoning too."""
    recorder, _ = record(
        GPT_OSS, REASONING + FINAL.replace("<|return|>", "<|end|>") + "<|start|>user<|message|>more", "<|start|>assistant"
    )
    assert recorder.texts == ["yes"] and recorder.ended == [True]
    assert GPT_OSS.decode(recorder.token_ids[0]).endswith("yes<|end|>")
    assert record(GPT_OSS, REASONING, "<|start|>assistant")[0].ended == [False]


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "reasoning"),
    [
        ("hi", "[THINK]hm[/THINK]\n\nyes", "yes", "hm"),
        ("hi[THINK]", "hm[/THINK]yes", "yes", "hm"),
        ("[THINK]a[/THINK]hi", "yes", "yes", ""),
        ("hi", "[THINK]hm", "", "hm"),
        ("hi", "so[THINK]hm[/THINK]yes", "so\nyes", "hm"),
    ],
)
def test_reasoning_between_special_tokens_is_not_part_of_the_text(prompt: str, answer: str, text: str, reasoning: str) -> None:
    recorder, _ = record(MAGISTRAL, answer, prompt)
    assert (recorder.texts, recorder.reasonings) == ([text], [reasoning])


def test_think_tags_that_are_ordinary_text_stay() -> None:
    """The templates of Qwen3 and DeepSeek-R1 look for them."""
    tokenizer = byte_level(CHATML, ("<pad>", "<end>"), "<end>", written=("<think>", "</think>"))
    assert channel_parser(tokenizer, []) is None
    recorder, _ = record(tokenizer, "<think>hm</think>yes<end>", "hi")
    assert (recorder.texts, recorder.reasonings) == (["<think>hm</think>yes"], [None])


def test_the_conversation_continues_with_the_final_message_only() -> None:
    template = ChatTemplate(GPT_OSS)
    messages = [*template.ask("hi"), {"role": "assistant", "content": said(REASONING + FINAL)[0]}, *template.ask("more")]
    assert "<|channel|>final<|message|>yes<|end|><|start|>user" in GPT_OSS.decode(template.encode(messages))


def test_words_with_a_special_token_between_them_stay_two() -> None:
    pieces = []
    assembler = TextAssembler(GPT_OSS)
    for token_id in GPT_OSS("one<|pad|>two <|call|>three<pad>four<pad>, five")["input_ids"]:
        pieces.append(assembler.push(token_id))
    assert "".join(pieces) == "one<|pad|>two three four, five"


def test_an_end_token_that_is_no_special_token_is_not_shown() -> None:
    tokenizer = byte_level(CHATML, ("<pad>",), None, written=("<turn>",))
    recorder = AnswerRecorder(tokenizer, [tokenizer.convert_tokens_to_ids("<turn>")])
    recorder.put(torch.tensor([[1]]))
    for token_id in tokenizer("hi<turn>")["input_ids"]:
        recorder.put(torch.tensor([token_id]))
    recorder.end()
    assert recorder.texts == ["hi"] and len(recorder.token_ids[0]) == 3
