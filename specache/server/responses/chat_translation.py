"""From a request for a response to the chat request that says the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from specache.server.chat_fields import ChatBody, ChatMessage
from specache.server.error_responses import ApiError
from specache.server.json_body import invalid_body
from specache.server.responses.input_items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
)
from specache.server.responses.response_fields import AllowedTools, NamedTool, ResponsesBody
from specache.server.sampling_fields import SamplingFields
from specache.server.tool_fields import ToolCallFields, ToolCallFunction

_NAMES = (  # of fields of a chat request -> of this API
    (re.compile(r"^messages\b"), "input"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^max_completion_tokens\b"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
)
_OWN = frozenset({"n", "metadata", "stream_options"})  # fields that mean something else here


def chat_body(body: ResponsesBody, messages: Sequence[ChatMessage]) -> ChatBody:
    """Return the chat request of a request for a response.

    Raises:
        ApiError: 400, in the names of this API.
    """
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields if name not in _OWN}
    shared["policy"] = None if body.policy is None else str(body.policy)
    text_format = None if body.text is None or body.text.format is None else body.text.format.for_chat()
    fields = {
        "messages": list(messages),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.shows_logprobs or None,
        "top_logprobs": body.top_logprobs,
        "chat_template_kwargs": body.chat_template_kwargs,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "response_format": text_format,
        "parallel_tool_calls": body.parallel_tool_calls,
        "verbosity": None if body.text is None else body.text.verbosity,
        **_tools(body),
    }
    try:
        return ChatBody.model_validate({**shared, **fields})
    except ValidationError as error:
        raise invalid_body(error, _name) from None


def in_these_names(error: ApiError) -> ApiError:
    """Return an error about a chat request in the names of this API."""
    param = error.param and _name(error.param)
    message = error.message
    if error.param and message.startswith(error.param):
        message = f"{param}{message.removeprefix(error.param)}"
    return ApiError(error.status, message, code=error.code, param=param, headers=error.headers)


def _name(field: str) -> str:
    """Return what this API calls a field of a chat request."""
    for pattern, name in _NAMES:
        field = pattern.sub(name, field)
    return field


def chat_messages(items: Sequence[InputItem], instructions: str | None) -> list[ChatMessage]:
    """Return the messages of a conversation.

    Reasoning, text and calls that follow each other are one message of the assistant. Instructions
    and the messages of the system right behind them are one, since many chat templates take no
    more than one.

    Raises:
        ApiError: 400, a result belongs to no call.
    """
    conversation = _Conversation(instructions)
    for item in items:
        conversation.add(item)
    return conversation.messages


class _Conversation:
    """Messages while items are added.

    Attributes:
        messages: those so far.
    """

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[ChatMessage] = []
        self._may_join = instructions is not None  # whether a message of the system joins the instructions
        self._call_ids: set[str] = set()
        if instructions is not None:
            self.messages.append(_message("system", instructions))

    def add(self, item: InputItem) -> None:
        """Add the next item."""
        if isinstance(item, MessageItem) and item.role in ("system", "developer") and self._may_join:
            self.messages[0].content = "\n\n".join(text for text in (self.messages[0].content, item.text) if text)
            return
        self._may_join = False
        if isinstance(item, MessageItem):
            self._add_message(item)
        elif isinstance(item, ReasoningItem):
            self._add_reasoning(item)
        elif isinstance(item, FunctionCallItem):
            self._add_call(item)
        elif isinstance(item, FunctionCallOutputItem):
            self._add_result(item)
        else:
            raise TypeError(f"{type(item).__name__} is no item of a conversation")

    def _add_message(self, item: MessageItem) -> None:
        last = self.messages[-1] if self.messages else None
        if item.role == "assistant" and last is not None and (_is_reasoning(last) or last.tool_calls):
            last.content += item.text
        else:
            self.messages.append(_message(item.role, item.text))

    def _add_reasoning(self, item: ReasoningItem) -> None:
        last = self.messages[-1] if self.messages else None
        if last is not None and (_is_reasoning(last) or last.tool_calls):
            last.reasoning_content = "\n".join(text for text in (last.reasoning_content, item.text) if text is not None)
        else:
            self.messages.append(_message("assistant", "", reasoning_content=item.text))

    def _add_call(self, item: FunctionCallItem) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            self.messages.append(_message("assistant", ""))
        function = ToolCallFunction(name=item.name, arguments=item.arguments)
        last = self.messages[-1]
        last.tool_calls = [*(last.tool_calls or []), ToolCallFields(id=item.call_id, function=function)]
        self._call_ids.add(item.call_id)

    def _add_result(self, item: FunctionCallOutputItem) -> None:
        if item.call_id not in self._call_ids:
            message = f"There is no function_call with the call_id {item.call_id[:80]!r} in front of its function_call_output."
            raise ApiError(400, message, param="input", code="invalid_value")
        self.messages.append(_message("tool", item.text, tool_call_id=item.call_id))


def _message(role: str, content: str, **fields: str) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content, **fields})


def _is_reasoning(message: ChatMessage) -> bool:
    """Return whether a message is reasoning that its text may still follow."""
    return message.role == "assistant" and message.reasoning_content is not None and not (message.content or message.tool_calls)


def _tools(body: ResponsesBody) -> dict[str, Any]:
    """Return `tools` and `tool_choice` of the chat request."""
    tools, choice = body.tools or [], body.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        tools = [tool for tool in tools if tool.name in allowed]
    chat_choice: Any = choice
    if isinstance(choice, AllowedTools):
        chat_choice = choice.mode
    elif isinstance(choice, NamedTool):
        chat_choice = {"type": "function", "function": {"name": choice.name}}
    return {"tools": [tool.for_chat() for tool in tools] or None, "tool_choice": chat_choice}
