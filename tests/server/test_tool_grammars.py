"""A call that must be made is made, and matches its schema, whatever the model would write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from specache.server.error_responses import ApiError
from specache.server.grammar_compiler import GrammarCompiler
from specache.server.grammar_spec import GrammarSpec
from specache.server.tool_fields import ToolDefinition
from specache.server.tool_formats.known_formats import tool_format
from specache.server.tool_grammar import marker_tokens, tool_grammar
from specache.server.tool_use import ToolUse
from tests.server.tiny_server import post, running, stream
from tests.server.tool_models import FAMILIES, seeded_model

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "title": "arguments",
    "properties": {
        "city": {"type": "string", "maxLength": 2, "pattern": "^[a-z]*$", "description": 'a "city"</tool_call>'},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["si", "::="]},
    },
    "required": ["city", "units"],
    "additionalProperties": False,
}
POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/pair"}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
}
SCHEMAS: dict[str, dict[str, Any]] = {"weather": WEATHER, "move-to.v2/x:y": POINT, "now": {"type": "object", "maxProperties": 0}}


def tool(name: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 160, "temperature": 2, **fields}


@dataclass
class Server:
    """A server whose random model wears the form of a family."""

    name: str
    client: TestClient

    def required(self, **fields: Any) -> dict[str, Any]:
        """Return a request for one call. Reasoning, where the form has it, is made short."""
        ends = {"harmony": "<|end|>", "hermes": "</think>"}
        tokenizer = FAMILIES[self.name].tokenizer
        bias = {"logit_bias": {str(tokenizer.convert_tokens_to_ids(ends[self.name])): 30}} if self.name in ends else {}
        return body(**{"tool_choice": "required", "parallel_tool_calls": False, **bias, **fields})


@pytest.fixture(scope="module", params=["hermes", "llama3", "harmony", "generic"])
def server(request):
    tokenizer = FAMILIES[request.param].tokenizer
    with running(seeded_model(tokenizer), tokenizer=tokenizer) as client:
        yield Server(request.param, client)


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the calls of an answer, each of which must match its schema."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in choice["message"].get("tool_calls", [])
    ]
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return calls


def test_a_required_call_is_always_valid(server):
    choices = post(server.client, CHAT, server.required(n=4, seed=1))["choices"]
    names, ids = [], []
    for choice in choices:
        ((name, _),) = calls_of(choice)
        names.append(name)
        ids += [call["id"] for call in choice["message"]["tool_calls"]]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert len(set(names)) > 1 and len(set(ids)) == len(choices)


def test_a_named_call_is_of_that_tool(server):
    chosen = "move-to.v2/x:y"
    choice = {"type": "function", "function": {"name": chosen}}
    for answer in post(server.client, CHAT, server.required(seed=2, tool_choice=choice, parallel_tool_calls=True))["choices"]:
        ((name, _),) = calls_of(answer)
        assert name == chosen


def test_only_the_allowed_tools_are_called(server):
    chosen = [{"type": "function", "function": {"name": "now"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": chosen}}
    document = post(server.client, CHAT, server.required(seed=2, tool_choice=choice))
    assert calls_of(document["choices"][0]) == [("now", {})]
    assert document["usage"]["prompt_tokens"] == post(server.client, CHAT, body(max_tokens=1))["usage"]["prompt_tokens"]


def test_parallel_calls_are_all_valid(server):
    choices = post(server.client, CHAT, server.required(n=6, seed=3, parallel_tool_calls=True, tools=TOOLS[2:]))["choices"]
    counts = {len(calls_of(choice)) for choice in choices if choice["finish_reason"] == "tool_calls"}
    assert (counts == {1}) if server.name == "harmony" else max(counts) > 1


def test_a_stream_carries_the_same_call(server):
    asked = server.required(seed=4, tool_choice={"type": "function", "function": {"name": "weather"}})
    (whole,) = post(server.client, CHAT, asked)["choices"]
    chunks, _ = stream(server.client, CHAT, asked)
    choices = [chunk["choices"][0] for chunk in chunks]
    first, *rest = [one["delta"]["tool_calls"][0] for one in choices if one["delta"].get("tool_calls")]
    assert first["function"] == {"name": "weather", "arguments": ""} and (first["index"], first["type"]) == (0, "function")
    assert first["id"] and len(rest) > 1
    assert all(set(one) == {"index", "function"} and set(one["function"]) == {"arguments"} for one in rest)
    (call,) = whole["message"]["tool_calls"]
    assert "".join(one["function"]["arguments"] for one in rest) == call["function"]["arguments"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"


def test_a_free_answer_may_be_text(server):
    free, none = (post(server.client, CHAT, body(max_tokens=12, seed=1, tool_choice=choice)) for choice in ("auto", "none"))
    for document in (free, none):
        assert calls_of(document["choices"][0]) == [] and document["choices"][0]["message"]["content"]
    assert free["usage"]["prompt_tokens"] == none["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_grammar_of_every_format_compiles_and_takes_its_own_calls(name, required, parallel):
    family = FAMILIES[name]
    tokenizer = family.tokenizer
    definitions = [ToolDefinition.model_validate(one) for one in TOOLS]
    use = ToolUse.of(definitions, "required" if required else "auto", parallel)
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    found = tool_grammar(compiler, tool_format(tokenizer), use, marker_tokens(tokenizer), None)
    assert found is not None

    def taken(answer: str) -> bool:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if name == "harmony":
            ids.append(tokenizer.convert_tokens_to_ids("<|call|>"))
        constraint = found[1].processor(1, 0, [tokenizer.eos_token_id]).constraints[0]
        masks = [constraint.forbidden(ids[:place]) for place in range(len(ids) + 1)]
        mask = masks[-1]
        return (
            mask is not None
            and not any(bool(mask[i]) for mask, i in zip(masks, ids, strict=False))
            and not mask[tokenizer.eos_token_id]
        )

    one, other = ("weather", '{"city": "um", "units": "si"}'), ("move-to.v2/x:y", '{"at": [true, false]}')
    assert taken(family.written(one)) and taken(family.written(other))
    if name != "harmony":
        assert taken(family.written(one, other)) is parallel
    assert not taken(family.written(("weather", '{"city": "UM", "units": "si"}')))
    assert not taken(family.written(("rm", "{}"))) or (name == "llama3" and not required)
    text = "<|channel|>final<|message|>Hello" if name == "harmony" else "Hello {}"
    if name != "harmony":
        assert taken(text) is not required
    if name not in ("llama3", "harmony") and not required:
        assert taken(family.written(one, text="Let me see. "))


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_named", "llama3"])
def test_a_free_answer_that_begins_a_call_ends_it_validly(name):
    tokenizer = FAMILIES[name].tokenizer
    marker = {"hermes": "<tool_call>", "llama3": "<|python_tag|>"}.get(name, "[TOOL_CALLS]")
    with running(seeded_model(tokenizer), tokenizer=tokenizer) as client:
        bias = {str(tokenizer.convert_tokens_to_ids(marker)): 100}
        for choice in post(client, CHAT, body(n=2, seed=1, logit_bias=bias, parallel_tool_calls=False))["choices"]:
            assert len(calls_of(choice)) == 1


def test_reasoning_may_stand_in_front_of_a_required_call():
    tokenizer = FAMILIES["hermes"].tokenizer
    with running(seeded_model(tokenizer), tokenizer=tokenizer) as client:
        close = {str(tokenizer.convert_tokens_to_ids("</think>")): 6}
        asked = body(
            tool_choice="required",
            seed=1,
            n=6,
            parallel_tool_calls=False,
            chat_template_kwargs={"thinking_opened": True},
            logit_bias=close,
        )
        choices = [choice for choice in post(client, CHAT, asked)["choices"] if choice["finish_reason"] == "tool_calls"]
        assert all(len(calls_of(choice)) == 1 and choice["message"]["content"] is None for choice in choices)
        assert any(choice["message"].get("reasoning_content") for choice in choices)


UNSUPPORTED = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_strict_tool_that_cannot_be_held_is_refused_by_its_keyword_and_another_takes_any_object(server, choice):
    asked = server.required(tools=[tool("f", UNSUPPORTED, strict=True)], tool_choice=choice)
    error = post(server.client, CHAT, asked, 400)
    assert "uniqueItems" in error["message"] and error["param"] == "tools"
    asked = server.required(tools=[tool("f", UNSUPPORTED)], tool_choice=choice, max_tokens=40)
    (answer,) = post(server.client, CHAT, asked)["choices"]
    if choice == "required":
        assert server.name == "harmony" or answer["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_an_answer_is_a_call_or_of_its_schema(server):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    asked = server.required(response_format=form, n=2, seed=1, tool_choice="auto")
    for choice in post(server.client, CHAT, asked)["choices"]:
        if not calls_of(choice) and choice["finish_reason"] != "length":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    error = post(server.client, CHAT, body(regex="a+"), 400)
    assert error["param"] == "regex" and "tools" in error["message"]


def test_what_cannot_be_compiled_is_refused_again_without_being_compiled():
    tokenizer = FAMILIES["hermes"].tokenizer
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    messages = set()
    for param in ("one", "two"):
        with pytest.raises(ApiError, match="uniqueItems") as caught:
            compiler.compile(GrammarSpec("json_schema", json.dumps(UNSUPPORTED), param))
        messages.add(str(caught.value).removeprefix(f"{param}: "))
    assert len(messages) == 1
