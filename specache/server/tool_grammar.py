"""The grammar of an answer that may, or must, call a tool."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from specache.server.error_responses import ApiError
from specache.server.grammar_limits import check_grammar_text
from specache.server.grammar_spec import GrammarSpec, grammar_of
from specache.server.tool_formats import lark
from specache.server.tool_formats.base import Token, ToolFormat
from specache.server.tool_use import ToolUse

if TYPE_CHECKING:
    from specache.server.grammar_compiler import CompiledGrammar, GrammarCompiler
    from specache.server.sampling_fields import SamplingFields
    from specache.server.served_model import ServedModel

_PARAM = "tools"


def answer_grammar(served: ServedModel, body: SamplingFields) -> tuple[GrammarSpec, CompiledGrammar] | None:
    """Return the grammar of the answers to a request, compiled; `None` if they are free.

    Raises:
        ApiError: 400, it cannot be compiled.
    """
    text, tools = grammar_of(body), body.tool_use
    if tools is not None and tools.callable:
        return tool_grammar(served.grammars, served.tool_format, tools, marker_tokens(served.tokenizer), text)
    return None if text is None else (text, served.grammars.compile(text))


def tool_grammar(
    compiler: GrammarCompiler, tool_format: ToolFormat, tools: ToolUse, token: Token, text: GrammarSpec | None
) -> tuple[GrammarSpec, CompiledGrammar] | None:
    """Return the grammar of an answer with tools, compiled; `None` if it stays free.

    A tool whose schema cannot be compiled takes any object, unless it is `strict`.

    Args:
        token: how the grammar names a marker.
        text: the grammar of an answer that calls none; `None` is any text.

    Raises:
        ApiError: 400, a strict tool cannot be compiled, or so many that none can be required.
    """
    free = None if text is None else _expression(text)
    error: ApiError | None = None
    for one in (tools, tools.loosened()):
        try:
            _check_schemas(one)
            grammar = tool_format.grammar(one, token, free)
            spec = GrammarSpec("lark", grammar, param=_PARAM, after_reasoning=tool_format.after_reasoning)
            return spec, compiler.compile(spec)
        except ApiError as caught:
            error = caught
    assert error is not None
    if text is None and not tools.required and not tools.has_strict:
        return None
    raise error


def marker_tokens(tokenizer: Any) -> Token:
    """Return the function that names markers in grammars: as a token if the model has one."""
    ids = {str(token.content): index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return lambda text: f"<[{ids[text]}]>" if text in ids else lark.literal(text)


def _check_schemas(tools: ToolUse) -> None:
    for one in tools.callable:
        schema = json.dumps(lark.arguments_schema(one))
        check_grammar_text(GrammarSpec("json_schema", schema, f"tools: parameters of {one.name}"))


def _expression(spec: GrammarSpec) -> str:
    """Return the grammar of a final message as an expression of Lark.

    Raises:
        ApiError: 400, it cannot stand beside calls.
    """
    if spec.kind == "json_object":
        return lark.json_of({"type": "object"})
    check_grammar_text(spec)
    if spec.kind == "json_schema":
        return lark.json_of(json.loads(spec.text))
    raise ApiError(
        400,
        f"{spec.param}: it cannot be used with tools. Use response_format with a JSON schema, or leave tools out.",
        param=spec.param,
        code="invalid_value",
    )
