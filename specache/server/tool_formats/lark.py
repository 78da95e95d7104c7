"""Parts of Lark grammars for calls of tools, in llguidance's dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from specache.server.tool_fields import ToolFunction
from specache.server.tool_use import ToolUse

ANY = "/(.|\\n)+/"
_JSON_OPTIONS = {"item_separator": ",", "key_separator": ":", "whitespace_pattern": " ?", "whitespace_flexible": True}
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly", "x-guidance")
)
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # keys of these are names
_DATA = ("enum", "const", "required", "dependentRequired")


def literal(text: str) -> str:
    """Return the expression of a fixed text."""
    return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
    """Return a fixed text inside a regular expression."""
    return re.sub(r"([.^$*+?()\[\]{}|/\\&~-])", r"\\\1", text)


def json_of(schema: dict[str, Any]) -> str:
    """Return the expression of JSON that a schema allows, with at most one space between values."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False)


def arguments_schema(function: ToolFunction) -> dict[str, Any]:
    """Return the schema of a tool's arguments, without what does not constrain them."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = _bare(function.parameters)
    return schema if {"$ref", "anyOf", "allOf", "oneOf"} & schema.keys() else {**schema, "type": "object"}


def arguments_rules(tools: ToolUse) -> str:
    """Return a rule `args0`, `args1` ... for the arguments of each tool. Equal ones share one."""
    first: dict[str, int] = {}
    rules = []
    for index, one in enumerate(tools.callable):
        arguments = json_of(arguments_schema(one))
        same = first.setdefault(arguments, index)
        rules.append(f"args{index}: {arguments if same == index else f'args{same}'}\n")
    return "".join(rules)


def any_call(tools: ToolUse, call: Callable[[str, str], str]) -> str:
    """Return the rules of a call of any tool.

    Args:
        call: returns the expression of a call, given the tool's name and the rule of its arguments.
    """
    choices = [f"call{index}: {call(one.name, f'args{index}')}\n" for index, one in enumerate(tools.callable)]
    names = " | ".join(f"call{index}" for index in range(len(choices)))
    return f"call: {names}\n{''.join(choices)}{arguments_rules(tools)}"


def object_call(key: str) -> Callable[[str, str], str]:
    """Return the expression of `{"name": ..., key: ...}`, for `any_call`."""
    return lambda name, arguments: f'{literal(f"""{{"name": "{name}", "{key}": """)} {arguments} "}}"'


def answer(tools: ToolUse, marker: str, text: str | None, first: str, following: str | None, rules: str) -> str:
    """Return the grammar of an answer whose calls begin with a marker.

    Args:
        marker: the expression of the marker: a token, or its characters in quotes.
        text: the expression of text in place of calls; `None` is any.
        first: the expression of the first call, behind its marker.
        following: that of a further call, with its marker; `None` if `first` has them all.
    """
    calls = f"{first} ({following})*" if tools.parallel and following else first
    if tools.required:
        return f"start: {marker} {calls}\n{rules}"
    if text is not None:
        return f"start: {text} | {marker} {calls}\n{rules}"
    if not marker.startswith('"'):  # a special token, which no text matches
        return f"start: TEXT? | TEXT? {marker} {calls}\nTEXT: {ANY}\n{rules}"
    spelled = pattern(json.loads(marker))
    free = f"TEXT: {ANY} & ~/(.|\\n)*{spelled}(.|\\n)*/\n"
    lead = f"LEAD: /(.|\\n)*{spelled}/ & ~/(.|\\n)*{spelled}(.|\\n)+/\n"
    return f"start: TEXT? | LEAD {calls}\n{free}{lead}{rules}"


def without_beginning(beginnings: Sequence[str]) -> str:
    """Return the expression of text that does not begin with one of these regular expressions."""
    return f"{ANY} & ~/[ \\n\\t]*({'|'.join(beginnings)})(.|\\n)*/"


def _bare(schema: Any) -> Any:
    """Return a schema without annotations."""
    if isinstance(schema, list):
        return [_bare(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    return {key: _inside(key, value) for key, value in kept.items()}


def _inside(key: str, value: Any) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _bare(each) for name, each in value.items()}
    return _bare(value)
