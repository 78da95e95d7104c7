"""From Anthropic's request to OpenAI's, which the rest of the server understands."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from specache.server.anthropic_blocks import ToolResultBlock, joined
from specache.server.anthropic_fields import CountBody, ToolChoiceFields
from specache.server.chat_fields import ChatBody
from specache.server.error_responses import ApiError
from specache.server.json_body import invalid_body

_SAME = (  # fields that both have
    *("model", "stream", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"),
    *("policy", "top_k_pairs", "session"),
)
_NAMES = (  # of OpenAI's fields and ours -> of Anthropic's
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"\bresponse_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"^reasoning_effort"), "output_config.effort"),
    (re.compile(r"^(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
)
_EFFORTS = {"xhigh": "high", "max": "high"}  # templates know low, medium and high
_CHANGING_HEADER = "x-anthropic-billing-header:"  # Claude Code's first line: another one in each request

Turn = tuple[str, list[Any]]  # a role, and the blocks of all its messages in a row


def chat_body(body: CountBody) -> ChatBody:
    """Return the same request in OpenAI's form.

    Raises:
        ApiError: 400, with the field's name in Anthropic's form.
    """
    fields = {name: getattr(body, name) for name in _SAME}
    fields |= {"messages": _messages(body), "stop": body.stop_sequences, "chat_template_kwargs": _variables(body)}
    fields["max_tokens"] = max(1, body.max_tokens or 1)
    if body.output_config is not None and body.output_config.effort is not None:
        fields["reasoning_effort"] = _EFFORTS.get(body.output_config.effort, body.output_config.effort)
    if body.answer_schema is not None:
        format = {"name": "answer", "schema": body.answer_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": format}
    tools = body.shown_tools
    if tools:
        fields["tools"] = [_tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in tools]
        if body.tool_choice is not None:
            fields |= _choice(body.tool_choice)
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        raise invalid_body(error, anthropic_name) from None


def anthropic_name(field: str) -> str:
    """Return what Anthropic's API calls a field of OpenAI's."""
    for pattern, name in _NAMES:
        field = pattern.sub(name, field)
    return field


def in_anthropic_words(error: ApiError) -> ApiError:
    """Return an error about a request in OpenAI's form as one about Anthropic's."""
    param = None if error.param is None else anthropic_name(error.param)
    return ApiError(error.status, anthropic_name(error.message), code=error.code, param=param, headers=error.headers)


def _variables(body: CountBody) -> dict[str, Any] | None:
    """Return the variables of the chat template: those by which templates switch reasoning on."""
    if body.thinking is None:
        return body.chat_template_kwargs
    switches: dict[str, Any] = {"enable_thinking": body.thinking.is_on, "thinking": body.thinking.is_on}
    if body.thinking.budget_tokens is not None:
        switches["thinking_budget"] = body.thinking.budget_tokens
    return {**switches, **(body.chat_template_kwargs or {})}


def _tool(name: str, description: str | None, schema: dict[str, Any], strict: bool | None) -> dict[str, Any]:
    given = {"name": name, "description": description, "parameters": schema, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def _choice(choice: ToolChoiceFields) -> dict[str, Any]:
    same: Any = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
    chosen = same or {"type": "function", "function": {"name": choice.name}}
    return {"tool_choice": chosen, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}


def _messages(body: CountBody) -> list[dict[str, Any]]:
    system, turns = _turns(body)
    kept = _turns_with_reasoning(body, turns)
    messages = [{"role": "system", "content": joined(system)}] if system else []
    for index, (role, blocks) in enumerate(turns):
        messages += [_answer(blocks, index in kept)] if role == "assistant" else _user_messages(blocks)
    return messages


def _turns(body: CountBody) -> tuple[list[str], list[Turn]]:
    """Return the texts of the system, and the turns: messages of a role in a row are one."""
    system = [text for block in body.system or () if (text := _without_header(block.text)) is not None]
    turns: list[Turn] = []
    users = [index for index, message in enumerate(body.messages) if message.role == "user"]
    for index, message in enumerate(body.messages):
        role: str = message.role
        blocks: list[Any] = list(message.content)
        if role == "system":
            if message.clear_at == "next_user_message" and users and users[-1] > index:
                continue
            if not turns:
                system += [block.text for block in blocks]
                continue
            role, blocks = "user", [block.model_copy(update={"text": _note(block.text)}) for block in blocks]
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((role, blocks))
    return system, turns


def _note(text: str) -> str:
    """Return what the system says in the middle, as a part of the user's turn.

    Most templates know the system at the beginning alone.
    """
    return f"<system-reminder>\n{text}\n</system-reminder>"


def _without_header(text: str) -> str | None:
    """Return a text of the system without the line that no two requests have in common.

    With it, a template that writes the system first would share no prompt with another request.
    """
    if not text.startswith(_CHANGING_HEADER):
        return text
    _, _, rest = text.partition("\n")
    return rest.lstrip("\n") or None


def _turns_with_reasoning(body: CountBody, turns: list[Turn]) -> set[int]:
    """Return the turns whose reasoning the template is given."""
    reasoned = [index for index, (_, blocks) in enumerate(turns) if any(block.type == "thinking" for block in blocks)]
    for edit in (body.context_management and body.context_management.edits) or ():
        if edit.keep != "all":
            reasoned = reasoned[-edit.keep.value :]
    return set(reasoned)


def _answer(blocks: list[Any], with_reasoning: bool) -> dict[str, Any]:
    """Return an earlier answer."""
    message: dict[str, Any] = {"role": "assistant", "content": joined([one.text for one in blocks if one.type == "text"])}
    if with_reasoning:
        message["reasoning_content"] = joined([one.text for one in blocks if one.type == "thinking"])
    calls = [
        {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": json.dumps(one.input, ensure_ascii=False)}}
        for one in blocks
        if one.type == "tool_use"
    ]
    return {**message, "tool_calls": calls} if calls else message


def _user_messages(blocks: list[Any]) -> list[dict[str, Any]]:
    """Return a user's turn: results of tools are messages of their own, in their order."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in [*blocks, None]:
        if texts and (block is None or isinstance(block, ToolResultBlock)):
            messages.append({"role": "user", "content": joined(texts)})
            texts = []
        if isinstance(block, ToolResultBlock):
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text})
        elif block is not None:
            texts.append(block.text)
    return messages or [{"role": "user", "content": ""}]
