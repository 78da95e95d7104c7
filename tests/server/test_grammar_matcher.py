"""What may follow an answer depends on the answer alone, whatever was asked before."""

from __future__ import annotations

import json
import random
from itertools import count
from typing import Any

import numpy as np
import pytest

from specache.errors import GrammarError
from specache.server import grammar_matcher
from specache.server.grammar_compiler import GrammarCompiler
from specache.server.grammar_matcher import GrammarMatcher
from specache.server.grammar_spec import GrammarSpec
from specache.templates.final_message import FinalMessage, final_message
from tests.server.random_schemas import random_schema
from tests.server.tiny_server import END, TOKENIZER
from tests.templates.tokenizers import CHATML, HARMONY, HARMONY_MARKERS, byte_level

SPECS = [
    GrammarSpec("regex", "(ab|a)*c{2,4}|[0-9]{1,12}(é|è)?"),
    GrammarSpec("json_object"),
    GrammarSpec("lark", 'start: "a" | "<" start ">" | <user> start'),
    *(GrammarSpec("json_schema", json.dumps(random_schema(random.Random(seed)))) for seed in (1, 2, 3)),
]
THINK = byte_level(CHATML, ("<pad>", "<end>", "<|im_start|>"), "<end>", written=("<think>", "</think>"))
HARMONIC = byte_level(HARMONY, HARMONY_MARKERS, "<|return|>")


def matcher(spec: GrammarSpec, tokenizer: Any = TOKENIZER, final: FinalMessage | None = None) -> GrammarMatcher:
    compiled = GrammarCompiler(tokenizer, len(tokenizer) + 3).compile(spec)
    (constraint,) = compiled.processor(1, 0, [tokenizer.eos_token_id], final).constraints
    assert isinstance(constraint, GrammarMatcher)
    return constraint


def allowed(constraint: GrammarMatcher, answer: list[int]) -> list[int] | None:
    mask = constraint.forbidden(answer)
    return None if mask is None else (~mask).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_matcher_that_saw_other_answers_says_the_same_as_a_new_one(spec):
    rng = random.Random(7)
    used, answer, seen = matcher(spec), [], 0
    compiled = GrammarCompiler(TOKENIZER, len(TOKENIZER) + 3).compile(spec)
    for _ in range(60):
        kinds: list[list[int]] = [
            answer,
            [*answer, rng.randrange(len(TOKENIZER))],
            answer[: rng.randint(0, len(answer))],
            [*answer, END, 0],
        ]
        for one in (*kinds, rng.choice(kinds)):
            new = compiled.processor(1, 0, [END]).constraints[0]
            assert isinstance(new, GrammarMatcher)
            assert (allowed(used, one), used.is_complete(one)) == (allowed(new, one), new.is_complete(one))
            seen += 1
        following = allowed(used, answer)
        assert following
        if used.is_complete(answer):
            break
        answer = [*answer, rng.choice([token for token in following if token != END] or following)]
    assert seen >= 10


def test_the_end_is_allowed_where_the_grammar_accepts_and_only_there():
    constraint = matcher(GrammarSpec("regex", "ab+"))
    (a, b) = TOKENIZER("ab")["input_ids"]
    assert allowed(constraint, []) == [a]
    assert allowed(constraint, [a]) == [b]
    assert allowed(constraint, [a, b]) == [END, b]
    assert not constraint.is_complete([a, b])
    assert allowed(constraint, [a, b, END]) is None and allowed(constraint, [a, b, END, 0, 0]) is None
    complete = matcher(GrammarSpec("regex", "ab"))
    assert complete.is_complete([a, b]) and not complete.is_complete([a])
    assert allowed(complete, [a, b]) == [END]


def test_special_tokens_are_no_text():
    constraint = matcher(GrammarSpec("regex", "(?s).*"))
    special = {*TOKENIZER.all_special_ids} - {END}
    assert not special & {*(allowed(constraint, []) or ())}
    assert max(allowed(constraint, []) or ()) < len(TOKENIZER)  # and padding of the model's logits is none


def test_an_end_token_that_a_grammar_takes_for_text_is_no_end():
    constraint = matcher(GrammarSpec("regex", "a[<]end>b"))  # as a text that can only go on so: `<end>` is a token
    with pytest.raises(GrammarError):
        constraint.forbidden([*TOKENIZER("a")["input_ids"], END])


def test_markers_of_the_template_are_no_text_either():
    template = f"{CHATML}[MARK]<tool_call>"
    tokenizer = byte_level(template, ("<pad>", "<end>"), "<end>", written=("[MARK]", "<tool_call>", "word"))
    following = allowed(matcher(GrammarSpec("regex", "(?s).*"), tokenizer), [])
    assert following is not None
    assert not {*tokenizer.convert_tokens_to_ids(["[MARK]", "<tool_call>"])} & {*following}
    assert tokenizer.convert_tokens_to_ids("word") in following
    lark = matcher(GrammarSpec("lark", 'start: "[MARK]" <tool_call>'), tokenizer)
    assert tokenizer.convert_tokens_to_ids("[MARK]") in (allowed(lark, []) or ())


class Counting:
    """Allows after n tokens the token n modulo 60; any is consumed; `TOO_MUCH` ends it."""

    TOO_MUCH = 99

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def try_consume_tokens(self, tokens: list[int]) -> int:
        self.tokens += tokens
        return len(tokens)

    def rollback(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]

    def compute_bitmask(self) -> bytes:
        return np.packbits(np.arange(64) == len(self.tokens) % 60, bitorder="little").tobytes()

    def is_accepting(self) -> bool:
        return False

    def is_error(self) -> bool:
        return self.TOO_MUCH in self.tokens

    def get_error(self) -> str:
        return "too many items"


def test_a_draft_token_that_is_too_much_does_not_end_a_long_answer(monkeypatch):
    """Its matcher begins again, and the time of the whole answer is not held against no token."""
    clock = (0.001 * tick for tick in count())
    monkeypatch.setattr(grammar_matcher.time, "thread_time", lambda: next(clock))
    constraint: Any = GrammarMatcher(Counting, 63, 64, [62])  # type: ignore[arg-type]
    answer: list[int] = []
    for place in range(400):
        assert allowed(constraint, answer) == [place % 60]
        answer.append(place % 60)
        if place == 390:
            with pytest.raises(GrammarError, match="too complex"):
                allowed(constraint, [*answer, Counting.TOO_MUCH])  # of a draft: left out


def test_text_that_no_token_spells_is_an_error():
    words = byte_level(CHATML, ("<pad>", "<end>"), "<end>")
    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: index for index, token in enumerate(t for t in state["model"]["vocab"] if t != "z")}
    smaller = type(words.backend_tokenizer).from_str(json.dumps(state))
    tokenizer = type(words)(tokenizer_object=smaller, pad_token="<pad>", eos_token="<end>")
    constraint = matcher(GrammarSpec("regex", "yz"), tokenizer)
    with pytest.raises(GrammarError):
        constraint.forbidden(tokenizer("y")["input_ids"])
        constraint.forbidden([])


def ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("prompt", "answer", "may_follow"),
    [
        ("<think>", "", None),  # anything but the end
        ("<think>", "let me", None),
        ("<think>", "yes</think>", "y"),
        ("<think>\n", "yes</think>ye", "s"),
        ("<|im_start|>", "", "y<think>"),  # it may think, or not
        ("<|im_start|>", "ye", "s"),
        ("<|im_start|>", "<think>", None),
        ("<|im_start|>", "<think>yes</think>", "y"),
        ("<think>\n\n</think>\n\n", "", "y"),  # thinking is off
        ("<think>earlier</think>\nanswer<|im_start|>", "", "y<think>"),
    ],
)
def test_the_grammar_begins_behind_the_thinking(prompt, answer, may_follow):
    constraint = matcher(GrammarSpec("regex", "yes"), THINK, final_message(THINK, ids(THINK, prompt)))
    following = allowed(constraint, ids(THINK, answer))
    if may_follow is None:
        assert following == [token for token in range(len(THINK) + 3) if token != THINK.eos_token_id]
    else:
        assert following == sorted(ids(THINK, may_follow))
    assert not constraint.is_complete(ids(THINK, answer))


ANALYSIS = "<|channel|>analysis<|message|>yes"
START = "<|start|>assistant"


@pytest.mark.parametrize(
    ("prompt", "answer", "may_follow"),
    [
        (START, "", "<|channel|>"),
        (START, "<|channel|>", "af"),
        (START, "<|channel|>ana", "l"),
        (START, "<|channel|>analysis", "<|message|>"),
        (START, ANALYSIS, None),
        (START, f"{ANALYSIS}<|end|>", "<|start|>"),
        (START, f"{ANALYSIS}<|end|><|start|>", "a"),
        (START, f"{ANALYSIS}<|end|>{START}", "<|channel|>"),
        (START, f"{ANALYSIS}<|end|>{START}<|channel|>final", "<|message|>"),
        (START, f"{ANALYSIS}<|end|>{START}<|channel|>final<|message|>", "y"),
        (START, f"{ANALYSIS}<|end|>{START}<|channel|>final<|message|>ye", "s"),
        (f"{START}<|channel|>final<|message|>", "", "y"),
        (f"{START}<|channel|>analysis<|message|>", "hm", None),
        (f"{START}<|channel|>final<|message|>yes<|end|>{START}", "", "<|channel|>"),
    ],
)
def test_the_grammar_begins_in_the_final_channel(prompt, answer, may_follow):
    constraint = matcher(GrammarSpec("regex", "yes"), HARMONIC, final_message(HARMONIC, ids(HARMONIC, prompt)))
    following = allowed(constraint, ids(HARMONIC, answer))
    expected = None if may_follow is None else sorted(ids(HARMONIC, may_follow))
    assert following == (expected or [token for token in range(len(HARMONIC) + 3) if token != HARMONIC.eos_token_id])


def test_a_model_without_reasoning_answers_at_once():
    assert final_message(TOKENIZER, TOKENIZER("<user>hi<end><assistant>")["input_ids"]) is None
