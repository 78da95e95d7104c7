"""Fields of a request about tools, in OpenAI's form for chats."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from specache.server.json_body import FieldError, JsonBody, check_json

MOST_TOOLS = 128
LONGEST_CALL_ID = 256  # characters
DEEPEST_SCHEMA = 48  # levels of JSON; an object within an object takes three of them
_MOST_SCHEMA_VALUES = 4000
_MOST_VALUES = 20_000  # of all schemas of a request
_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"


class ToolFunction(JsonBody):
    """What a tool is called, does, and takes: `parameters` is the JSON schema of its arguments."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        check_json(value, deepest=DEEPEST_SCHEMA, most_values=_MOST_SCHEMA_VALUES)
        return value


class ToolDefinition(JsonBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class ToolCallFunction(JsonBody):
    """The name and the arguments, as JSON text, of a call."""

    name: str = Field(pattern=_NAME)
    arguments: str


class ToolCallFields(JsonBody):
    """A call of a tool in an earlier answer."""

    id: str = Field(max_length=LONGEST_CALL_ID)
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChosenFunction(JsonBody):
    """The name of a tool."""

    name: str = Field(pattern=_NAME)


class ToolChoice(JsonBody):
    """The one tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedFunctions(JsonBody):
    """Some of the tools, and whether one must be called (`auto`, `required`)."""

    mode: Literal["auto", "required"]
    tools: list[ToolChoice] = Field(min_length=1, max_length=MOST_TOOLS)


class AllowedTools(JsonBody):
    """The tools that may be called. The others stay in the prompt, which keeps its tokens."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


Choice = Literal["none", "auto", "required"] | ToolChoice | AllowedTools


def check_choice(value: Any) -> Any:
    """Refuse what is no choice of tools, in words of its own rather than of each alternative.

    Raises:
        ValueError: it is none.
    """
    kinds = ("function", "allowed_tools")
    is_object = isinstance(value, dict) and value.get("type") in kinds and isinstance(value.get(value["type"]), dict)
    if value is not None and value not in ("none", "auto", "required") and not is_object:
        raise ValueError("it must be none, auto, required, or {'type': 'function', 'function': {'name': ...}}")
    return value


def chosen_names(choice: Any) -> list[str] | None:
    """Return the tools that a choice names; `None` if it names none."""
    if isinstance(choice, ToolChoice):
        return [choice.function.name]
    return [one.function.name for one in choice.allowed_tools.tools] if isinstance(choice, AllowedTools) else None


def _values(schema: Any) -> int:
    """Return how many values a schema has, itself among them."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return 1 + sum(map(_values, inner))


def check_tools(tools: list[ToolDefinition] | None, choice: Any) -> None:
    """Refuse tools of one name, and the choice of a tool that is not there.

    Raises:
        FieldError: says which.
    """
    if sum(_values(tool.function.parameters) for tool in tools or ()) > _MOST_VALUES:
        raise FieldError("tools", f"their schemas have more than {_MOST_VALUES:,} values together")
    names = [tool.function.name for tool in tools or ()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FieldError("tools", f"two of them are called {twice!r}")
    if choice == "required" and not names:
        raise FieldError("tool_choice", "a call is required, but there are no tools")
    unknown = next((name for name in chosen_names(choice) or () if name not in names), None)
    if unknown is not None:
        raise FieldError("tool_choice", f"there is no tool {unknown!r}")
