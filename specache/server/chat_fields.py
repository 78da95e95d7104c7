"""The body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from specache.server.json_body import FIRST_ERROR, FieldError, JsonBody, check_json
from specache.server.sampling_fields import MOST_TOP_LOGPROBS, SamplingFields
from specache.server.tool_fields import (
    LONGEST_CALL_ID,
    MOST_TOOLS,
    Choice,
    ToolCallFields,
    ToolDefinition,
    check_choice,
    check_tools,
)
from specache.server.tool_use import ToolUse

Role = Literal["system", "developer", "user", "assistant", "tool"]
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MOST_PARTS = 4096
MOST_CALLS = 4096  # of one message
LONGEST_CHAT = 65_536  # messages that are parsed, to say how many may be used
_RESERVED = ("tools", "documents", "tool_choice", "add_generation_prompt", "continue_final_message")


class ChatMessage(JsonBody):
    """One message. Its content is one text, however many parts it came in.

    Of an answer that only called tools, and of a tool that says nothing, it is empty. A message of
    the role `tool` is the result of the call `tool_call_id`.
    """

    role: Role
    content: str
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None  # of an earlier answer, as clients send it back
    tool_calls: Annotated[list[ToolCallFields], Field(max_length=MOST_CALLS), FIRST_ERROR] | None = None
    tool_call_id: str | None = Field(None, max_length=LONGEST_CALL_ID)

    @model_validator(mode="before")
    @classmethod
    def _check_role(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("it must be an object with role and content")
        if value.get("role") == "function" or value.get("function_call"):
            raise ValueError("function_call is the old form of calls. Use tool_calls, and the role tool for their results")
        may_be_empty = value.get("role") == "tool" or (value.get("role") == "assistant" and value.get("tool_calls"))
        if may_be_empty and value.get("content") in (None, []):
            value = {**value, "content": ""}
        return {name: one for name, one in value.items() if name not in ("function_call", "annotations", "audio")}

    @model_validator(mode="after")
    def _check_calls(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", "only messages of the role assistant have them")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise FieldError("tool_call_id", "messages of the role tool need it, and no others have it")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError("it must be a text, or a list of parts such as {'type': 'text', 'text': ...}")
        if len(value) > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS:,} parts")
        return "\n".join(_text_of_part(index, part) for index, part in enumerate(value))


def _text_of_part(index: int, part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"part {index} must be an object with a type")
    field = _TEXT_PARTS.get(part["type"])
    if field is None:
        raise ValueError(
            f"part {index} has the type {part['type'][:40]!r}; this model reads text parts only, no images, audio or files"
        )
    if not isinstance(part.get(field), str):
        raise ValueError(f"part {index} needs {field!r}, a text")
    text: str = part[field]
    return text


def check_results(messages: list[ChatMessage]) -> None:
    """Refuse results of calls that no message before them has.

    Raises:
        FieldError: says which.
    """
    calls: set[str] = set()
    for index, message in enumerate(messages):
        calls.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            raise FieldError(f"messages[{index}].tool_call_id", "no message before it has a call with this id")


def check_variables(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the variables of a chat template, if they may be set.

    Raises:
        ValueError: one may not, or they are too many.
    """
    check_json(value)
    for name in value or {}:
        if name in _RESERVED or not name.isidentifier():
            raise ValueError(f"{name[:40]!r} cannot be set")
    return value


class ChatBody(SamplingFields):
    """A request for answers to a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=LONGEST_CHAT), FIRST_ERROR]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, max_length=32)
    tools: list[ToolDefinition] | None = Field(None, max_length=MOST_TOOLS)
    functions: list[Any] | None = None
    tool_choice: Choice | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[str], FIRST_ERROR] | None = None
    audio: Any = None
    web_search_options: Any = None
    prediction: Any = None  # from here on: accepted, without effect
    verbosity: str | None = None

    @field_validator("functions", "function_call")
    @classmethod
    def _check_old_form(cls, value: Any) -> Any:
        if value not in (None, [], "none", "auto"):
            raise ValueError("it is the old form of tools. Use tools, and tool_choice")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _check_choice(cls, value: Any) -> Any:
        return check_choice(value)

    @field_validator("audio", "web_search_options")
    @classmethod
    def _check_absent(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("it is not served. Leave it out")
        return value

    @field_validator("modalities")
    @classmethod
    def _check_modalities(cls, value: list[str] | None) -> list[str] | None:
        if value not in (None, ["text"]):
            raise ValueError("this model writes text only: use ['text']")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_variables(value)

    @model_validator(mode="after")
    def _check_tools(self) -> ChatBody:
        check_tools(self.tools, self.tool_choice)
        check_results(self.messages)
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "it needs logprobs: true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Return the longest answer that was asked for; `None` leaves it to the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprobs_per_token(self) -> int | None:
        """Return how many likely tokens to report beside each new one; `None` reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tool_use(self) -> ToolUse | None:
        """Return the tools of the request; `None` if it has none."""
        return ToolUse.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def variables(self) -> dict[str, Any]:
        """Return the variables of the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}
