"""Traces of `bench serve`: seeded arrivals, shared prefixes, lengths, and traces from files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from specache.bench.serve_texts import Texts
from specache.bench.serve_trace import Sizes, check_fits, generated, poisson, read_trace
from specache.errors import BenchmarkError, ConfigError
from tests.cli.tiny_chat import byte_tokenizer

TEXT = "In the beginning the tree was young, and nobody counted its rings. " * 40
LIMITS = {"requests": 100, "rate": 0.0, "answer_tokens": 50, "seed": 0}


def texts(seed: int = 0) -> Texts:
    return Texts(byte_tokenizer(), seed, TEXT)


def words(request) -> str:
    return "".join(message["content"] for message in request.messages)


def test_requests_share_their_documents_in_turn_and_differ_behind_them():
    trace = generated(Sizes(6, 0.0, 2, 300, 40, 9), texts(), seed=1)
    beginnings = [words(request)[:295] for request in trace]
    assert len(set(beginnings)) == 2 and beginnings[0] == beginnings[2] == beginnings[4]
    assert len({words(request) for request in trace}) == 6
    assert all(request.at_s == 0 and request.answer_tokens == 9 for request in trace)
    assert all(330 <= texts().length(words(request)) <= 345 for request in trace)


def test_without_prefixes_nothing_is_shared():
    trace = generated(Sizes(5, 0.0, 0, 300, 40, 9), texts(), seed=1)
    assert len({words(request)[:20] for request in trace}) == 5 and all(len(words(request)) <= 41 for request in trace)


def test_a_trace_depends_on_its_seed_only():
    sizes = Sizes(20, 3.0, 2, 100, 20, 5)
    assert generated(sizes, texts(), 1) == generated(sizes, texts(), 1)
    assert generated(sizes, texts(), 1) != generated(sizes, texts(2), 1)
    assert [one.at_s for one in generated(sizes, texts(), 1)] != [one.at_s for one in generated(sizes, texts(), 2)]


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = list(poisson(20_000, 4.0, seed=3))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0 and mean == pytest.approx(0.25, rel=0.03) and variance == pytest.approx(mean**2, rel=0.1)
    assert list(poisson(3, 0.0, seed=3)) == [0.0, 0.0, 0.0]


def test_lines_name_prefixes_and_lengths_or_messages(tmp_path: Path):
    file = tmp_path / "trace.jsonl"
    spoken = [{"role": "user", "content": "Hello"}]
    entries = [
        {"at_s": 2.5, "prefix": "a", "prefix_tokens": 200, "prompt_tokens": 30, "answer_tokens": 8},
        {"at_s": 0, "prefix": "a", "prefix_tokens": 200, "prompt_tokens": 30, "answer_tokens": 4},
        {"at_s": 1, "messages": spoken, "answer_tokens": 0},
        {"at_s": 9, "prompt_tokens": 25, "answer_tokens": 3},
    ]
    file.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    trace = read_trace(file, texts(), **LIMITS)
    assert [request.at_s for request in trace] == [0, 1, 2.5, 9] and [request.answer_tokens for request in trace] == [4, 1, 8, 3]
    assert words(trace[0])[:195] == words(trace[2])[:195] and words(trace[0]) != words(trace[2])
    assert list(trace[1].messages) == spoken and len(words(trace[3])) <= 26
    assert len(read_trace(file, texts(), **{**LIMITS, "requests": 2})) == 2


def test_every_answer_of_a_sharegpt_conversation_is_a_request_for_what_precedes_it(tmp_path: Path):
    file = tmp_path / "sharegpt.json"
    turns = [("system", "Be brief."), ("human", "Why?"), ("gpt", "Because of that."), ("human", "And?"), ("gpt", "x" * 300)]
    conversation = {"id": "1", "conversations": [{"from": who, "value": what} for who, what in turns]}
    opened = {"id": "2", "conversations": [{"from": "gpt", "value": "I began."}, {"from": "human", "value": "Ah."}]}
    file.write_text(json.dumps([conversation, opened]))
    first, second = read_trace(file, texts(), **{**LIMITS, "rate": 2.0})
    assert [message["role"] for message in first.messages] == ["system", "user"] and first.answer_tokens == 16
    assert second.messages[: len(first.messages)] == first.messages and second.messages[-1]["content"] == "And?"
    assert second.answer_tokens == 50 and second.at_s > first.at_s == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{oops", r"line 1: not JSON"),
        ("a.jsonl", "[1]", "expected a JSON object, got list"),
        ("a.jsonl", '{"at_s": -1, "prompt_tokens": 1, "answer_tokens": 1}', "'at_s' must be a number of at least 0"),
        ("a.jsonl", '{"at_s": Infinity, "prompt_tokens": 1, "answer_tokens": 1}', "'at_s' must be a number of at least 0"),
        ("a.jsonl", '{"at_s": 0, "answer_tokens": 1}', "'prompt_tokens' must be"),
        ("a.jsonl", '{"at_s": 0, "prefix": "a", "prompt_tokens": 1, "answer_tokens": true}', "'answer_tokens' must be"),
        ("a.jsonl", '{"at_s": 0, "prefix": "a", "prompt_tokens": 1, "answer_tokens": 1}', "'prefix_tokens' must be"),
        ("a.jsonl", '{"at_s": 0, "messages": [{"role": "me"}], "answer_tokens": 1}', "'messages' is a list"),
        ("a.jsonl", '{"at_s": 0, "messages": [], "answer_tokens": 1}', "'messages' is a list"),
        ("a.jsonl", "\n", "has no requests"),
        ("a.json", "{}", "a list of conversations"),
        ("a.json", "[{}]", "entry 0 has no list 'conversations'"),
        ("a.json", '[{"conversations": [{"from": "bing", "value": ""}]}]', "entry 0: a turn has 'from'"),
        ("a.json", '[{"conversations": []}]', "has no requests"),
    ],
)
def test_a_malformed_trace_is_refused_with_its_place(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_trace(tmp_path / name, texts(), **LIMITS)


def test_a_missing_trace_is_refused(tmp_path: Path):
    with pytest.raises(BenchmarkError, match="cannot read"):
        read_trace(tmp_path / "none.jsonl", texts(), **LIMITS)


def test_a_trace_that_is_too_long_for_the_model_is_refused():
    trace = generated(Sizes(2, 0.0, 1, 300, 40, 9), texts(), seed=1)
    assert 340 <= check_fits(trace, texts(), 400) <= 355 and check_fits(trace, texts(), None) <= 355
    with pytest.raises(ConfigError, match="but the model has 256 positions"):
        check_fits(trace, texts(), 256)
