"""Small requests cannot ask for much memory or work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from specache.server.anthropic_fields import MessagesBody
from specache.server.chat_fields import ChatBody
from specache.server.error_responses import ApiError
from specache.server.grammar_compiler import GrammarCompiler
from specache.server.grammar_spec import GrammarSpec
from specache.server.json_body import JsonBody
from specache.server.responses.input_items import ItemReference
from specache.server.responses.response_fields import ResponsesBody
from specache.server.responses.response_store import ResponseStore
from specache.server.responses.stored_items import item_id, resolved
from specache.server.schema_intersections import MOST_AT_ONCE, check_intersections
from specache.server.tool_formats.one_call_each import one_call_each
from tests.server.tiny_server import TOKENIZER

HI = {"messages": [{"role": "user", "content": "Hi"}]}
MANY = [1] * 5000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": MANY}),
        (ChatBody, {"messages": [{"role": "assistant", "content": "", "tool_calls": MANY}]}),
        (ChatBody, {**HI, **{f"unknown{number}": 1 for number in range(5000)}}),
        (ChatBody, {**HI, "logit_bias": {str(number): "a" for number in range(5000)}}),
        (ChatBody, {**HI, "modalities": MANY}),
        (MessagesBody, {"max_tokens": 1, "messages": MANY}),
        (MessagesBody, {"max_tokens": 1, "messages": [{"role": "user", "content": MANY}]}),
        (MessagesBody, {"max_tokens": 1, **HI, "system": MANY}),
        (ResponsesBody, {"input": "Hi", "include": MANY}),
    ],
)
def test_a_body_full_of_faults_has_one_error(kind: type[JsonBody], body: dict[str, Any]):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() == 1


def compiled(kind: Any, text: Any) -> None:
    compiler = GrammarCompiler(TOKENIZER, len(TOKENIZER))
    compiler.compile(GrammarSpec(kind, text if isinstance(text, str) else json.dumps(text)))


def pattern(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"(.*a.{{{number}}}b.*)"}


def chained(count: int) -> dict[str, Any]:
    steps = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}", **pattern(n)} for n in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{count}": {}}}


def parts_of(count: int) -> list[dict[str, Any]]:
    return [{"type": "object", "properties": {"x": pattern(n)}} for n in range(count)]


def collected_by_a_loop(count: int) -> dict[str, Any]:
    """Return a schema in which every level of `next` has one pattern more."""
    steps = {f"b{n}": {"properties": {"x": pattern(n), "next": {"$ref": f"#/$defs/b{n + 1}"}}} for n in range(count)}
    loop = {"allOf": [{"properties": {"next": {"$ref": "#/$defs/a"}}}, {"properties": {"next": {"$ref": "#/$defs/b0"}}}]}
    return {"$ref": "#/$defs/a", "$defs": {"a": loop, **steps, f"b{count}": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [pattern(n) for n in range(60)]},
        {"allOf": parts_of(60)},
        {"type": "array", "items": {"allOf": [{"anyOf": [pattern(n), {"type": "integer"}]} for n in range(60)]}},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {f"^a{{{n + 1},}}$": pattern(n) for n in range(60)}},
        chained(60),
        collected_by_a_loop(60),
    ],
)
def test_patterns_that_all_hold_for_one_text_are_bounded(schema):
    with pytest.raises(ApiError, match="hold for one text at the same time"):
        compiled("json_schema", schema)
    with pytest.raises(ApiError, match="hold for one text at the same time"):
        compiled("lark", f"start: %json {json.dumps(schema)}")


def test_patterns_of_different_texts_are_not_counted_together():
    check_intersections({"type": "object", "properties": {f"p{n}": {**pattern(n), "format": "date"} for n in range(500)}})
    check_intersections({"anyOf": [pattern(n) for n in range(500)]})
    check_intersections({"allOf": [pattern(n) for n in range(MOST_AT_ONCE)]})
    check_intersections({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": pattern(1), **{f"b{n}": pattern(n) for n in range(50)}}})
    tree = {"properties": {"name": pattern(1), "of": {"type": "array", "items": {"$ref": "#"}}}}
    check_intersections(tree)
    node = {"description": "A node.", "properties": {**{f"p{n}": pattern(n) for n in range(50)}, "of": {"$ref": "#/$defs/node"}}}
    node["properties"]["twin"] = {"$ref": "#/$defs/node", "description": "Another.", "default": None}
    check_intersections({"$ref": "#/$defs/node", "$defs": {"node": node}})
    compiled("json_schema", {"type": "object", **tree})


def test_references_that_are_chained_too_deeply_are_refused():
    steps = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(1500)}
    with pytest.raises(ApiError, match="chained too deeply"):
        compiled("json_schema", {"$ref": "#/$defs/a0", "$defs": {**steps, "a1500": {}}})


@pytest.mark.parametrize("before", ["", '// a " in a comment\n', "# / in a comment\n", "C: /a\nb/ & /a\nb/\n", 'C: "\\""\n'])
def test_intersections_of_a_grammar_are_bounded(before):
    terms = " & ".join(f"/.*a.{{{n}}}b.*/" for n in range(40))
    with pytest.raises(ApiError, match="intersects"):
        compiled("lark", f'{before}start: A\nA: {terms}\nB: "x"')
    with pytest.raises(ApiError):
        compiled("lark", '"' + '\\"' * 24_000)  # whose text has no end
    compiled("lark", 'start: "a && b && c && d && e && f" | /&&&&&&&&&&&&/')


def test_empty_lines_in_front_of_a_grammar_are_read_once():
    """With the search of llguidance this takes half a minute, in which no other thread runs."""
    with pytest.raises(ApiError):
        compiled("lark", "\n" * 48_000 + "x")
    compiled("lark", '\n  start: "a"')
    compiled("lark", 'root ::= "a" | "b"')


def test_every_result_is_written_once_although_calls_share_an_identifier():
    calls = [{"id": "same", "function": {"name": "f"}} for _ in range(300)]
    results = [{"role": "tool", "tool_call_id": "same", "content": str(number)} for number in range(300)]
    written = one_call_each([{"role": "assistant", "content": "", "tool_calls": calls}, *results])
    assert [one["content"] for one in written if one["role"] == "tool"] == [one["content"] for one in results]
    assert sum(len(one.get("tool_calls", ())) for one in written) == len(calls)


def stored_item(store: ResponseStore, text: str) -> str:
    name = item_id("msg", "0" * 32, 0)
    item = {"type": "message", "role": "user", "id": name, "content": [{"type": "input_text", "text": text}]}
    assert store.add("alice", f"resp_{'0' * 32}", b'{"output": []}', json.dumps([item]).encode())
    return name


def test_references_stand_for_no_more_than_could_be_sent(monkeypatch):
    store = ResponseStore(10**7, 100.0)
    name = stored_item(store, "x" * 10_000)
    read = []
    monkeypatch.setattr(
        "specache.server.responses.stored_items.input_of", lambda turn: read.append(turn) or json.loads(turn.input_items)
    )
    references = [ItemReference(id=name) for _ in range(50)]
    items = resolved(references, store, "alice", 10**6)
    assert len(items) == 50 and len({id(item) for item in items}) == 1 and len(read) == 1
    with pytest.raises(ApiError, match=r"input\[\d+\]: the items that the input refers to have more than"):
        resolved(references * 10, store, "alice", 10**6)
    with pytest.raises(ApiError, match=r"input\[0\]: the items"):
        resolved(references, store, "alice", 1000)
    with pytest.raises(ApiError) as caught:
        resolved(references, store, "bob", 10**6)
    assert caught.value.status == 404
