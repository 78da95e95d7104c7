"""Grammars that would take a server's time or memory are refused, or end their own answer only."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llguidance import LLParserLimits
from starlette.testclient import TestClient

from specache.server import grammar_compiler, grammar_limits
from specache.server.error_responses import ApiError
from specache.server.grammar_compiler import CompiledGrammar, GrammarCompiler
from specache.server.grammar_limits import MOST_REPEATS, check_repeats
from specache.server.grammar_spec import GrammarSpec
from tests.server.tiny_server import TOKENIZER, chat, running, stream

INTEGER = {"type": "integer"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running() as client:
        yield client


def properties(count: int, kind: Any = INTEGER) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": kind for index in range(count)}, "additionalProperties": False}


def nested(depth: int) -> Any:
    schema: Any = INTEGER
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(levels: int, keyword: str) -> Any:
    """Return a schema whose options double with every level."""
    steps = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}, {"required": [f"k{n}"]}]} for n in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{levels}": {"type": "object"}}}


REFUSED_SCHEMAS = {
    "properties": properties(5000),
    "bytes": properties(900, {"description": "x" * 100}),
    "depth": nested(70),
    "too deep to parse": nested(150),
    "pattern": {"type": "string", "pattern": "^(a{100}){1000}$"},
    "many patterns": {"type": "object", "patternProperties": {f"^{n:03}.*{n}$": INTEGER for n in range(300)}},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": 99991}]},
    "negative multiples": {"anyOf": [{"multipleOf": 99991}, {"multipleOf": -99991}]},
    "loop": {"$ref": "#"},
    "loop of two": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "endless": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}}},
    "remote": {"$ref": "http://127.0.0.1:9/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "options of llguidance": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}},
    "nonsense": {"type": ["object", 5], "properties": []},
}


@pytest.mark.parametrize("name", [name for name in REFUSED_SCHEMAS if name != "endless"])
def test_schemas_that_are_too_much_are_refused(client, name):
    error = chat(client, code=400, json_schema=REFUSED_SCHEMAS[name])
    assert error["param"] in ("json_schema", None) and len(error["message"]) < 500
    assert chat(client)["choices"]


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"value {n}" for n in range(4000)]},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": INTEGER, "minItems": 10**6, "maxItems": 10**6},
        properties(1000),
        nested(60),
        REFUSED_SCHEMAS["endless"],
        {"type": "object", "properties": {f"p{n}": {"type": "number", "minimum": n, "maximum": n * 7.5} for n in range(1, 200)}},
        doubling(20, "anyOf"),
    ],
)
def test_what_is_large_but_bounded_is_answered_or_refused(client, schema):
    response = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 20, "temperature": 0, "json_schema": schema},
    )
    assert response.status_code in (200, 400), response.text
    assert chat(client)["choices"]


@pytest.mark.parametrize(
    "regex",
    [
        *("a{100000}", "((a{100}){100}){100}", "(a{9999}b){2}", "((((a{20}){20}){20}){20}){20}", "a{99999999999999999999}"),
        *("(" * 1000 + "a" + ")" * 1000, "a" * 5000, "(?=a)b", r"(a)\1", "(a", "[", "\\"),
    ],
)
def test_regexes_that_are_too_much_are_refused(client, regex):
    for field, error in (("regex", chat(client, code=400, regex=regex)), ("json_schema", of_pattern(client, regex))):
        assert error["param"] == field and error["code"] == "invalid_grammar"


def of_pattern(client: TestClient, regex: str) -> dict[str, Any]:
    error: dict[str, Any] = chat(
        client, code=400, json_schema={"type": "string", "pattern": regex * (14 if regex[0:3] == "aaa" else 1)}
    )
    return error


@pytest.mark.parametrize(
    "lark",
    [
        *("start: " + "(" * 5000 + '"a"' + ")" * 5000, 'start: ("a" "b"){100000}', "start: a\na: b\nb: a", "start: missing", ""),
        *("root ::= " + "(" * 2000, "root ::= [", "root ::= a", "x" * 60_000, "start: %json {"),
    ],
)
def test_grammars_that_are_too_much_are_refused(client, lark):
    error = chat(client, code=400, grammar=lark)
    assert error["param"] == "grammar" and error["code"] == "invalid_grammar"
    assert chat(client)["choices"]


def test_an_answer_whose_grammar_grows_too_complex_ends_alone(client, monkeypatch):
    little_fuel = LLParserLimits(step_lexer_fuel=100, verbose_errors=False)
    monkeypatch.setattr(grammar_compiler, "parser_limits", lambda: little_fuel)
    bomb = "[a-z]{3}(.{1,9}x.{1,9}){5,20}"
    alone = chat(client, max_tokens=60)["choices"]
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(chat, client, max_tokens=60)
        error = chat(client, code=400, max_tokens=400, regex=bomb)
        assert "too complex" in error["message"] and error["code"] == "invalid_grammar"
        assert beside.result()["choices"] == alone
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400, "regex": bomb}
    chunks, _ = stream(client, "/v1/chat/completions", body)
    assert "too complex" in chunks[-1]["error"]["message"]  # and no finish reason
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])


def test_what_takes_long_at_every_token_ends(client, monkeypatch):
    monkeypatch.setattr("specache.server.grammar_matcher._FREE_SECONDS", -1.0)
    assert "takes too long" in chat(client, code=400, regex="[a-z]{30}")["message"]


@pytest.mark.parametrize(
    ("regex", "copies"),
    [
        *(("a{5}", 5), ("a{2,7}b", 7), ("a{3,}", 3), ("(a{3}|b{4}c){5}", 20), ("((a{2}){3}){4}", 24), ("(a{5})(b{6})", 6)),
        *(
            ("[a{9}]{2}", 2),
            (r"\({3}", 3),
            (r"\{9}", 1),
            ("[]{9}]{2}", 2),
            (r"[\]{9}]{2}", 2),
            ("a{2}{3}", 6),
            ("(ab{4}){2}(c)", 8),
        ),
    ],
)
def test_copies_of_a_part_are_counted(monkeypatch, regex, copies):
    monkeypatch.setattr(grammar_limits, "MOST_REPEATS", copies)
    check_repeats(regex)
    monkeypatch.setattr(grammar_limits, "MOST_REPEATS", copies - 1)
    if copies > 1:
        with pytest.raises(ValueError, match=f"{copies} times"):
            check_repeats(regex)
    assert MOST_REPEATS == 10_000


def test_others_go_on_while_a_grammar_is_compiled(client, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    compile_now = GrammarCompiler._compiled

    def slow(self: GrammarCompiler, spec: GrammarSpec) -> CompiledGrammar:
        begun.set()
        assert go_on.wait(30)
        return compile_now(self, spec)

    monkeypatch.setattr(GrammarCompiler, "_compiled", slow)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(chat, client, regex=f"slow{index}[0-9]") for index in range(4)]
        try:
            assert begun.wait(30)
            assert chat(client)["choices"]  # neither the workers nor the engine wait
            assert not any(one.done() for one in waiting)
        finally:
            go_on.set()
        assert all(one.result()["choices"][0]["message"]["content"].startswith("slow") for one in waiting)


def test_a_grammar_in_use_is_compiled_once_and_old_ones_are_dropped(monkeypatch):
    compiler = GrammarCompiler(TOKENIZER, len(TOKENIZER))
    first = compiler.compile(GrammarSpec("regex", "a", param="regex"))
    assert compiler.compile(GrammarSpec("regex", "a", param="guided_regex")) is first
    monkeypatch.setattr(grammar_compiler, "_MOST_KEPT", 3)
    for text in "bcd":
        compiler.compile(GrammarSpec("regex", text))
    assert compiler.compile(GrammarSpec("regex", "d")) is not first and len(compiler._kept) == 3
    assert compiler.compile(GrammarSpec("regex", "a")) is not first
    monkeypatch.setattr(grammar_compiler, "_MOST_KEPT_CHARACTERS", 5)
    compiler.compile(GrammarSpec("regex", "12345"))
    assert len(compiler._kept) == 1


def test_one_compiler_serves_many_threads():
    compiler = GrammarCompiler(TOKENIZER, len(TOKENIZER))
    specs = [GrammarSpec("json_schema", json.dumps(properties(count))) for count in (1, 2, 3)]
    with ThreadPoolExecutor(8) as threads:
        compiled = list(threads.map(lambda index: compiler.compile(specs[index % 3]), range(60)))
        assert len({id(one) for one in compiled}) == 3
        processors = list(threads.map(lambda one: one.processor(4, 0), compiled))
    assert len(processors) == 60
    with pytest.raises(ApiError):
        compiler.compile(GrammarSpec("regex", "("))
