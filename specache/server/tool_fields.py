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
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise FieldError("tool_choice", f"there is no tool {choice.function.name!r}")
