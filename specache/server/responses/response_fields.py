"""The body of `/v1/responses`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from specache.server.chat_fields import check_variables
from specache.server.json_body import FIRST_ERROR, FieldError, JsonBody, check_json
from specache.server.responses.input_items import AnyItem
from specache.server.sampling_fields import MOST_TOP_LOGPROBS, SamplingFields
from specache.server.tool_fields import MOST_TOOLS, ChosenFunction, ToolFunction

LOGPROBS = "message.output_text.logprobs"
_MOST_ITEMS = 8192
_INCLUDES = {
    LOGPROBS,
    *("reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs"),
}
_LONGEST_NAME = 512  # characters
_MOST_PAIRS, _LONGEST_PAIR = 16, (64, 512)  # of metadata, as OpenAI's


class ReasoningFields(JsonBody):
    """`reasoning`: how much of it. The reasoning itself is returned, so no summary is made."""

    effort: str | None = Field(None, max_length=32)
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = Field(None, max_length=32)
    mode: str | None = Field(None, max_length=32)


class FormatFields(JsonBody):
    """`text.format`: plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=128)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = Field(None, max_length=16384)
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> FormatFields:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("schema", "the type json_schema needs it, and no other type has it")
        return self

    def for_chat(self) -> dict[str, Any]:
        """Return `response_format` of a chat request."""
        if self.type != "json_schema":
            return {"type": self.type}
        fields = {"name": self.name or "answer", "description": self.description, "schema": self.json_schema, "strict": self.strict}
        return {"type": "json_schema", "json_schema": {name: value for name, value in fields.items() if value is not None}}

    def to_json(self) -> dict[str, Any]:
        """Return the format as a response shows it."""
        fields = self.model_dump(by_alias=True, exclude_none=True)
        return {**fields, "name": self.name or "answer"} if self.type == "json_schema" else fields


class TextFields(JsonBody):
    """`text`: the form of the answer. `verbosity` has no effect."""

    format: FormatFields | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(ToolFunction):
    """A tool that the model may call. It runs at the client."""

    type: Literal["function"]
    allowed_callers: Any = None  # from here on: accepted, without effect
    defer_loading: bool | None = None
    output_schema: Any = None

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise FieldError(
                "type", f"tools of the type {kind[:40]!r} are not served. Leave it out, or describe it as a function that you run"
            )
        return value

    def for_chat(self) -> dict[str, Any]:
        """Return the tool as a chat request has it."""
        return {"type": "function", "function": self.model_dump(include=set(ToolFunction.model_fields), exclude_none=True)}

    def to_json(self) -> dict[str, Any]:
        """Return the tool as a response shows it."""
        return {"type": "function", **self.model_dump(include=set(ToolFunction.model_fields))}


class NamedTool(ChosenFunction):
    """`tool_choice`: the one tool that must be called."""

    type: Literal["function"]


class AllowedTools(JsonBody):
    """`tool_choice`: some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MOST_TOOLS)


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
_CHOICES: dict[Any, type[NamedTool] | type[AllowedTools]] = {"function": NamedTool, "allowed_tools": AllowedTools}


class ResponsesBody(SamplingFields):
    """A request for a response."""

    input: list[AnyItem] = Field(min_length=1, max_length=_MOST_ITEMS)
    instructions: str | None = None
    previous_response_id: str | None = Field(None, min_length=1, max_length=512)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    include: Annotated[list[str], FIRST_ERROR] | None = None
    text: TextFields | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningFields | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    background: bool | None = None
    user: str | None = Field(None, max_length=_LONGEST_NAME)  # from here on: repeated in the response
    safety_identifier: str | None = Field(None, max_length=_LONGEST_NAME)
    prompt_cache_key: str | None = Field(None, max_length=_LONGEST_NAME)
    conversation: Any = None  # from here on: refused, unless empty
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    max_tool_calls: int | None = None  # from here on: accepted, without effect
    prompt_cache_options: Any = None
    client_metadata: Any = None  # Codex's

    @field_validator("input", mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise ValueError("it must be a text, or a list of items")
        return value

    @field_validator("instructions")
    @classmethod
    def _check_instructions(cls, value: str | None) -> str | None:
        return value or None  # some clients send an empty text

    @field_validator("n")
    @classmethod
    def _check_n(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("a response is one answer. Leave it out")
        return value

    @field_validator("metadata")
    @classmethod
    def _check_pairs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        pairs = (value or {}).items()
        if len(pairs) > _MOST_PAIRS or not all(isinstance(one, str) for _, one in pairs):
            raise ValueError(f"it may have {_MOST_PAIRS} names, each with a text")
        if any(len(name) > _LONGEST_PAIR[0] or len(one) > _LONGEST_PAIR[1] for name, one in pairs):
            raise ValueError(f"a name may have {_LONGEST_PAIR[0]} characters, its text {_LONGEST_PAIR[1]}")
        return value

    @field_validator("include")
    @classmethod
    def _check_include(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in _INCLUDES:
                raise ValueError(f"{name[:60]!r} is not served. Use {LOGPROBS}, or leave it out")
        return value

    @field_validator("tool_choice", mode="plain")
    @classmethod
    def _read_choice(cls, value: Any) -> Any:
        if value in (None, "none", "auto", "required"):
            return value
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in _CHOICES:
            raise ValueError("it must be none, auto, required, or an object of the type function or allowed_tools")
        return _CHOICES[kind].model_validate(value)

    @field_validator("response_format", mode="before")
    @classmethod
    def _check_format(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("it is the name of chats. Use text.format")
        return value

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("responses are not made in the background here. Leave it out, and use stream for long answers")
        return value

    @field_validator("conversation", "prompt", "context_management", "moderation")
    @classmethod
    def _check_absent(cls, value: Any) -> Any:
        if value not in (None, []):
            raise ValueError("it is not served. Leave it out; previous_response_id goes on from an earlier response")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_variables(value)

    @field_validator("prompt_cache_options", "client_metadata")
    @classmethod
    def _check_ignored(cls, value: Any) -> Any:
        check_json(value)
        return value

    @field_validator("text")
    @classmethod
    def _check_text(cls, value: TextFields | None) -> TextFields | None:
        if value is not None and value.format is not None:
            _check_numbers(value.format.json_schema)
        return value

    @model_validator(mode="after")
    def _check_chosen(self) -> ResponsesBody:
        names = {tool.name for tool in self.tools or ()}
        chosen = self.tool_choice
        if chosen is not None and not isinstance(chosen, str):
            wanted = [chosen] if isinstance(chosen, NamedTool) else chosen.tools
            for tool in wanted:
                if tool.name not in names:
                    raise FieldError("tool_choice", f"there is no tool {tool.name!r} among tools")
        elif chosen == "required" and not names:
            raise FieldError("tool_choice", "required needs tools")
        return self

    @property
    def stores(self) -> bool:
        """Return whether the response is to be stored, which is the default."""
        return self.store is not False

    @property
    def shows_logprobs(self) -> bool:
        """Return whether the answer comes with log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())


def _check_numbers(value: Any) -> None:
    """Refuse what JSON that is sent back could not hold.

    Raises:
        ValueError: a number is too large.
    """
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("a number is too large") from None
